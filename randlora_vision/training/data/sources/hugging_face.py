"""Hugging Face image datasets, by name or as written by `save_to_disk`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora_vision.names import listing
from randlora_vision.training.data.cleaning import clean_label
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import StoredImage
from randlora_vision.training.data.sources.tables import Columns, find_columns
from randlora_vision.training.data.sources.torchvision import forbid_fetching
from randlora_vision.training.data.split_names import split_of


def is_saved_dataset(folder: Path) -> bool:
    """Return whether the folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def hf_parts(name: str, split: str | None, options: SourceOptions) -> dict[str, Part]:
    """Open the splits of `NAME`, `NAME:CONFIG` or a folder written by `save_to_disk`, or only `split`.

    A held-out split without any class (all are missing or -1) is left out.

    Raises ValueError when the dataset, the split or a column does not exist or cannot be downloaded.
    """
    found = _open(name, options)
    if split is not None:
        if split not in found:
            raise ValueError(f"the dataset {name} has no split {split!r}; it has {listing(found, most=20)}")
        return {"train": _part(f"{name}@{split}", found[split], options)}
    if len(found) == 1:
        return {"train": _part(name, next(iter(found.values())), options)}
    ours = {ours: dataset for theirs, dataset in found.items() if (ours := split_of(theirs))}
    if "train" not in ours:
        raise ValueError(
            f"the dataset {name} has no split called train, only {listing(found, most=20)}: append @SPLIT to choose one"
        )
    parts = {split: _part(f"the {split} split of {name}", found, options) for split, found in ours.items()}
    # A test split whose classes are not public cannot be used.
    return {split: part for split, part in parts.items() if split == "train" or not _is_secret(part)}


def _is_secret(part: Part) -> bool:
    return part.labels is not None and not any(clean_label(label) for label in set(part.labels))


def _open(name: str, options: SourceOptions) -> Mapping[str, Any]:
    if not options.download:
        forbid_fetching()
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"the dataset {name} needs the package datasets: pip install datasets") from error
    try:
        if is_saved_dataset(Path(name)):
            found = datasets.load_from_disk(name)
        else:
            repository, _, config = name.partition(":")
            found = datasets.load_dataset(repository, config or None, cache_dir=options.data_root)
    except Exception as error:  # from any file reader or from the network
        raise options.cannot_open(f"the dataset {name}", error) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _part(source: str, dataset: Any, options: SourceOptions) -> Part:
    columns = _columns(dataset, options, source)
    images = stored_images(dataset, columns.image)
    if columns.caption:
        values = [() if value is None else value for value in dataset[columns.caption]]
        texts = [list(value) if isinstance(value, list | tuple) else [value] for value in values]
        if any(not isinstance(text, str | None) for captions in texts for text in captions):
            raise ValueError(f"{source}: the column {columns.caption!r} does not hold captions (--caption-column)")
        return Part(source, images, captions=texts)
    names = getattr(dataset.features[columns.label], "names", None)
    return Part(source, images, list(dataset[columns.label]), class_names=names)


def stored_images(dataset: Any, column: str) -> list[StoredImage]:
    """Return the images of a column of type Image, which stay encoded until they are read."""
    import datasets

    pictures = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return [StoredImage(pictures, index, column) for index in range(len(dataset))]


def _columns(dataset: Any, options: SourceOptions, source: str) -> Columns:
    """Return the columns of images and of captions or classes; by default the first column of type Image."""
    import datasets

    features = dataset.features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    chosen = options.image_column or image
    if image is None or not isinstance(features.get(chosen), datasets.Image):
        kinds = listing((f"{name} ({type(kind).__name__})" for name, kind in features.items()), most=20)
        raise ValueError(
            f"{source}: {f'{chosen!r} is not a column' if chosen else 'no column'} of images; it has {kinds}"
        )
    return find_columns(list(features), replace(options, image_column=chosen), source)
