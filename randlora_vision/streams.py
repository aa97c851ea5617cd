"""Random bits that are the same on every machine and version: streams of a counter-based generator."""

from __future__ import annotations

import numpy as np

_ROW = 2**128  # counters of one row, each of which yields four 64-bit words


def words(seed: int, matrix: int, row: int, count: int) -> np.ndarray:
    """The first `count` 64-bit words of a row's stream; the counter starts at (matrix, row).

    Args:
        seed: Key of the Philox generator, whose stream NumPy promises to keep.
        matrix: 0 for A, 1 for B.
        row: Which stream of that matrix.
        count: How many words.
    """
    return np.random.Philox(key=seed, counter=((matrix << 64) | row) * _ROW).random_raw(count)


def signs(raw: np.ndarray) -> np.ndarray:
    """-1 or +1 (int8) by the top bit of every word."""
    return np.where(raw >> np.uint64(63), 1, -1).astype(np.int8)
