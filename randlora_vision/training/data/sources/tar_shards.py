"""WebDataset shards: .tar files whose members with the same name up to the first dot form one sample.

The headers are read once, and only the offset of every image in its shard is kept. Images are then read directly
from the shards without unpacking them, in any order, so sharding and resuming are exact.
"""

import glob
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from randlora_vision.json_values import check_type, parse_json
from randlora_vision.names import listing
from randlora_vision.training.data.options import SourceOptions
from randlora_vision.training.data.pictures import SkipList, image_suffixes, read_image
from randlora_vision.training.data.sources.tables import CAPTIONS, LABELS, plain_labels
from randlora_vision.training.data.splits import Part

_BLOCK = 512  # bytes: everything in a .tar is padded to a multiple of this
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEXTS = ("txt", "json", "cls")


@dataclass(frozen=True)
class TarImage:
    """An image file inside a .tar: `size` bytes starting at `offset`."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> Image.Image:
        """Decode the image as RGB; raise OSError when that fails."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return read_image(io.BytesIO(file.read(self.size)))

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@dataclass
class _Sample:
    shard: Path
    key: str
    image: TarImage | None = None
    texts: dict[str, bytes] = field(default_factory=dict)  # by extension


def is_shard_folder(folder: Path) -> bool:
    """Return whether a folder holds shards; a folder with subfolders is one of class folders instead."""
    return any(folder.glob("*.tar")) and not any(path.is_dir() for path in folder.iterdir())


def shard_paths(pattern: str) -> list[Path]:
    """Return the shards that a path, a folder, {000..012} or a glob stands for, including missing ones.

    Raises ValueError when none of them exists.
    """
    if Path(pattern).is_dir():
        paths = sorted(Path(pattern).glob("*.tar"))
    else:
        spelled = list(_expand(pattern))
        paths = [Path(p) for name in spelled for p in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    if not any(path.is_file() for path in paths):
        raise ValueError(f"no shard found: {pattern}")
    return paths


def _expand(pattern: str) -> Iterator[str]:
    """Spell out every {first..last}, with as many digits as `first` has."""
    ranges = _RANGE.findall(pattern)
    fixed = _RANGE.split(pattern)[::3]
    counts = [[f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)] for first, last in ranges]
    for numbers in itertools.product(*counts):
        yield "".join(part for pair in zip(fixed, (*numbers, ""), strict=True) for part in pair)


def shards_part(pattern: str, options: SourceOptions, skipped: SkipList) -> Part:
    """Read what the shards hold: images with captions (.txt, or a key of .json) or classes (.cls, or a key).

    A shard that is missing or broken is recorded in `skipped`; the samples before the broken position are still
    used. Samples without an image, or without the caption (or class) that the others have, are recorded too.

    Raises ValueError when no sample has an image, or when no sample has a caption or class.
    """
    paths = shard_paths(pattern)
    samples = [sample for path in paths for sample in _read_shard(path, skipped)]
    source = f"{pattern} ({len(paths)} shards)" if len(paths) > 1 else pattern
    captions = [] if options.label_column else [_captions(sample, options.caption_column) for sample in samples]
    captioned = any(captions)
    words = captions if captioned else [_label(sample, options.label_column) for sample in samples]
    if not any(text and sample.image for sample, text in zip(samples, words, strict=True)):
        raise ValueError(f"{source}: {_what_lacks(samples, options)}")
    kept = []
    for sample, text in zip(samples, words, strict=True):
        if sample.image is None or not text:
            missing = "image" if sample.image is None else "caption" if captioned else "class"
            skipped.add(f"{sample.shard}:{sample.key}", f"the sample has no {missing}")
        else:
            kept.append((sample.image, text))
    images = [image for image, _ in kept]
    if captioned:
        return Part(source, images, captions=[text for _, text in kept])
    return Part(source, images, labels=plain_labels([text[0] for _, text in kept]))


def _captions(sample: _Sample, key: str | None) -> list[str]:
    """Return the captions of a sample: from that key of its .json, else its .txt, else a well-known key."""
    if key is None and "txt" in sample.texts:
        return [sample.texts["txt"].decode("utf-8", errors="replace")]
    value = _json_value(sample, CAPTIONS if key is None else (key,), str | list[str] | None)
    return value if isinstance(value, list) else [] if value is None else [value]


def _label(sample: _Sample, key: str | None) -> list[str]:
    """Return the class of a sample as a list, which is empty if it has none."""
    if key is None and "cls" in sample.texts:
        return [sample.texts["cls"].decode("utf-8", errors="replace").strip()]
    value = _json_value(sample, LABELS if key is None else (key,), str | int | None)
    return [] if value is None else [str(value)]


def _json_value(sample: _Sample, keys: Sequence[str], kind: Any) -> Any:
    """Return the value of the first of the keys that is given; None, which is recorded, if its type is wrong."""
    values = _json(sample)
    key = next((key for key in keys if values.get(key) is not None), None)
    try:
        return None if key is None else check_type(values[key], kind, sample.key, key)
    except ValueError:
        return None


def _json(sample: _Sample) -> Mapping[str, Any]:
    try:
        values: dict[str, Any] = check_type(parse_json(sample.texts.get("json", b"{}"), sample.key), dict, sample.key)
    except ValueError:  # then the caption or class is missing, which is recorded
        return {}
    return values


def _what_lacks(samples: Sequence[_Sample], options: SourceOptions) -> str:
    """Return a message that says what was expected and what was found."""
    if not any(sample.image for sample in samples):
        return f"no images in {len(samples)} samples; expected members such as 000.jpg beside 000.txt"
    key = options.label_column or options.caption_column
    wanted = f"{key!r} in its .json" if key else "a caption (.txt, .json) or a class (.cls, .json)"
    extensions = sorted({extension for sample in samples for extension in sample.texts})
    keys = sorted({key for sample in samples for key in _json(sample)})
    return (
        f"no sample has {wanted}; apart from images there are "
        + (listing(f".{extension}" for extension in extensions) or "no text files")
        + (f", and in .json the keys {listing(keys, most=20)}" if keys else "")
    )


def _read_shard(path: Path, skipped: SkipList) -> Iterator[_Sample]:
    """Yield the samples of a shard: consecutive members with the same folder and name up to the first dot."""
    sample: _Sample | None = None
    for name, extension, offset, size, text in _members(path, skipped):
        if sample is None or sample.key != name:
            if sample is not None:
                yield sample
            sample = _Sample(path, name)
        if text is not None:
            sample.texts[extension] = text
        elif sample.image is None:
            sample.image = TarImage(path, f"{name}.{extension}", offset, size)
    if sample is not None:
        yield sample


def _members(path: Path, skipped: SkipList) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """Yield name, extension, offset and size of images and texts, and the bytes of texts."""
    end = 0
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as tar:  # not compressed, since a compressed one cannot be read from the middle
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                extension = extension.lower()
                name = f"{folder}/{stem}" if folder else stem
                content = tar.extractfile(member) if extension in _TEXTS and member.isfile() else None
                if content is not None:
                    yield name, extension, member.offset_data, member.size, content.read()
                elif member.isfile() and f".{extension}" in image_suffixes():
                    yield name, extension, member.offset_data, member.size, None
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
        _check_end(path, end)
    except (OSError, tarfile.TarError) as error:
        skipped.add(str(path), f"the shard cannot be read{f' after byte {end}' if end else ''}: {error}")


def _check_end(path: Path, end: int) -> None:
    """Raise ReadError unless the archive ends at `end`, since tarfile treats a broken header as its end."""
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise tarfile.ReadError("no valid header there")
