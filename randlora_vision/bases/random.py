"""Random bits, and numbers derived from them by exact operations: identical on every machine and version.

Each row of a matrix has a separate stream of a counter-based generator.
"""

from __future__ import annotations

import math

import numpy as np

_ROW = 2**128  # number of counters per row; each counter yields four 64-bit words


def words(seed: int, matrix: int, row: int, count: int) -> np.ndarray:
    """The first `count` 64-bit words of a row's stream; the counter starts at (matrix, row).

    Args:
        seed: Key of the Philox generator, whose stream NumPy guarantees.
        matrix: 0 for A, 1 for B.
        row: Index of the stream within that matrix.
        count: Number of words.
    """
    return np.random.Philox(key=seed, counter=((matrix << 64) | row) * _ROW).random_raw(count)


def signs(raw: np.ndarray) -> np.ndarray:
    """Return -1 or +1 (int8) according to the top bit of each word."""
    return np.where(raw >> np.uint64(63), 1, -1).astype(np.int8)


def uniform(raw: np.ndarray) -> np.ndarray:
    """Uniform on (-sqrt(3), sqrt(3)): an odd integer below 2**24 in magnitude times one float32 constant."""
    integers = 2 * (halves(raw) >> np.uint32(8)).astype(np.int32) + np.int32(1 - 2**24)
    return integers.astype(np.float32) * np.float32(math.sqrt(3) / 2**24)


def normal(raw: np.ndarray) -> np.ndarray:
    """Sum of twelve uniform 16-bit integers (Irwin-Hall), centred: exact below 2**24, then one multiplication.

    Logarithms and cosines differ between devices and library versions; integer sums do not. The fourth moment is
    2.9 instead of 3.
    """
    total = np.zeros(len(raw) // 3, dtype=np.int64)
    for word in raw.reshape(-1, 3).T:
        for shift in (0, 16, 32, 48):
            total += ((word >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    centred = (total - 6 * 0xFFFF).astype(np.float32)
    return centred * np.float32(1 / math.sqrt(2**32 - 1))


def halves(raw: np.ndarray) -> np.ndarray:
    """The low and high 32 bits of each 64-bit word, in that order regardless of the machine's byte order."""
    pairs = np.stack([raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)], axis=1)
    return pairs.astype(np.uint32).reshape(-1)
