"""WebDataset shards: which files they are, their splits, and the captions or classes of their samples."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora_vision.json_values import check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.data.cleaning import clean_caption
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.part import Part
from randlora_vision.training.data.pictures import has_images, is_hidden, subfolders
from randlora_vision.training.data.skipped import SkipList
from randlora_vision.training.data.sources.tables import CAPTIONS, LABELS
from randlora_vision.training.data.sources.tar_index import indexed_shard
from randlora_vision.training.data.sources.tar_members import Sample
from randlora_vision.training.data.split_names import split_in, split_of

_BRACES = re.compile(r"\{(?:([^{},]+(?:,[^{},]+)+)|(\d+)\.\.(\d+))\}")
_SUFFIXES = (
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
)  # compressed ones are refused with the reason


def is_shards(spec: str) -> bool:
    """Return whether `spec` names shards: files by their suffix, or a folder of some without class folders."""
    path = Path(spec)
    if os.path.isdir(path):  # unlike Path's, it returns False for a long list of shards
        return bool(
            _shards_in(path) or any(_shards_in(folder) for folder in _split_folders(path).values())
        ) and not any(has_images(folder) for folder in subfolders(path))
    return all(_is_shard_name(name) for name in split_spec(spec))


def split_spec(spec: str) -> list[str]:
    """Return the parts of a.tar::b.tar; the colons of an IPv6 address separate nothing."""
    return re.split(r"::(?![0-9a-fA-F:.]*\])", spec)


def _is_shard_name(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_shard_name(path.name) and not is_hidden(path.name))


def _split_folders(folder: Path) -> dict[str, Path]:
    return {split: path for path in subfolders(folder) if (split := split_of(path.name)) and _shards_in(path)}


def expand(pattern: str) -> list[str]:
    """Spell out every {first..last}, with as many digits as `first` has, and every {one,other}."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    words, first, last = match[1], match[2], match[3]
    choices = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in choices for path in expand(f"{before}{choice}{after}")]


def shard_paths(pattern: str) -> list[Path]:
    """Return the shards that a path, {000..012}, {a,b}, a glob or several of these joined by :: stand for.

    Missing files are included, except those of a glob; a name that exists is never a pattern. Raises ValueError when
    none of them exists.
    """
    spelled = [name for part in split_spec(pattern) for name in ([part] if os.path.exists(part) else expand(part))]
    is_pattern = {name: glob.has_magic(name) and not os.path.exists(name) for name in spelled}
    paths = [Path(path) for name in spelled for path in (sorted(glob.glob(name)) if is_pattern[name] else [name])]
    if not any(map(os.path.isfile, paths)):
        there = next(filter(os.path.exists, paths), None)
        raise ValueError(f"no shard found: {pattern}" if there is None else f"{there} is not a regular file")
    return list(dict.fromkeys(paths))  # an image that is read twice could be both trained on and held out


def shards_parts(spec: str, options: SourceOptions, skipped: SkipList) -> dict[str, Part]:
    """Read shards as the splits their folders or files are named after, else all as train; raises as `shards_part`."""
    groups = shard_groups(spec, skipped)
    return {
        split: shards_part(spec if len(groups) == 1 else f"{spec} ({split})", paths, options, skipped)
        for split, paths in groups.items()
    }


def shard_groups(spec: str, skipped: SkipList) -> dict[str, list[Path]]:
    """Return the shards of each split."""
    folder = Path(spec)
    if not folder.is_dir():
        return {"train": shard_paths(spec)}
    named = _split_folders(folder)
    groups = {split: _shards_in(path) for split, path in named.items()}
    if groups:
        for path in (*_shards_in(folder), *subfolders(folder)):
            if path not in named.values():
                skipped.add(str(path), "it is in none of the folders that are named after splits")
    else:
        for path in _shards_in(folder):
            groups.setdefault(split_in(path.name) or "", []).append(path)
        if "train" not in groups or len(groups) == 1:
            groups = {"train": _shards_in(folder)}
        for path in groups.pop("", []):
            skipped.add(str(path), "the names of the other shards begin with their split, but this one does not")
    return groups


