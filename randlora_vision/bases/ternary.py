"""Ternary bases with the values -c, 0 and +c: B is stored as int8 and expanded only during a product."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora_vision.bases.base import B, BasesSpec
from randlora_vision.bases.dense import DenseBases
from randlora_vision.bases.random import filled, halves


class TernaryBases(DenseBases, kinds=("sparse", "very_sparse")):
    """Bases with the values -c, 0 and +c; B is stored as int8."""

    def __init__(self, spec: BasesSpec) -> None:
        super().__init__(spec)
        self._unit = ternary_unit(spec.kind, spec.narrow)

    def b(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """B (wide, columns) on `device`, rounded to `dtype`; it is not cached."""
        return self.kept(B, device, torch.int8)[0].to(dtype) * self._unit

    def _of_term(
        self, lam: Tensor, gamma: Tensor, wide: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        return super()._of_term(lam, gamma, wide, torch.int8)[0], (self._unit, dtype)

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """As `Bases.generate`."""
        return ternary(kind, seed, matrix, rows, columns, narrow) * np.float32(ternary_unit(kind, narrow))

    def _draw(self, matrix: int, dtype: torch.dtype) -> Tensor:
        if dtype != torch.int8:
            return super()._draw(matrix, dtype)
        if matrix in self._drawn:
            return self._drawn.pop(matrix).sign().to(torch.int8)
        spec = self.spec
        return torch.from_numpy(ternary(spec.kind, spec.seed, matrix, spec.wide, spec.columns, spec.narrow))

    def bytes_in(self, dtype: torch.dtype) -> int:
        """As `Bases.bytes_in`."""
        return super().bytes_in(torch.int8)


def ternary(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
    """The signs of a ternary matrix, int8: -1 and +1 with probability density / 2 each, otherwise 0."""
    limit = np.uint32(round(_density(kind, narrow) / 2 * 2**32))

    def convert(raw: np.ndarray) -> np.ndarray:
        bits = halves(raw)
        return (bits < limit).view(np.int8) - (bits >= np.uint32(2**32 - int(limit))).view(np.int8)

    return filled(np.empty((rows, columns), dtype=np.int8), seed, matrix, (columns + 1) // 2, convert)


def ternary_unit(kind: str, narrow: int) -> float:
    """The value c = 1 / sqrt(density), a float32 number that gives the matrix unit variance."""
    return float(np.float32(math.sqrt(1 / _density(kind, narrow))))


def _density(kind: str, narrow: int) -> float:
    return 1 / math.sqrt(narrow) if kind == "very_sparse" else 1 / 3
