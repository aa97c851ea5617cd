"""The images of train_classifier.py: embedded digits, class folders, and datasets by timm's name."""

from pathlib import Path
from typing import Any

from randlora_vision.errors import one_line
from randlora_vision.training.classifier.options import ClassifierOptions, DataOptions
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.pictures import SkipList, StoredImage
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.sources.class_folders import read_class_folders
from randlora_vision.training.data.sources.torchvision import class_names_of, files_of, forbid_fetching, labels_of
from randlora_vision.training.data.splits import Part, make_splits, training_part


def read_images(options: ClassifierOptions, skipped: SkipList) -> tuple[ImageSplits, ImageSplits | None]:
    """Return the images to adapt to, and those of the task that the base model already does, if known."""
    original = None
    if options.embedded and options.model.model is None:
        original = digits.read_digits(digits.KNOWN_DIGITS)
    return training_part(_read(options.data, skipped), options.data), original


def _read(data: DataOptions, skipped: SkipList) -> ImageSplits:
    if data.dataset is not None:
        return read_dataset(data, data.dataset)
    if data.data is None:
        return digits.read_digits(inverted=True)
    return read_class_folders(Path(data.data), data.val_fraction, data.split_seed, skipped)


_HELD_OUT = ("validation", "test")


def read_dataset(data: DataOptions, name: str) -> ImageSplits:
    """Open a dataset by timm's name, with its own test split and a validation split held out of the rest.

    Where it has no split beside train, the images held out are the test images too.

    Raises ValueError when the dataset is unknown, is not on the disk and may not be fetched, needs a
    package that is not installed, or has fewer than two classes.
    """
    scheme = name.partition("/")[0]
    if scheme == "torch" and data.data is None:
        raise ValueError(f"--dataset {name} needs --data, the folder where torchvision keeps its files")
    if scheme == "hfds" and not data.dataset_download:
        forbid_fetching()
    train, test = _open(data, name, "train"), _open_test(data, name)
    if test is not None and (own := files_of(test)) is not None and own == files_of(train):
        test = None  # folders without splits: timm and torchvision answer with the same files again
    parts = {"train": _part(f"the dataset {name}", train)}
    if test is not None:
        parts["test"] = _part(f"the test split of {name}", test)
    splits = make_splits(name, parts, data.val_fraction, data.split_seed)
    assert isinstance(splits, ImageSplits)
    return splits


def _part(source: str, dataset: Any) -> Part:
    labels = labels_of(dataset)
    # timm's own __getitem__ gives the next image, with its label, in place of one that it cannot read.
    items = getattr(dataset, "reader", dataset)
    images = [StoredImage(items, index) for index in range(len(labels))]
    return Part(source, images, labels, class_names=class_names_of(dataset, labels))


def _open(data: DataOptions, name: str, split: str) -> Any:
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=data.data, split=split, download=data.dataset_download)
        len(dataset)
    except ModuleNotFoundError as error:
        raise ValueError(f"--dataset {name} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # of whatever library keeps it, asserts included
        hint = "" if data.dataset_download else "; --dataset-download allows to fetch it"
        reason = one_line(str(error))[:300] or type(error).__name__
        raise ValueError(f"cannot open the split {split!r} of --dataset {name}: {reason}{hint}") from error
    return dataset


def _open_test(data: DataOptions, name: str) -> Any:
    """Return the split to test on, None where there is none."""
    for split in reversed(_HELD_OUT):
        try:
            return _open(data, name, split)
        except ValueError:
            continue
    return None
