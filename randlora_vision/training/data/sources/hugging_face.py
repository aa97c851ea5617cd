"""Hugging Face image datasets, by name or as written by `save_to_disk`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from randlora_vision.errors import one_line
from randlora_vision.names import listing
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.pictures import SkipList, StoredImage
from randlora_vision.training.data.sources.tables import Columns, find_columns, plain_labels
from randlora_vision.training.data.sources.torchvision import forbid_fetching
from randlora_vision.training.data.splits import Part

_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}


def is_saved_dataset(folder: Path) -> bool:
    """Return whether the folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def hf_parts(name: str, split: str | None, options: SourceOptions, skipped: SkipList) -> dict[str, Part]:
    """Open the splits of `NAME`, `NAME:CONFIG` or a folder written by `save_to_disk`, or only `split`.

    Rows whose class is missing (or -1) are skipped, and a split of only such rows is left out.

    Raises ValueError when the dataset, the split or a column does not exist or cannot be downloaded.
    """
    found = _open(name, options)
    if split is not None:
        if split not in found:
            raise ValueError(f"the dataset {name} has no split {split!r}; it has {listing(found, most=20)}")
        return {"train": _part(f"{name}@{split}", found[split], options, skipped)}
    if len(found) == 1:
        return {"train": _part(name, next(iter(found.values())), options, skipped)}
    ours = {_SPLITS[theirs]: dataset for theirs, dataset in found.items() if theirs in _SPLITS}
    if "train" not in ours:
        raise ValueError(
            f"the dataset {name} has no split called train, only {listing(found, most=20)}: append @SPLIT to choose one"
        )
    parts = {split: _part(f"the {split} split of {name}", found, options, skipped) for split, found in ours.items()}
    # A test split whose classes are not public cannot be used.
    return {split: part for split, part in parts.items() if part.images or split == "train"}


def _open(name: str, options: SourceOptions) -> Mapping[str, Any]:
    """Return the splits of a dataset by name."""
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
        hint = "" if options.download else "; --download allows downloading it"
        reason = one_line(str(error))[:300] or type(error).__name__
        raise ValueError(f"cannot open the dataset {name}: {reason}{hint}") from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _part(source: str, dataset: Any, options: SourceOptions, skipped: SkipList) -> Part:
    columns = _columns(dataset, options, source)
    pictures = dataset.select_columns([columns.image])
    images = [StoredImage(pictures, index, columns.image) for index in range(len(dataset))]
    if columns.caption:
        values = [() if value is None else value for value in dataset[columns.caption]]
        texts = [list(value) if isinstance(value, list | tuple) else [value] for value in values]
        if any(not isinstance(text, str) for captions in texts for text in captions):
            raise ValueError(f"{source}: the column {columns.caption!r} does not hold captions (--caption-column)")
        return Part(source, images, captions=texts)
    labels = list(dataset[columns.label])
    kept = [index for index, label in enumerate(labels) if label is not None and label != -1]
    for index in sorted(set(range(len(labels))) - set(kept)) if kept else ():
        skipped.add(f"{source}, row {index}", "it has no class")
    names = getattr(dataset.features[columns.label], "names", None)
    known = [labels[index] for index in kept]
    return Part(
        source,
        [images[index] for index in kept],
        known if names else plain_labels([str(label) for label in known]),
        class_names=names,
    )


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
