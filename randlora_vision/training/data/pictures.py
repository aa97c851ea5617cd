"""Reading images, and recording those that cannot be read."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from randlora_vision.names import printable

Transform = Callable[[Image.Image], Tensor]


class SkipList:
    """The data that could not be used: one line per item in a text file, or an error when strict.

    Loader processes append to the same file, so it lists what any process skipped.
    """

    def __init__(self, path: Path | None = None, strict: bool = False) -> None:
        self.path = path
        self.strict = strict
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def add(self, image: "Picture | str", reason: object) -> None:
        """Record an unreadable image, or (a string) a position in a file; raise ValueError when strict."""
        where, reason = printable(str(image)), printable(str(reason))
        if self.strict:
            what = "cannot use" if isinstance(image, str) else "cannot read the image"
            raise ValueError(f"{what} {where}: {reason} (without --strict-data it is skipped)")
        with self._lock:
            if self.path is None or where in self._seen:
                return
            self._seen.add(where)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{where}\t{reason}\n")

    def count(self) -> int:
        """Return how many distinct images were recorded, by any process."""
        if self.path is None or not self.path.exists():
            return 0
        return len({line.split("\t")[0] for line in self.path.read_text(encoding="utf-8").splitlines()})

    def __str__(self) -> str:
        count = self.count()
        return f"; skipped {count} that cannot be used, listed in {self.path}" if count else ""


def read_image(source: Path | IO[bytes]) -> Image.Image:
    """Decode an image as RGB; raise OSError when that fails."""
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise OSError("Pillow does not recognise its image format") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises these as well as OSError on broken files.
        raise OSError(f"{type(error).__name__}: {error}") from error


class Readable(Protocol):
    """An image that is neither a file nor decoded yet; `str` identifies it in messages."""

    def read(self) -> Image.Image:
        """Decode the image as RGB; raise OSError when that fails."""


@dataclass(frozen=True)
class StoredImage:
    """An image of a map-style dataset whose items are tuples or dictionaries that contain the image.

    The image there is either decoded or an open file.
    """

    dataset: Any
    index: int
    key: int | str = 0

    def read(self) -> Image.Image:
        """Decode the image as RGB; raise OSError when that fails."""
        try:
            image: Image.Image | IO[bytes] = self.dataset[self.index][self.key]
            return image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
        except Exception as error:  # from any library
            raise OSError(f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return f"image {self.index} of {type(self.dataset).__name__}"


Picture = Path | Image.Image | Readable


def open_picture(image: Picture) -> Image.Image:
    """Return the decoded image; raise OSError when it cannot be decoded."""
    if isinstance(image, Image.Image):
        return image
    return read_image(image) if isinstance(image, Path) else image.read()


def readable(image: Picture, skipped: SkipList) -> Image.Image | None:
    """Return the decoded image, or record it in `skipped` and return None when it cannot be decoded."""
    try:
        return open_picture(image)
    except OSError as error:
        skipped.add(image, error)
        return None


def held_out_files(images: Mapping[str, Sequence[Picture]]) -> dict[str, list[str]]:
    """Return the images that are not for training, by split; embedded images have no names and are left out."""
    held_out = {name: images for name, images in images.items() if name != "train"}
    return {
        name: [str(image) for image in images if not isinstance(image, Image.Image)]
        for name, images in held_out.items()
    }


_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file suffixes that Pillow reads, in lower case with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def whole_images(paths: Sequence[Path], skipped: SkipList) -> list[bool]:
    """Return for each file whether it exists and is complete; record the others in `skipped`."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: _is_whole(path, skipped), paths))


def _is_whole(path: Path, skipped: SkipList) -> bool:
    try:
        with Image.open(path) as image:
            marker = _END_MARKERS.get(image.format or "")
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64))
            if not marker or marker not in file.read():
                read_image(path)  # truncated, followed by other bytes, or in another format: decode it to find out
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        skipped.add(path, error)
        return False
    return True
