"""Datasets that timm opens by name: of torchvision, of Hugging Face, and its own."""

from typing import Any

from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.sources.torchvision import (
    class_names_of,
    files_of,
    forbid_fetching,
    labels_of,
    stored_images,
)

_HELD_OUT = ("validation", "test")


def timm_parts(name: str, options: SourceOptions) -> dict[str, Part]:
    """Open a dataset by its timm name: ``torch/cifar10``, ``hfds/ORG/NAME``.

    Raises ValueError if the dataset is unknown, is not on disk and may not be downloaded, or needs a package that is
    not installed.
    """
    scheme = name.partition("/")[0]
    if scheme == "torch" and options.data_root is None:
        raise ValueError(f"timm:{name} needs --data-root, the folder where torchvision keeps its files")
    if scheme == "hfds" and not options.download:
        forbid_fetching()
    train, test = _open(name, "train", options), _open_test(name, options)
    if test is not None and (own := files_of(test)) is not None and own == files_of(train):
        test = None  # folders without splits: timm and torchvision return the same files for every split
    parts = {"train": _part(f"the dataset {name}", train)}
    if test is not None:
        parts["test"] = _part(f"the test split of {name}", test)
    return parts


def _part(source: str, dataset: Any) -> Part:
    labels = labels_of(dataset)
    return Part(source, stored_images(dataset, len(labels)), labels, class_names=class_names_of(dataset))


def _open(name: str, split: str, options: SourceOptions) -> Any:
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=options.data_root, split=split, download=options.download)
        len(dataset)
    except ModuleNotFoundError as error:
        raise ValueError(f"timm:{name} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # from any dataset library, assertions included
        raise options.cannot_open(f"the split {split!r} of timm:{name}", error) from error
    return dataset


def _open_test(name: str, options: SourceOptions) -> Any:
    """Return the split to test on, or None if there is none."""
    for split in reversed(_HELD_OUT):
        try:
            return _open(name, split, options)
        except ValueError:
            continue
    return None
