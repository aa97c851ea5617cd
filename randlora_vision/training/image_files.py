"""Image files on disk: which are whole, without decoding them where their format allows."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from PIL import Image

from randlora_vision.training.images import SkipList, read_image

_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes that Pillow reads, in small letters, with their dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def whole_images(paths: Sequence[Path], skipped: SkipList) -> list[bool]:
    """Tell of each file whether it is there and readable to its end; `skipped` notes the others."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: _is_whole(path, skipped), paths))


def _is_whole(path: Path, skipped: SkipList) -> bool:
    try:
        with Image.open(path) as image:
            marker = _END_MARKERS.get(image.format or "")
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64))
            if not marker or marker not in file.read():
                read_image(path)  # cut short, or followed by other bytes, or of another format: find out
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        skipped.add(path, error)
        return False
    return True
