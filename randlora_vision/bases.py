"""The frozen random bases A and B: a seed, not a file (DESIGN: bit-identical on every machine and version).

Shapes: A (R, m) float32, ONE for all bases and layers; B (M, K) float32 with K = N * R columns, shared by all layers.

Both are windows into infinite matrices. Row i of a matrix is the stream of a counter-based generator whose counter
starts at (matrix, i), and a row is consumed from its first column on. So a slice of a large basis equals the small
basis, adapters of different rank share one B, and the size of a model never changes the numbers that a layer sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_A, _B = 0, 1
_ROW = 2**128  # counters of one row, each of which yields four 64-bit words


@dataclasses.dataclass(frozen=True)
class BasesSpec:
    """Everything that determines a pair of bases.

    Attributes:
        kind: One of `randlora_vision.config.BASES_KINDS`.
        seed: Key of the generator.
        rank: Rows of A (the largest rank among the adapted targets).
        narrow: Columns of A (the largest m).
        wide: Rows of B (the largest M).
        columns: Columns of B (the largest N * R).
    """

    kind: str
    seed: int
    rank: int
    narrow: int
    wide: int
    columns: int


class Bases:
    """A pair of bases, generated on first use and kept once per device and dtype.

    It is shared by every layer of an adapter and lives outside the module tree: copying a model shares it, and
    pickling stores its spec alone.
    """

    def __init__(self, spec: BasesSpec) -> None:
        self.spec = spec
        self._tensors: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._sha256: str | None = None

    def a(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A (rank, narrow) on `device`, rounded to `dtype`."""
        return self._get(_A, device, dtype)

    def b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """B (wide, columns) on `device`, rounded to `dtype`."""
        return self._get(_B, device, dtype)

    def _get(self, matrix: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors.get((matrix, device, dtype))
        return self._make(matrix, device, dtype) if tensor is None else tensor

    @torch.compiler.disable
    def _make(self, matrix: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        # Under inference_mode the result would be a tensor that autograd may not save later.
        with torch.inference_mode(False):
            if device.type == "meta":
                tensor = torch.empty(self._shape(matrix), dtype=dtype, device=device)
            else:
                tensor = self._source(matrix).to(device=device, dtype=dtype)
        self._tensors[(matrix, device, dtype)] = tensor
        return tensor

    def _source(self, matrix: int) -> Tensor:
        """The matrix in float32: any copy already in use, else drawn anew (and then not kept twice)."""
        for (which, device, dtype), tensor in self._tensors.items():
            if which == matrix and dtype == torch.float32 and device.type != "meta":
                return tensor
        spec = self.spec
        rows, columns = self._shape(matrix)
        return torch.from_numpy(generate(spec.kind, spec.seed, matrix, rows, columns, spec.narrow))

    def _shape(self, matrix: int) -> tuple[int, int]:
        spec = self.spec
        return (spec.rank, spec.narrow) if matrix == _A else (spec.wide, spec.columns)

    @property
    def sha256(self) -> str:
        """SHA-256 of A then B as little-endian float32, row by row."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for matrix in (_A, _B):
                digest.update(np.ascontiguousarray(self._source(matrix).cpu().numpy(), dtype="<f4").data)
            self._sha256 = digest.hexdigest()
        return self._sha256

    @property
    def nbytes(self) -> int:
        """Bytes of the pair in float32."""
        return 4 * (self.spec.rank * self.spec.narrow + self.spec.wide * self.spec.columns)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bases:
        return self

    def __reduce__(self) -> tuple[Callable[[BasesSpec], Bases], tuple[BasesSpec]]:
        return get_bases, (self.spec,)

    def __repr__(self) -> str:
        return f"Bases({self.spec})"


_LIVE: weakref.WeakValueDictionary[BasesSpec, Bases] = weakref.WeakValueDictionary()


def get_bases(spec: BasesSpec) -> Bases:
    """The one live `Bases` object of a spec: every model and adapter that uses it shares its memory."""
    bases = _LIVE.get(spec)
    if bases is None:
        bases = _LIVE[spec] = Bases(spec)
    return bases


def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
    """A (rows, columns) float32 window of unit variance, from exact operations only.

    Args:
        kind: Distribution, one of `randlora_vision.config.BASES_KINDS`.
        seed: Key of the Philox generator.
        matrix: 0 for A, 1 for B: separate streams.
        rows: Number of rows.
        columns: Number of columns.
        narrow: Narrow side that sets the density of ``very_sparse``; no other kind reads it.
    """
    draw = {"uniform": _uniform, "normal": _normal, "sparse": _sparse, "very_sparse": _sparse}[kind]
    density = 1 / math.sqrt(narrow) if kind == "very_sparse" else 1 / 3
    words = {"normal": 3 * columns}.get(kind, (columns + 1) // 2)
    out = np.empty((rows, columns), dtype=np.float32)
    for row in range(rows):
        counter = ((matrix << 64) | row) * _ROW
        raw = np.random.Philox(key=seed, counter=counter).random_raw(words)
        out[row] = draw(raw, density)[:columns]
    return out


def _uniform(raw: np.ndarray, density: float) -> np.ndarray:
    """Uniform on (-sqrt(3), sqrt(3)): an odd integer below 2**24 in magnitude times one float32 constant."""
    integers = 2 * (_halves(raw) >> np.uint32(8)).astype(np.int32) + np.int32(1 - 2**24)
    return integers.astype(np.float32) * np.float32(math.sqrt(3) / 2**24)


def _normal(raw: np.ndarray, density: float) -> np.ndarray:
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


def _sparse(raw: np.ndarray, density: float) -> np.ndarray:
    """Ternary: -c and +c with probability density / 2 each, else 0; c = 1 / sqrt(density) gives unit variance."""
    bits = _halves(raw)
    limit = np.uint32(round(density / 2 * 2**32))
    signs = (bits < limit).astype(np.float32) - (bits >= np.uint32(2**32 - int(limit))).astype(np.float32)
    return signs * np.float32(math.sqrt(1 / density))


def _halves(raw: np.ndarray) -> np.ndarray:
    """The low and high 32 bits of every 64-bit word, in that order whatever the byte order of the machine."""
    pairs = np.stack([raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)], axis=1)
    return pairs.astype(np.uint32).reshape(-1)
