"""Datasets of other libraries that are asked for their items one by one: their labels and classes."""

import os
from collections.abc import Sequence
from typing import Any

_LABELS = ("targets", "labels", "_labels", "y")  # where torchvision's datasets keep them


def labels_of(dataset: Any) -> list[int]:
    """Return every label, without decoding an image where the dataset has a list of them."""
    reader: Any = getattr(dataset, "reader", None)  # timm's
    if (files := files_of(dataset)) is not None:
        return [int(label) for _, label in files]
    if hasattr(reader, "label_key"):
        return [int(label) for label in reader.dataset[reader.label_key]]
    for name in _LABELS:
        found = getattr(dataset, name, None)
        if found is not None:
            return [int(label) for label in found]
    return [int(dataset[index][1]) for index in range(len(dataset))]


def class_names_of(dataset: Any, labels: Sequence[int]) -> list[str]:
    """Return the names of the classes, numbers where the dataset has none; the first of several names of one."""
    reader: Any = getattr(dataset, "reader", None)
    classes = getattr(dataset, "classes", None)
    if classes is None and hasattr(reader, "label_key"):
        classes = getattr(reader.dataset.features[reader.label_key], "names", None)
    if classes is None and getattr(reader, "class_to_idx", None):
        classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    if not classes:
        return [str(number) for number in range(max(labels) + 1)]
    return [str(name[0] if isinstance(name, tuple) else name) for name in classes]


def files_of(dataset: Any) -> Any:
    """Return the (file, label) pairs of a dataset that is a list of files, else None."""
    return getattr(dataset, "samples", getattr(getattr(dataset, "reader", None), "samples", None))


def forbid_fetching() -> None:
    """Keep Hugging Face's `datasets` from the network; without effect once it is imported."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
