"""The frozen random bases A and B: a seed, not a file (DESIGN: bit-identical on every machine and version).

Shapes: A (R, m) float32, ONE for all bases and layers; B (M, K) float32 with K = N * R columns, shared by all layers.

Both are windows into infinite matrices (`randlora_vision.draws`). So a slice of a large basis equals the small basis,
adapters of different rank share one B, and the size of a model never changes the numbers that a layer sees.

Two kinds are not held as float32. Of ternary bases B is int8, expanded for the span of one product. Structured bases
are a few small factors for every shape of layer (`randlora_vision.structured_bases`); a layer's numbers depend on its
own shape and rank alone, and the SHA-256 is that of A and B written out at the largest sizes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora_vision import structured_bases
from randlora_vision.draws import STRUCTURED, TERNARY_KINDS, ternary, ternary_unit
from randlora_vision.draws import generate as generate
from randlora_vision.peft_draw import PEFT_KINDS, draw
from randlora_vision.structured import StructuredTerm
from randlora_vision.terms import Term

_A, _B = 0, 1


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

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> Term | StructuredTerm:
        """The update of one adapter on one parameter.

        Args:
            lam: lambda (R, N).
            gamma: gamma (N, m).
            wide: M.
            scale: s = alpha / rank times the run-time scale.
            dtype: That matrix products run in.
        """
        a = self.a(lam.device, lam.dtype)[: lam.shape[0], : gamma.shape[1]]
        b = self.b(lam.device, dtype)[:wide, : lam.numel()]
        return Term(a, b, lam, gamma, scale)

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
                tensor = self._draw(matrix, dtype).to(device=device, dtype=dtype)
        self._tensors[(matrix, device, dtype)] = tensor
        return tensor

    def _draw(self, matrix: int, dtype: torch.dtype) -> Tensor:
        """The matrix in whatever dtype it is best made into `dtype` from."""
        return self._source(matrix)

    def _source(self, matrix: int) -> Tensor:
        """The matrix in float32: any copy already in use, else drawn anew (and then not kept twice)."""
        for (which, device, dtype), tensor in self._tensors.items():
            if which == matrix and dtype == torch.float32 and device.type != "meta":
                return tensor
        spec = self.spec
        if spec.kind in PEFT_KINDS:
            return draw(spec.kind, spec.seed, spec.rank, spec.narrow, spec.wide)[matrix]
        rows, columns = self._shape(matrix)
        return torch.from_numpy(generate(spec.kind, spec.seed, matrix, rows, columns, spec.narrow))

    def _shape(self, matrix: int) -> tuple[int, int]:
        spec = self.spec
        return (spec.rank, spec.narrow) if matrix == _A else (spec.wide, spec.columns)

    @property
    def sha256(self) -> str:
        """SHA-256 of A then B as little-endian float32, row by row."""
        if self._sha256 is None:
            self._sha256 = sha256_of(self._source(_A), self._source(_B))
        return self._sha256

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes held for one device when matrix products run in `dtype` and lambda and gamma are float32."""
        return 4 * self.spec.rank * self.spec.narrow + dtype.itemsize * self.spec.wide * self.spec.columns

    @property
    def nbytes(self) -> int:
        """Bytes held for products in float32."""
        return self.bytes_in(torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bases:
        return self

    def __reduce__(self) -> tuple[Callable[[BasesSpec], Bases], tuple[BasesSpec]]:
        return get_bases, (self.spec,)

    def __repr__(self) -> str:
        return f"Bases({self.spec})"


class TernaryBases(Bases):
    """Bases of -c, 0 and +c: B is held as int8."""

    def b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """B (wide, columns) on `device`, rounded to `dtype`; not kept."""
        return self._get(_B, device, torch.int8).to(dtype) * self._unit

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> Term:
        """As `Bases.term`."""
        a = self.a(lam.device, lam.dtype)[: lam.shape[0], : gamma.shape[1]]
        b = self._get(_B, lam.device, torch.int8)[:wide, : lam.numel()]
        return Term(a, b, lam, gamma, scale, self._unit, dtype)

    @property
    def _unit(self) -> float:
        return ternary_unit(self.spec.kind, self.spec.narrow)

    def _draw(self, matrix: int, dtype: torch.dtype) -> Tensor:
        if dtype != torch.int8:
            return super()._draw(matrix, dtype)
        spec = self.spec
        return torch.from_numpy(ternary(spec.kind, spec.seed, matrix, spec.wide, spec.columns, spec.narrow))

    def bytes_in(self, dtype: torch.dtype) -> int:
        """As `Bases.bytes_in`."""
        return super().bytes_in(torch.int8)


class StructuredBases(Bases):
    """Bases that are held as small factors, made once for every shape, device and dtype."""

    def __init__(self, spec: BasesSpec) -> None:
        super().__init__(spec)
        self._factors: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> StructuredTerm:
        """As `Bases.term`."""
        key = (lam.shape[0], gamma.shape[1], wide, lam.numel(), lam.device, dtype)
        factors = self._factors.get(key)
        q, own, right, left = self._make_factors(key) if factors is None else factors
        return StructuredTerm(q, own, right, left, lam, gamma, scale, wide)

    @torch.compiler.disable
    def _make_factors(self, key: tuple[Any, ...]) -> tuple[Tensor, ...]:
        rank, narrow, wide, columns, device, dtype = key
        seed = self.spec.seed
        arrays = (*structured_bases.a_factors(seed, rank, narrow), *structured_bases.b_factors(seed, wide, columns))
        with torch.inference_mode(False):
            factors = tuple(torch.from_numpy(array).to(device=device, dtype=dtype) for array in arrays)
        self._factors[key] = factors
        return factors

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes of the largest shape's factors; other shapes have about as many."""
        spec = self.spec
        b, inner, outer = structured_bases.grid(spec.wide, spec.columns)
        period = structured_bases.period(spec.rank)
        return dtype.itemsize * (spec.rank * period + spec.narrow + inner * b * b + outer * inner)


_LIVE: weakref.WeakValueDictionary[BasesSpec, Bases] = weakref.WeakValueDictionary()


def sha256_of(a: Tensor, b: Tensor) -> str:
    """SHA-256 of two float32 matrices as little-endian numbers, row by row."""
    digest = hashlib.sha256()
    for tensor in (a, b):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy(), dtype="<f4").data)
    return digest.hexdigest()


def adopt(bases: Bases) -> Bases:
    """The live object of this one's spec, which becomes this one if there is none."""
    return _LIVE.setdefault(bases.spec, bases)


def get_bases(spec: BasesSpec) -> Bases:
    """The one live `Bases` object of a spec: every model and adapter that uses it shares its memory."""
    bases = _LIVE.get(spec)
    if bases is None:
        kinds = {STRUCTURED: StructuredBases, **dict.fromkeys(TERNARY_KINDS, TernaryBases)}
        bases = _LIVE[spec] = kinds.get(spec.kind, Bases)(spec)
    return bases
