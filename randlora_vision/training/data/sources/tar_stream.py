"""One WebDataset shard, read from its beginning to its end: from disk or from any URL, compressed or not.

By hand, because tarfile, and with it webdataset, may take a shard that is cut off for a shorter one.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from randlora_vision.errors import reason_of
from randlora_vision.files.text import require_regular
from randlora_vision.training.data.sources.tar_members import COMPRESSIONS, Sample, content_of, wanted

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)  # two letters or more: C: is a drive

_NOT_READ = (23, 141, -13)  # exit codes of curl, of a shell and of other programs whose output is not read to its end


def is_url(name: str) -> bool:
    """Return whether a shard is named by a URL, such as s3://bucket/000.tar or pipe:COMMAND."""
    return _SCHEME.match(name) is not None


@dataclass(frozen=True)
class StreamedImage:
    """An image file that was read from a shard."""

    shard: str
    name: str
    content: bytes

    def open(self) -> Image.Image:
        """Open the image for decoding."""
        return Image.open(io.BytesIO(self.content))

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


def require_webdataset() -> None:
    """Raise ValueError if the library is not installed."""
    try:
        import webdataset  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("--streaming needs the package webdataset: pip install webdataset") from error


def stream_shard(url: str) -> Iterator[Sample]:
    """Yield the adjacent samples of a shard; raise OSError, after those before that place, where it cannot be read."""
    stream: Any = None
    try:
        stream = _open(url)
        yield from _grouped(url, _members(stream))
    except Exception as error:  # from any library that uses the network or decompresses
        reason = _ended(stream) or reason_of(error)
        raise OSError(reason) from error
    finally:
        with contextlib.suppress(Exception):  # a program whose output is not read to its end fails
            if stream is not None:
                stream.close()


def _ended(stream: Any) -> str:
    """Return why the program that fetches a shard has failed, if it has."""
    program = getattr(stream, "proc", None)
    if program is None:
        return ""
    with contextlib.suppress(Exception):
        stream.close()
    words = program.args if isinstance(program.args, str) else program.args[0]
    failed = program.returncode not in (0, *_NOT_READ)
    return f"{words} ended with exit code {program.returncode}" if failed else ""


def _open(url: str) -> _Stream:
    """Open a file, or a URL with webdataset, or else with fsspec."""
    if not is_url(url):
        require_regular(Path(url))
        return open(url, "rb")
    from webdataset.gopen import gopen, gopen_schemes

    scheme = url.partition(":")[0].lower()
    if scheme == "file" or (scheme in gopen_schemes and (scheme != "gs" or shutil.which("gsutil"))):
        return gopen(url, "rb")
    import fsspec

    return fsspec.open(url, "rb").open()


class _Rewound:
    """A stream of which the first bytes have been read."""

    def __init__(self, start: bytes, stream: _Stream) -> None:
        self.start = start
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        start, self.start = (self.start, b"") if size < 0 else (self.start[:size], self.start[size:])
        return start or self.stream.read(size)


def _decompressed(stream: _Stream) -> Any:
    start = b""
    while len(start) < 6 and (more := stream.read(6 - len(start))):
        start += more
    whole: Any = _Rewound(start, stream)
    kind = next((kind for mark, kind in COMPRESSIONS.items() if start.startswith(mark)), None)
    return whole if kind is None else _DECOMPRESSED[kind](whole)


def _zstd(stream: Any) -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise OSError("it is compressed by zstd: pip install zstandard") from error
        return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    return zstd.open(stream)


_DECOMPRESSED: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
    "bzip2": bz2.open,
    "xz": lzma.open,
    "zstd": _zstd,
}


class _Header(tarfile.TarInfo):
    """A header of which every fault is an error: for tarfile, faults after the first header end the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark of the end, a block of zeros
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            cut = "the mark of its end is missing: it was cut between two members"
            raise tarfile.ReadError(cut if tar.offset else "it is empty") from error
        except tarfile.HeaderError as error:
            where = f"after byte {tar.offset}: " if tar.offset else ""
            raise tarfile.ReadError(f"{where}no valid header there") from error


def _grouped(url: str, members: Iterator[tuple[str, str, bytes, bool]]) -> Iterator[Sample]:
    """Yield samples, also the last one before an error."""
    sample = Sample(url, "")
    try:
        for name, extension, content, is_image in members:
            if sample.key != name or extension in sample.seen:
                if sample.seen:
                    yield sample
                sample = Sample(url, name)
            sample.add(extension, StreamedImage(url, f"{name}.{extension}", content) if is_image else content)
    except Exception:
        if sample.seen:
            yield sample
        raise
    if sample.seen:
        yield sample


def _members(stream: _Stream) -> Iterator[tuple[str, str, bytes, bool]]:
    """Yield the sample's name, the extension and the content of every member, and whether it is an image."""
    with tarfile.open(fileobj=_decompressed(stream), mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            for name, extension, is_image in wanted(member):
                yield name, extension, content_of(tar, member), is_image
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
        while block := tar.fileobj.read(1 << 20):
            if any(block):
                raise tarfile.ReadError("more data follows its end: are these several archives in one file?")
