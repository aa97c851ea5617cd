"""Datasets of torchvision, and other map-style datasets."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora_vision.errors import one_line, reason_of
from randlora_vision.names import close_matches
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import StoredImage

_LABELS = ("targets", "labels", "_labels", "y")  # attributes in which torchvision's datasets keep them


def labels_of(dataset: Any) -> list[int]:
    """Return every label, without decoding images if the dataset has a list of labels."""
    reader: Any = getattr(dataset, "reader", None)  # timm's
    if (files := files_of(dataset)) is not None:
        return [int(label) for _, label in files]
    samples = getattr(dataset, "_samples", None)  # of GTSRB and others: files with labels
    if samples is not None and all(isinstance(sample, tuple) and len(sample) == 2 for sample in samples):
        return [int(label) for _, label in samples]
    if hasattr(reader, "label_key"):
        return [int(label) for label in reader.dataset[reader.label_key]]
    for name in _LABELS:
        found = getattr(dataset, name, None)
        if found is not None:
            return [int(label) for label in found]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def class_names_of(dataset: Any) -> list[str] | None:
    """Return the class names, the first of several names of a class, or None if the dataset has no names."""
    reader: Any = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if classes is None and hasattr(reader, "label_key"):
        classes = getattr(reader.dataset.features[reader.label_key], "names", None)
    if classes is None and getattr(reader, "class_to_idx", None):
        classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    if not classes:
        return None
    return [str(name[0] if isinstance(name, tuple) else name) for name in classes]


def stored_images(dataset: Any, count: int) -> list[StoredImage]:
    """Return the images of a dataset; those that are files are opened as such, because datasets decode them otherwise.

    Most datasets of files convert images to RGB themselves, which ignores orientation, transparency and depth.
    """
    items = getattr(dataset, "reader", dataset)  # if timm cannot read an image, its __getitem__ returns the next one
    for name in ("samples", "_samples", "imgs", "_image_files", "_images", "_files"):
        found = getattr(dataset, name, None) or getattr(items, name, None)
        files = [item[0] if isinstance(item, tuple) else item for item in found] if isinstance(found, list) else []
        if len(files) == count and all(isinstance(file, str | os.PathLike) for file in files):
            return [StoredImage(items, index, file=Path(file)) for index, file in enumerate(files)]
    return [StoredImage(items, index) for index in range(count)]


def files_of(dataset: Any) -> Any:
    """Return the (file, label) pairs of a dataset of files, else None."""
    return getattr(dataset, "samples", getattr(getattr(dataset, "reader", None), "samples", None))


def forbid_fetching() -> None:
    """Keep Hugging Face's `datasets` offline; this has no effect once it is imported."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"


_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}


class _NoSplit(ValueError):
    """The dataset has no split of that name."""


def torchvision_parts(name: str, split: str | None, options: SourceOptions) -> dict[str, Part]:
    """Open a dataset's own splits, or only the one that torchvision calls `split`.

    Raises ValueError when there is no such dataset or split, when its files are missing (or cannot be
    downloaded), or when its images do not have one class each.
    """
    from torchvision import datasets

    if name not in datasets.__all__:
        hint = close_matches(name, datasets.__all__)
        raise ValueError(f"torchvision has no dataset {name!r}{hint and f'; {hint}'}")
    parameters = inspect.signature(getattr(datasets, name).__init__).parameters
    if split is not None:
        return {"train": _part(f"{name}@{split}", _open(name, _chosen(name, split, parameters), options))}
    parts = {}
    for ours, choices in _own_splits(parameters).items():
        for arguments in choices:
            try:
                parts[ours] = _part(f"the {ours} split of {name}", _open(name, arguments, options))
                break
            except _NoSplit:
                continue
    if "train" not in parts:
        raise ValueError(f"torchvision's {name} has no training split: choose a split, as in torchvision:{name}@SPLIT")
    return parts


def _chosen(name: str, split: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that open the split that torchvision calls `split`."""
    if "train" in parameters and split in ("train", "test"):
        return {"train": split == "train"}
    if "split" in parameters:
        return {"split": split}
    theirs = "train and test" if "train" in parameters else "none"
    raise ValueError(f"torchvision's {name} has no split {split!r}; its splits: {theirs}")


def _own_splits(parameters: Mapping[str, Any]) -> Mapping[str, Sequence[dict[str, Any]]]:
    if "train" in parameters:
        return {"train": [{"train": True}], "test": [{"train": False}]}
    if "split" in parameters:
        return {ours: [{"split": theirs} for theirs in names] for ours, names in _SPLITS.items()}
    return {"train": [{}]}


def _open(name: str, arguments: dict[str, Any], options: SourceOptions) -> Any:
    from torchvision import datasets

    parameters = inspect.signature(getattr(datasets, name).__init__).parameters
    if "root" in parameters:
        if options.data_root is None:
            raise ValueError(f"torchvision:{name} needs --data-root, the folder where torchvision keeps its files")
        arguments = {**arguments, "root": options.data_root}
    if "download" in parameters:
        arguments = {**arguments, "download": options.download}
    try:
        return getattr(datasets, name)(**arguments)
    except Exception as error:  # from any file reader or from the network
        if isinstance(error, ValueError) and "Valid values are" in str(error):
            raise _NoSplit(f"torchvision's {name}: {reason_of(error)}") from error
        raise options.cannot_open(f"torchvision's {name} in {options.data_root}", error) from error


def _part(source: str, dataset: Any) -> Part:
    try:
        labels = labels_of(dataset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} is not a dataset of images with one class each: {one_line(str(error))}") from error
    return Part(source, stored_images(dataset, len(labels)), labels, class_names=class_names_of(dataset))
