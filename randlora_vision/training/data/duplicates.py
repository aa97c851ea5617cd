"""Held-out images that are also training images, byte for byte: what is measured on them is not generalisation."""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from randlora_vision.training.data.pictures import Picture, StoredImage
from randlora_vision.training.data.sources.tar_members import TarImage

_TAIL = 4096  # bytes: different images of the same size nearly always differ there
_Place = tuple[Path, int, int]  # file, offset, size


def repeated(train: Sequence[Picture], held_out: Sequence[Picture]) -> int:
    """Return how many of the held-out images have the bytes of a training image.

    Only images in files and shards are compared. Files are read only if others have the same size, and to their
    beginning only if others have the same end.
    """
    with ThreadPoolExecutor(8) as pool:
        seen, asked = ([place for place in pool.map(_place, images) if place] for images in (train, held_out))
        for key in (lambda place: place[2], _tail, _whole):
            seen, asked = _alike(seen, asked, key, pool)
    return len(asked)


def _alike(
    seen: list[_Place], asked: list[_Place], key: Callable[[_Place], Hashable], pool: ThreadPoolExecutor
) -> tuple[list[_Place], list[_Place]]:
    """Return the places on both sides whose keys are on the other side too; None is the key of what cannot be read."""
    own, other = list(pool.map(key, seen)), list(pool.map(key, asked))
    both = set(own) & set(other) - {None}
    return (
        [place for place, value in zip(seen, own, strict=True) if value in both],
        [place for place, value in zip(asked, other, strict=True) if value in both],
    )


def _place(image: Picture) -> _Place | None:
    if isinstance(image, TarImage):
        return image.shard, image.offset, image.size
    path = image.file if isinstance(image, StoredImage) else image
    if not isinstance(path, Path):
        return None
    try:
        return path, 0, os.stat(path).st_size
    except OSError:  # it is recorded when it is read
        return None


def _tail(place: _Place) -> bytes | None:
    return _digest(place, _TAIL)


def _whole(place: _Place) -> bytes | None:
    return _digest(place, place[2])


def _digest(place: _Place, most: int) -> bytes | None:
    path, offset, size = place
    try:
        with path.open("rb") as file:
            file.seek(offset + max(0, size - most))
            return hashlib.blake2b(file.read(min(size, most))).digest()
    except OSError:
        return None
