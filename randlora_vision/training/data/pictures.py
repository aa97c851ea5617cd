"""Images wherever they are kept, found in folders, opened for the decoder, and checked."""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from randlora_vision.files.text import require_regular
from randlora_vision.training.data.decode import WHITE, Colour, Note, to_rgb
from randlora_vision.training.data.skipped import SkipList

Transform = Callable[[Image.Image], Tensor]


class Readable(Protocol):
    """An image that is neither a file nor decoded yet; `str` identifies it in messages."""

    def open(self) -> Image.Image:
        """Open the image for decoding."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a map-style dataset whose items are tuples or dictionaries that contain the image.

    The image there is decoded, an open file, or a dictionary of its bytes or path (Hugging Face's form). A dataset of
    files whose own reader would decode them gives the `file`.
    """

    dataset: Any
    index: int
    key: int | str = 0
    file: Path | None = None

    def open(self) -> Image.Image:
        """Open the image for decoding."""
        if self.file is not None:
            return open_file(self.file)
        image: Image.Image | IO[bytes] | Mapping[str, Any] = self.dataset[self.index][self.key]
        if isinstance(image, Mapping):
            return Image.open(io.BytesIO(image["bytes"])) if image.get("bytes") else open_file(Path(image["path"]))
        return image if isinstance(image, Image.Image) else Image.open(image)

    def __str__(self) -> str:
        return f"image {self.index} of {type(self.dataset).__name__}"


Picture = Path | Image.Image | Readable


def open_file(path: Path) -> Image.Image:
    """Open an image file for decoding; raise OSError for anything but a regular file."""
    require_regular(path)
    return Image.open(path)


def open_picture(image: Picture, background: Colour = WHITE, note: Note = lambda rule: None) -> Image.Image:
    """Return the image as upright 8-bit RGB; raise OSError when it cannot be decoded."""
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image, background, note)
        with open_file(image) if isinstance(image, Path) else image.open() as opened:
            return to_rgb(opened, background, note)
    except UnidentifiedImageError as error:
        raise OSError("Pillow does not recognise its image format") from error
    except OSError:
        raise
    except Exception as error:  # Pillow's readers raise many types on broken files, and other libraries more
        raise OSError(f"{type(error).__name__}: {error}") from error


def readable(image: Picture, skipped: SkipList, background: Colour = WHITE) -> Image.Image | None:
    """Return the decoded image, or None if it cannot be decoded; `skipped` records that, and rules that changed it."""
    note = (lambda rule: None) if isinstance(image, Image.Image) else (lambda rule: skipped.change(image, rule))
    try:
        return open_picture(image, background, note)
    except OSError as error:
        skipped.add(image, error)
        return None


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file suffixes that Pillow reads, in lower case with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


_NOT_DATA = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is one of a tool's own: .ipynb_checkpoints, ._image.jpg, __MACOSX."""
    return name.startswith(".") or name in _NOT_DATA


def is_image_name(name: str) -> bool:
    """Return whether a file name is that of an image and not hidden."""
    return os.path.splitext(name)[1].lower() in image_suffixes() and not is_hidden(name)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def image_files(folder: Path, skipped: SkipList) -> list[Path]:
    """Return the image files below a folder, sorted; links to folders are followed, hidden files and folders are not.

    A link that leads back to a folder that contains it is left out. Images that Pillow cannot open, or whose names do
    not say that they are images, are recorded in `skipped`.
    """
    found = []
    for path in sorted(_walk(folder, (folder.resolve(),))):
        suffix = path.suffix.lower()
        if is_image_name(path.name):
            found.append(path)
        elif suffix in _OTHER_IMAGES:
            skipped.add(path, f"{suffix} files cannot be read: convert them")
        elif not suffix and _is_image(path):
            skipped.add(path, "it is an image without a suffix: rename it")
    return found


def has_images(folder: Path) -> bool:
    """Return whether `image_files` would find any."""
    return any(is_image_name(path.name) for path in _walk(folder, (folder.resolve(),)))


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield all files that are not hidden, also links to nothing and what is not a regular file."""
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if not path.is_dir():
            yield path
        elif not any(place.is_relative_to(real := path.resolve()) for place in above):
            yield from _walk(path, (*above, real))


_OTHER_IMAGES = frozenset((".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".avif"))


def _is_image(path: Path) -> bool:
    try:
        with open_file(path):
            return True
    except Exception:  # Pillow's readers raise many types
        return False


_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def whole_images(paths: Sequence[Path], skipped: SkipList) -> list[bool]:
    """Return for each file whether it exists and is complete; record the others in `skipped`."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: _is_whole(path, skipped), paths))


def _is_whole(path: Path, skipped: SkipList) -> bool:
    try:
        with open_file(path) as image:
            marker = _END_MARKERS.get(image.format or "")
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64))
            if not marker or marker not in file.read():
                open_picture(path)  # truncated, followed by other bytes, or in another format: decode it to find out
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        skipped.add(path, error)
        return False
    return True
