"""The numbers of the random bases, by exact operations only: the same bits on every machine and version.

Row i of a matrix is a stream of its own (`randlora_vision.streams`), consumed from its first column on: a matrix is a
window into an infinite one. Structured bases are the exception (`randlora_vision.structured_bases`).
"""

from __future__ import annotations

import math

import numpy as np

from randlora_vision import structured_bases
from randlora_vision.streams import words

STRUCTURED = "structured"
TERNARY_KINDS = ("sparse", "very_sparse")
"""Kinds whose numbers are -c, 0 and +c."""


def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
    """A (rows, columns) float32 matrix of unit variance.

    Args:
        kind: Distribution, one of `randlora_vision.config.BASES_KINDS` that come from a seed of ours.
        seed: Key of the Philox generator.
        matrix: 0 for A, 1 for B: separate streams.
        rows: Number of rows.
        columns: Number of columns.
        narrow: Narrow side that sets the density of ``very_sparse``; no other kind reads it.
    """
    if kind == STRUCTURED:
        return structured_bases.dense(seed, matrix, rows, columns)
    if kind in TERNARY_KINDS:
        return ternary(kind, seed, matrix, rows, columns, narrow) * np.float32(ternary_unit(kind, narrow))
    draw, count = {"uniform": (_uniform, (columns + 1) // 2), "normal": (_normal, 3 * columns)}[kind]
    out = np.empty((rows, columns), dtype=np.float32)
    for row in range(rows):
        out[row] = draw(words(seed, matrix, row, count))[:columns]
    return out


def ternary(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
    """The signs of a ternary matrix, int8: -1 and +1 with probability density / 2 each, else 0."""
    limit = np.uint32(round(_density(kind, narrow) / 2 * 2**32))
    out = np.empty((rows, columns), dtype=np.int8)
    for row in range(rows):
        bits = _halves(words(seed, matrix, row, (columns + 1) // 2))[:columns]
        out[row] = (bits < limit).astype(np.int8) - (bits >= np.uint32(2**32 - int(limit))).astype(np.int8)
    return out


def ternary_unit(kind: str, narrow: int) -> float:
    """C = 1 / sqrt(density), a float32 number: it gives signs unit variance."""
    return float(np.float32(math.sqrt(1 / _density(kind, narrow))))


def _density(kind: str, narrow: int) -> float:
    return 1 / math.sqrt(narrow) if kind == "very_sparse" else 1 / 3


def _uniform(raw: np.ndarray) -> np.ndarray:
    """Uniform on (-sqrt(3), sqrt(3)): an odd integer below 2**24 in magnitude times one float32 constant."""
    integers = 2 * (_halves(raw) >> np.uint32(8)).astype(np.int32) + np.int32(1 - 2**24)
    return integers.astype(np.float32) * np.float32(math.sqrt(3) / 2**24)


def _normal(raw: np.ndarray) -> np.ndarray:
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


def _halves(raw: np.ndarray) -> np.ndarray:
    """The low and high 32 bits of every 64-bit word, in that order whatever the byte order of the machine."""
    pairs = np.stack([raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)], axis=1)
    return pairs.astype(np.uint32).reshape(-1)
