"""The data of the training scripts: one reader for every form of --data."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from randlora_vision.files.text import as_utf8
from randlora_vision.names import printable
from randlora_vision.training.data.captioned import class_captions
from randlora_vision.training.data.class_names import with_class_names
from randlora_vision.training.data.cleaning import cleaned
from randlora_vision.training.data.decode import parse_colour
from randlora_vision.training.data.duplicates import repeated
from randlora_vision.training.data.labelled import ImageSplits
from randlora_vision.training.data.options import DIGIT_PAIRS, DataOptions, SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources import digits
from randlora_vision.training.data.sources.caption_folder import caption_folder_part, caption_folders
from randlora_vision.training.data.sources.class_folders import class_folder_parts
from randlora_vision.training.data.sources.hugging_face import hf_parts, is_saved_dataset
from randlora_vision.training.data.sources.tables import TABLE_SUFFIXES, table_parts
from randlora_vision.training.data.sources.tar_shards import is_shards, shards_parts
from randlora_vision.training.data.sources.timm import timm_parts
from randlora_vision.training.data.sources.torchvision import torchvision_parts
from randlora_vision.training.data.splits import Splits, make_evaluation, make_splits, make_streamed, training_part
from randlora_vision.training.data.streaming import shard_stream

_REMOTE = ("http:", "https:", "s3:", "gs:", "gcs:", "hdfs:", "pipe:", "ftp:", "file:")


def read_data(options: DataOptions, skipped: SkipList, class_names: str | None = None) -> Splits:
    """Return the splits of --data, `train` cut as requested; raise ValueError or FileNotFoundError for the user."""
    if options.streaming:
        return _finished(_streamed(options, skipped), options, class_names)
    splits = _embedded(options) or _make_splits(_all_parts(options, skipped), options)
    return _with_repeats(training_part(_finished(splits, options, class_names), options))


def _with_repeats(splits: Splits) -> Splits:
    """Return the splits with a note of the held-out images that are training images too."""
    notes = [
        f"{count} of the {len(images)} {split} images are training images too (the same bytes)"
        for split, images in splits.images.items()
        if split != "train" and (count := repeated(splits.images["train"], images))
    ]
    return replace(splits, notes=(*splits.notes, *notes))


def _streamed(options: DataOptions, skipped: SkipList) -> Splits:
    splits, classes = make_streamed(_title(options.data or ""), _held_out(options, skipped))
    return replace(splits, stream=shard_stream(options, classes, skipped))


def read_evaluation(
    options: DataOptions, skipped: SkipList, class_names: str | None = None, wanted: str | None = None
) -> Splits:
    """Return the images of --data to evaluate on, as a single split: all of them unless the data has splits.

    `wanted` names a split: train, val, test or all. Raises as `read_data` does.
    """
    embedded = _embedded(options)
    if embedded is not None:
        return _only(embedded, wanted or "test")
    parts = _all_parts(options, skipped)
    if wanted in ("train", "val") and "val" not in parts:  # cut as in training
        splits = _only(_make_splits(parts, options), wanted)
    else:
        splits = make_evaluation(_title(options.data or ""), parts, wanted)
    return _finished(splits, options, class_names)


def _only(splits: Splits, wanted: str) -> Splits:
    if wanted not in splits.images:
        raise ValueError(f"--eval-split {wanted}: {splits.name} has {' and '.join(splits.images)}")
    places = {wanted: splits.all_places()[wanted]}
    return splits.recut(places, origin=f"the {wanted} split: {splits.origin}")


def _finished(splits: Splits, options: DataOptions, class_names: str | None) -> Splits:
    """Return the splits with their class names and background."""
    splits = replace(splits, background=parse_colour(options.background))
    if isinstance(splits, ImageSplits):
        return with_class_names(splits, class_names, options.data)
    if class_names:
        raise ValueError(f"--class-names: {options.data or 'the data'} has captions, not classes")
    return splits


def _embedded(options: DataOptions) -> Splits | None:
    if options.data == DIGIT_PAIRS:
        return class_captions(digits.read_digits(inverted=True), digits.TEMPLATES)
    return digits.read_digits(inverted=True) if options.data is None else None


def _make_splits(parts: Mapping[str, Part], options: DataOptions) -> Splits:
    return make_splits(_title(options.data or ""), parts, options.val_fraction, options.split_seed)


def _all_parts(options: DataOptions, skipped: SkipList) -> Mapping[str, Part]:
    assert options.data is not None
    parts = {split: cleaned(part, skipped) for split, part in _read_parts(options.data, options, skipped).items()}
    return {**parts, **_held_out(options, skipped)}


def _held_out(options: SourceOptions, skipped: SkipList) -> dict[str, Part]:
    parts = {}
    for split, spec, other in (("val", options.val_data, "test"), ("test", options.test_data, "val")):
        if spec is not None:
            found = _read_parts(spec, options, skipped)
            parts[split] = cleaned(found.get(split) or found.get(other) or found["train"], skipped)
    return parts


def _read_parts(spec: str, options: SourceOptions, skipped: SkipList) -> Mapping[str, Part]:
    scheme, _, name = spec.partition(":")
    path = Path(spec)
    if scheme == "timm":
        return timm_parts(name, options)
    if scheme in ("torchvision", "hf"):
        name, _, split = name.partition("@")
        if scheme == "hf":
            return hf_parts(name, split or None, options)
        return torchvision_parts(name, split or None, options)
    if spec.startswith(_REMOTE):
        raise ValueError(f"{spec}: data is read from disk only, except by --streaming; download it first")
    if path.suffix.lower() in TABLE_SUFFIXES:
        return table_parts(path, options, skipped)
    if is_shards(spec):
        return shards_parts(spec, options, skipped)
    if os.path.isfile(path):  # unlike Path's, it returns False for a name that is too long
        raise ValueError(f"--data {spec}: a file must be a .csv, a .tsv or a .tar")
    if is_saved_dataset(path):
        return hf_parts(spec, None, options)
    if captioned := caption_folders(path):
        return {split: caption_folder_part(folder, skipped) for split, folder in captioned.items()}
    return class_folder_parts(path, options, skipped)


def _title(spec: str) -> str:
    """Return a short name of a source, as it can be printed and written: its path without the parent folders."""
    scheme, _, name = spec.partition(":")
    return printable(as_utf8(name if scheme in ("torchvision", "timm", "hf") else Path(spec).name))
