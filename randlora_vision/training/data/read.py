"""The data of train_clip.py: one reader for every form of --data."""

from pathlib import Path

from randlora_vision.training.data.captioned import PairSplits, class_captions
from randlora_vision.training.data.class_names import with_class_names
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.options import DIGIT_PAIRS, DataOptions, SourceOptions
from randlora_vision.training.data.pictures import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.sources.class_folders import class_folder_parts
from randlora_vision.training.data.sources.hugging_face import hf_parts, is_saved_dataset
from randlora_vision.training.data.sources.tables import TABLE_SUFFIXES, table_part
from randlora_vision.training.data.sources.tar_shards import is_shard_folder, shards_part
from randlora_vision.training.data.sources.timm import timm_parts
from randlora_vision.training.data.sources.torchvision import torchvision_parts
from randlora_vision.training.data.splits import Part, make_splits, training_part, without_empty_captions

_REMOTE = ("http:", "https:", "s3:", "gs:", "gcs:", "hdfs:", "pipe:", "ftp:", "file:")


def read_data(options: DataOptions, skipped: SkipList, class_names: str | None = None) -> ImageSplits | PairSplits:
    """Return the splits of --data, with the requested part of `train`, validation data and class names.

    Data with captions gives `PairSplits`; data with classes gives `ImageSplits`.

    Raises ValueError or FileNotFoundError, with a message for the user, when the data cannot be used as requested.
    """
    splits = _read_splits(options, skipped)
    if isinstance(splits, ImageSplits):
        splits = with_class_names(splits, class_names)
    elif class_names:
        raise ValueError(f"--class-names: {options.data or 'the data'} has captions, not classes")
    return training_part(splits, options)


def _read_splits(options: DataOptions, skipped: SkipList) -> ImageSplits | PairSplits:
    if options.data is None:
        return digits.read_digits(inverted=True)
    if options.data == DIGIT_PAIRS:
        return class_captions(digits.read_digits(inverted=True), digits.TEMPLATES)
    parts = _read_parts(options.data, options, skipped)
    if options.val_data is not None:
        found = _read_parts(options.val_data, options, skipped)
        parts["val"] = found.get("val") or found.get("test") or found["train"]
    parts = {split: without_empty_captions(part, skipped) for split, part in parts.items()}
    return make_splits(_title(options.data), parts, options.val_fraction, options.split_seed)


def _read_parts(spec: str, options: SourceOptions, skipped: SkipList) -> dict[str, Part]:
    """Read one source, named as on the command line."""
    scheme, _, name = spec.partition(":")
    path = Path(spec)
    if scheme == "timm":
        return timm_parts(name, options)
    if scheme in ("torchvision", "hf"):
        name, _, split = name.partition("@")
        if scheme == "hf":
            return hf_parts(name, split or None, options, skipped)
        return torchvision_parts(name, split or None, options)
    if spec.startswith(_REMOTE):
        raise ValueError(f"--data {spec}: data is read from disk only; download it first")
    if path.suffix in TABLE_SUFFIXES:
        return {"train": table_part(path, options, skipped)}
    if path.suffix == ".tar" or (path.is_dir() and is_shard_folder(path)):
        return {"train": shards_part(spec, options, skipped)}
    if path.is_file():
        raise ValueError(f"--data {spec}: a file must be a .csv, a .tsv or a .tar")
    if is_saved_dataset(path):
        return hf_parts(spec, None, options, skipped)
    return class_folder_parts(path, skipped)


def _title(spec: str) -> str:
    """Return a short name of a source: its path without the parent folders."""
    scheme, _, name = spec.partition(":")
    return name if scheme in ("torchvision", "timm", "hf") else Path(spec).name
