"""Random bits, and numbers derived from them by exact operations: identical on every machine and version.

Each row of a matrix has a separate stream of a counter-based generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_CHUNK = 2**17
"""Number of words that are drawn and converted at once: what fits into a processor's cache."""
_ROW = 2**128  # number of counters per row; each counter yields four 64-bit words


def words(seed: int, matrix: int, row: int, count: int) -> np.ndarray:
    """The first `count` 64-bit words of a row of matrix 0 (A) or 1 (B): the counter starts at (matrix, row)."""
    return np.random.Philox(key=seed, counter=((matrix << 64) | row) * _ROW).random_raw(count)


def filled(
    out: np.ndarray, seed: int, matrix: int, count: int, convert: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Fill the rows of `out` with the first `count` `words` of their streams, converted n rows at a time."""
    rows, columns = out.shape
    generator = np.random.Philox(key=seed, counter=(matrix << 64) * _ROW)
    to_next = _ROW - math.ceil(count / 4)  # from the counter after a row to that of the next row
    raw = np.empty((max(1, _CHUNK // max(1, count)), count), dtype=np.uint64)
    for first in range(0, rows, len(raw)):
        some = raw[: rows - first]
        for row in some:
            row[:] = generator.random_raw(count)
            generator.advance(to_next)
        out[first : first + len(some)] = convert(some)[:, :columns]
    return out


def signs(raw: np.ndarray) -> np.ndarray:
    """Return -1 or +1 (int8) according to the top bit of each word."""
    return np.where(raw >> np.uint64(63), 1, -1).astype(np.int8)


def uniform(raw: np.ndarray) -> np.ndarray:
    """Uniform on (-sqrt(3), sqrt(3)): an odd integer below 2**24 in magnitude times one float32 constant."""
    integers = (halves(raw) >> np.uint32(8)).view(np.int32)
    integers *= 2
    integers += np.int32(1 - 2**24)
    return integers.astype(np.float32) * np.float32(math.sqrt(3) / 2**24)


def normal(raw: np.ndarray) -> np.ndarray:
    """Sum of twelve uniform 16-bit integers (Irwin-Hall), centred: exact below 2**24, then one multiplication.

    Logarithms and cosines differ between devices and library versions; integer sums do not. The fourth moment is
    2.9 instead of 3.
    """
    parts = _parts(raw, "<u2").reshape(*raw.shape[:-1], -1, 12)
    centred = (parts.sum(-1, dtype=np.int32) - np.int32(6 * 0xFFFF)).astype(np.float32)
    return centred * np.float32(1 / math.sqrt(2**32 - 1))


def halves(raw: np.ndarray) -> np.ndarray:
    """The low and high 32 bits of each 64-bit word, in that order regardless of the machine's byte order."""
    return _parts(raw, "<u4").astype(np.uint32, copy=False)


def _parts(raw: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(raw, dtype="<u8").view(dtype)
