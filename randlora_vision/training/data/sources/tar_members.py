"""One WebDataset shard: a .tar whose members with the same name up to the first dot form a sample.

The headers are read once, and only the offset of every image in its shard is kept. Images are then read directly
from the shards without unpacking them, in any order, so sharding and resuming are exact. (`tar_stream` reads a shard
from its beginning to its end instead.)
"""

import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from randlora_vision.files.text import decode_text, require_regular
from randlora_vision.training.data.pictures import Readable, image_suffixes, is_hidden

_BLOCK = 512  # bytes: everything in a .tar is padded to a multiple of this
_TEXTS = ("txt", "caption", "json", "cls")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarImage:
    """An image file inside a .tar: `size` bytes starting at `offset`."""

    shard: Path
    name: str
    offset: int
    size: int

    def open(self) -> Image.Image:
        """Open the image for decoding."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return Image.open(io.BytesIO(file.read(self.size)))

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@dataclass
class Sample:
    """What belongs together in a shard."""

    shard: Path | str
    key: str
    image: Readable | None = None
    texts: dict[str, str] = field(default_factory=dict)  # by extension
    seen: set[str] = field(default_factory=set)  # extensions
    unreadable: list[str] = field(default_factory=list)  # why a text could not be read

    def add(self, extension: str, content: Readable | bytes) -> None:
        """Add an image (the first one stays) or the bytes of a text."""
        self.seen.add(extension)
        if not isinstance(content, bytes):
            self.image = self.image or content
            return
        try:
            self.texts[extension] = decode_text(content, f"its .{extension}")
        except ValueError as error:
            self.unreadable.append(str(error))


_Member = tuple[str, str, Readable | bytes]  # name, extension, and an image or the bytes of a text


def read_shard(path: Path) -> tuple[list[Sample], str | None]:
    """Return the samples of a shard in the order of their first members, and why its rest cannot be read, if so.

    A sample consists of members with the same folder and name, wherever they are in the shard. Where images and texts
    are in different folders, those of the same name belong together.
    """
    samples: list[Sample] = []
    current: dict[str, Sample] = {}
    reason = None
    try:
        for member in _members(path):
            _add(*member, path, samples, current)
    except (OSError, tarfile.TarError) as error:
        reason = str(error)
    return _joined(samples), reason


def _add(
    name: str,
    extension: str,
    content: Readable | bytes,
    path: Path,
    samples: list[Sample],
    current: dict[str, Sample],
) -> None:
    """Add a member to the sample of its name, or to a new one if there is none or it has such a member already."""
    sample = current.get(name)
    if sample is None or extension in sample.seen:
        sample = current[name] = Sample(path, name)
        samples.append(sample)
    sample.add(extension, content)


def _joined(samples: Sequence[Sample]) -> list[Sample]:
    """Join samples that have only an image with those of the same name, in another folder, that have only texts."""
    texts: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.image is None:
            texts.setdefault(sample.key.rpartition("/")[2], []).append(sample)
    joined = set()
    for sample in samples:
        others = texts.get(sample.key.rpartition("/")[2], ())
        if sample.image is not None and not sample.texts and len(others) == 1:
            joined.add(id(others[0]))
            sample.texts, sample.unreadable = others[0].texts, others[0].unreadable
    return [sample for sample in samples if id(sample) not in joined]


def _members(path: Path) -> Iterator[_Member]:
    """Yield the images and texts of a shard; raise OSError or TarError where it cannot be read."""
    require_regular(path)
    _check_uncompressed(path)
    length = path.stat().st_size
    end = 0
    with tarfile.open(path, "r:") as tar:
        try:
            for member in tar:
                end = member.offset_data + math.ceil(member.size / _BLOCK) * _BLOCK
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                for name, extension, is_image in wanted(member):
                    image = TarImage(path, f"{name}.{extension}", member.offset_data, member.size)
                    yield name, extension, image if is_image else content_of(tar, member)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
            _check_end(path, end)
        except (OSError, tarfile.TarError) as error:
            raise tarfile.ReadError(f"after byte {end}: {error}" if end else str(error)) from error


def wanted(member: tarfile.TarInfo) -> Iterator[tuple[str, str, bool]]:
    """Yield the name of a member's sample, its extension and whether it is an image; nothing for other files."""
    if not member.isfile() or any(is_hidden(part) for part in member.name.split("/") if part != "."):
        return
    folder, _, file = member.name.rpartition("/")
    stem, _, extension = file.partition(".")
    extension = extension.lower()
    is_image = f".{extension}" in image_suffixes()
    if is_image or extension in _TEXTS:
        yield f"{folder}/{stem}" if folder else stem, extension, is_image


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a regular file."""
    file = tar.extractfile(member)
    assert file is not None, "wanted() returns only regular files"
    return file.read()


def _check_uncompressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(6)
    kind = next((kind for mark, kind in COMPRESSIONS.items() if start.startswith(mark)), None)
    if kind is not None:
        raise tarfile.ReadError(
            f"it is compressed by {kind}, but images are read from its middle: decompress it, or read it in order with "
            "--streaming"
        )


def _check_end(path: Path, end: int) -> None:
    """Raise ReadError unless the end mark, zeros, is at `end` and last: tarfile takes any fault for the end."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
        if any(block):
            raise tarfile.ReadError("no valid header there")
        if len(block) < _BLOCK:
            raise tarfile.ReadError("the mark of its end is missing: the file was cut between two members")
        while block := file.read(1 << 20):
            if any(block):
                raise tarfile.ReadError("more data follows its end: are these several archives in one file?")
