"""Structured bases: sign matrices A and B composed of small Hadamard matrices, so that neither is ever built.

Shapes: A (R, m), B (M, K), K = N * R; b a power of two, P the smallest power of two that is at least R.

A repeats the columns of one (R, P) matrix Q over contiguous classes of C = ceil(m / P) columns and multiplies each
column by a random sign:

    A[k, j] = Q[k, j // C] * s[j]

B is the Kronecker product of two small matrices with random signs between them (two steps of a fast Hadamard
transform). Its columns are f = n * b + k and its rows are in the order of (q, p), where the last b a - M values of q
do not have the last p:

    B[(q, p), f] = left[p, n] * D[n, q] * core[q, k]

Q, left and core are Hadamard matrices with permuted rows and columns and random row signs, cut to size. core (b, b) is
not cut; left is drawn again until the cut matrix has full rank. Every entry of A and B is exactly -1 or +1: unit
variance without any arithmetic, exact in half precision, and B's columns are orthogonal if left is not cut.
One application of B costs 2 b ceil(K / b) (a + b) FLOPs instead of 2 M K.

The matrices of one shape are not windows of another's: each shape (R, m) and (M, K) has separate ones, a few kilobytes
drawn from the seed.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from randlora_vision.bases.random import signs, words

_A, _B = 0, 1


def grid(wide: int, columns: int) -> tuple[int, int, int]:
    """(b, ceil(K / b), a) with b * a >= M: the power of two b for which applying B is cheapest."""

    def sizes(b: int) -> tuple[int, int, int]:
        return b, math.ceil(columns / b), math.ceil(wide / b)

    def cost(b: int) -> int:
        _, inner, outer = sizes(b)
        return b * inner * (b + outer)

    return sizes(min((2**power for power in range(columns.bit_length() + 1)), key=cost))


def period(rank: int) -> int:
    """The number P of classes of A's columns."""
    return 1 << (rank - 1).bit_length()


def a_factors(seed: int, rank: int, narrow: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Q (R, P) and s (m,), int8."""
    return _hadamard(seed, _A, 1, rank, period(rank)), signs(words(seed, _A, 0, narrow))


def b_factors(seed: int, wide: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return right (ceil(K / b), b, b) and left (a, ceil(K / b)), int8; right[n, k, q] = D[n, q] * core[q, k]."""
    b, inner, outer = grid(wide, columns)
    between = signs(words(seed, _B, 0, inner * b)).reshape(inner, 1, b)
    core = _hadamard(seed, _B, 1, b, b)
    for row in itertools.count(2):
        left = _hadamard(seed, _B, row, outer, inner)
        if all(_has_full_rank(part) for part in (left, left[:-1])):
            break
    return between * core.T[None], left


def dense(seed: int, matrix: int, rows: int, columns: int) -> np.ndarray:
    """Return A (matrix 0) or B (matrix 1) as a dense (rows, columns) float32 matrix."""
    if matrix == _A:
        q, own = a_factors(seed, rows, columns)
        spread = q.repeat(math.ceil(columns / q.shape[1]), axis=1)[:, :columns]
        return (spread * own).astype(np.float32)
    right, left = b_factors(seed, rows, columns)
    whole = left[None, :, :, None] * right.transpose(2, 0, 1)[:, None]  # (q, p, n, k)
    b, outer, inner, _ = whole.shape
    full = full_rows(rows, b, outer)
    parts = (whole[:full], whole[full:, :-1])
    return np.concatenate([part.reshape(-1, inner * b) for part in parts])[:, :columns].astype(np.float32)


def full_rows(wide: int, b: int, outer: int) -> int:
    """The number of values of q that have rows for all p."""
    return wide - b * (outer - 1)


def _hadamard(seed: int, matrix: int, row: int, rows: int, columns: int) -> np.ndarray:
    """A (rows, columns) part of a Hadamard matrix with permuted rows and columns and random row signs, int8."""
    order = 1 << (max(rows, columns) - 1).bit_length()
    raw = words(seed, matrix, row, 3 * order)
    picked_rows = np.argsort(raw[:order], kind="stable")[:rows]
    picked_columns = np.argsort(raw[order : 2 * order], kind="stable")[:columns]
    matched = picked_rows[:, None] & picked_columns[None]
    odd = np.zeros(matched.shape, dtype=np.int64)
    while matched.any():  # Sylvester's matrix: the parity of the bits set in both indices
        odd ^= matched & 1
        matched >>= 1
    return ((1 - 2 * odd) * signs(raw[2 * order :])[:rows, None]).astype(np.int8)


def _has_full_rank(matrix: np.ndarray) -> bool:
    """True if the rank modulo a prime equals the smaller side; this is exact and implies full rank."""
    prime = 2**31 - 1
    left = matrix.astype(np.int64) % prime
    rank = 0
    for column in range(left.shape[1]):
        (below,) = np.nonzero(left[rank:, column])
        if not len(below):
            continue
        left[[rank, rank + below[0]]] = left[[rank + below[0], rank]]
        left[rank] = left[rank] * pow(int(left[rank, column]), -1, prime) % prime
        left[rank + 1 :] = (left[rank + 1 :] - left[rank + 1 :, column, None] * left[rank]) % prime
        rank += 1
        if rank == left.shape[0]:
            break
    return rank == min(matrix.shape)