def shards_part(name: str, paths: Sequence[Path], options: SourceOptions, skipped: SkipList) -> Part:
    """Read what the shards hold: images with captions (.txt, or a key of .json) or classes (.cls, or a key).

    A shard that is missing or broken is recorded in `skipped`; the samples before the broken position are still
    used. Samples without an image, or without the caption (or class) that the others have, are recorded too.

    Raises ValueError when no sample has an image, or when no sample has a caption or class.
    """
    source = f"{name} ({len(paths)} shards)" if len(paths) > 1 else name
    samples: list[Sample] = []
    reasons = []
    for path in paths:
        found, reason = indexed_shard(path)
        samples += found
        if reason is not None:
            reasons.append(f"the shard cannot be read{' ' if reason.startswith('after byte') else ': '}{reason}")
            skipped.add(str(path), reasons[-1])
    if reasons and not samples:
        raise ValueError(f"{source}: {reasons[0]}")
    captioned = not options.label_column and any(_captions(sample, options.caption_column) for sample in samples)
    part = samples_part(source, samples, captioned, options, skipped)
    if not part.images:
        raise ValueError(f"{source}: {_what_lacks(samples, options)}")
    return part


def samples_part(
    source: str, samples: Sequence[Sample], captioned: bool, options: SourceOptions, skipped: SkipList, hint: str = ""
) -> Part:
    """Return images with captions, or else classes; record samples that lack one, with `hint` after the reason."""
    images, words = [], []
    for sample in samples:
        text = _captions(sample, options.caption_column) if captioned else _label(sample, options.label_column)
        if sample.image is None or not text:
            missing = "image" if sample.image is None else "caption" if captioned else "class"
            why = "; ".join([f"the sample has no {missing}{hint}", *sample.unreadable])
            skipped.add(f"{sample.shard}:{sample.key}", why)
        else:
            images.append(sample.image)
            words.append(text)
    if captioned:
        return Part(source, images, captions=words)
    return Part(source, images, labels=[text[0] for text in words])


def _captions(sample: Sample, key: str | None) -> list[str]:
    """Return the captions of a sample: from that key of its .json, else its .txt, else a well-known key."""
    for extension in ("txt", "caption") if key is None else ():
        if (caption := clean_caption(sample.texts.get(extension))) or extension in sample.texts:
            return [caption]
    value = _json_value(sample, CAPTIONS if key is None else (key,), str | list[str] | None)
    return value if isinstance(value, list) else [] if value is None else [value]


def _label(sample: Sample, key: str | None) -> list[str]:
    """Return the class of a sample as a list, which is empty if it has none."""
    if key is None and "cls" in sample.texts:
        return [sample.texts["cls"]]
    value = _json_value(sample, LABELS if key is None else (key,), str | float | None)
    return [] if value is None else [str(value)]


def _json_value(sample: Sample, keys: Sequence[str], kind: Any) -> Any:
    """Return the value of the first of the keys that is given; None, which is recorded, if its type is wrong."""
    values = _json(sample)
    key = next((key for key in keys if values.get(key) is not None), None)
    try:
        return None if key is None else check_type(values[key], kind, sample.key, key)
    except ValueError:
        return None


def _json(sample: Sample) -> Mapping[str, Any]:
    try:
        values: dict[str, Any] = check_type(parse_json(sample.texts.get("json", "{}"), sample.key), dict, sample.key)
    except ValueError:  # then the caption or class is missing, which is recorded
        return {}
    return values


def _what_lacks(samples: Sequence[Sample], options: SourceOptions) -> str:
    """Return a message that says what was expected and what was found."""
    if not any(sample.image for sample in samples):
        expected = "expected members such as 000.jpg beside 000.txt (a name ends at the first dot)"
        return f"no images in {len(samples)} samples; {expected}"
    key = options.label_column or options.caption_column
    wanted = f"{key!r} in its .json" if key else "a caption (.txt, .json) or a class (.cls, .json)"
    return f"no sample has {wanted}; {what_is_there(samples)}"


def what_is_there(samples: Sequence[Sample]) -> str:
    """Return a message that says which texts were found."""
    extensions = sorted({extension for sample in samples for extension in sample.texts})
    keys = sorted({key for sample in samples for key in _json(sample)})
    return (
        "apart from images there are "
        + (listing(f".{extension}" for extension in extensions) or "no text files")
        + (f", and in .json the keys {listing(keys, most=20)}" if keys else "")
    )
