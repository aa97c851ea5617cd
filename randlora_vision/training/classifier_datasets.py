"""Datasets by timm's name: torchvision's (torch/cifar10) and Hugging Face's (hfds/ORG/NAME)."""

import os
from collections.abc import Sequence
from typing import Any

from randlora_vision.training.class_folders import hold_out
from randlora_vision.training.classifier_options import DataOptions
from randlora_vision.training.errors import one_line
from randlora_vision.training.images import ImageSplits, StoredImage

_HELD_OUT = ("validation", "test")
_LABELS = ("targets", "labels", "_labels")  # where torchvision's datasets keep them


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
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # which `datasets` reads when it is imported
    train, test = _open(data, name, "train"), _open_test(data, name)
    if test is not None and (own := _files(test)) is not None and own == _files(train):
        test = None  # folders without splits: timm and torchvision answer with the same files again
    labels = _labels(train)
    names = _class_names(train, labels)
    if test is not None and (others := _class_names(test, labels)) != names:
        raise ValueError(f"the splits of --dataset {name} have different classes: {len(names)} and {len(others)}")
    if len(set(labels)) < 2:
        raise ValueError(f"only one class in the dataset {name}: classification needs two or more")
    items = [StoredImage(train, index) for index in range(len(labels))]
    images, held = hold_out(items, labels, names, data.val_fraction, data.split_seed)
    images["test"], held["test"] = images["val"], held["val"]
    if test is not None:
        held["test"] = _labels(test)
        images["test"] = [StoredImage(test, index) for index in range(len(held["test"]))]
    origin = f"its own test split, fraction {data.val_fraction} for validation" if test is not None else "no test split"
    return ImageSplits(name, names, images, held, f"{origin}, seed {data.split_seed}")


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


def _files(dataset: Any) -> Any:
    """Return the (file, label) pairs of a dataset that is a list of files, else None."""
    return getattr(dataset, "samples", getattr(getattr(dataset, "reader", None), "samples", None))


def _labels(dataset: Any) -> list[int]:
    """Return every label, without decoding an image where the dataset has a list of them."""
    reader: Any = getattr(dataset, "reader", None)
    if (files := _files(dataset)) is not None:
        return [int(label) for _, label in files]
    if hasattr(reader, "label_key"):
        return [int(label) for label in reader.dataset[reader.label_key]]
    for name in _LABELS:
        found = getattr(dataset, name, None)
        if found is not None:
            return [int(label) for label in found]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def _class_names(dataset: Any, labels: Sequence[int]) -> list[str]:
    """Return the names of the classes, numbers where the dataset has none."""
    reader: Any = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None)
    if classes is None and hasattr(reader, "label_key"):
        classes = getattr(reader.dataset.features[reader.label_key], "names", None)
    if classes is None and getattr(reader, "class_to_idx", None):
        classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    return [str(name) for name in classes] if classes else [str(number) for number in range(max(labels) + 1)]
