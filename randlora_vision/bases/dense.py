"""Bases that are stored as matrices, uniform or normal, and the products with them.

Shapes and products: see `randlora_vision.bases.products`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from randlora_vision.bases.base import A, B, Bases, sizes_of
from randlora_vision.bases.products import Costs, add_product, diagonal_gradients, range_power, scaled_a
from randlora_vision.bases.random import normal, uniform, words


class DenseBases(Bases, kinds=("uniform", "normal")):
    """Bases that are stored as matrices."""

    def term(self, lam: Tensor, gamma: Tensor, wide: int, scale: float, dtype: torch.dtype) -> DenseTerm:
        """As `Bases.term`."""
        rank, bases, narrow = sizes_of(lam, gamma)
        (a,) = self._beside((A, rank, narrow), lam, lam.dtype)
        (b,) = self._beside((B, wide, rank * bases), lam, dtype)
        return DenseTerm(a, b, lam, gamma, scale)

    def _made(self, key: Any, device: torch.device, dtype: torch.dtype) -> Iterable[Tensor]:
        if not isinstance(key, tuple):
            return super()._made(key, device, dtype)
        matrix, rows, columns = key
        return (self.kept(matrix, device, dtype)[0][:rows, :columns],)

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """As `Bases.generate`: one stream of random bits per row, consumed from the first column on."""
        draw, count = {"uniform": (uniform, (columns + 1) // 2), "normal": (normal, 3 * columns)}[kind]
        out = np.empty((rows, columns), dtype=np.float32)
        for row in range(rows):
            out[row] = draw(words(seed, matrix, row, count))[:columns]
        return out


class DenseTerm(NamedTuple):
    """A dense pair of bases with its lambda and gamma.

    Attributes:
        a: A (R, m), in the dtype of lambda and gamma.
        b: B (M, K), in the dtype of the matrix products, or int8 for ternary bases.
        lam: lambda (R, N).
        gamma: gamma (N, m).
        scale: s = alpha / rank times the run-time scale.
        unit: The factor that ternary values are multiplied by.
        dtype: The dtype of the products if B is ternary; None means B's.
    """

    a: Tensor
    b: Tensor
    lam: Tensor
    gamma: Tensor
    scale: float
    unit: float = 1.0
    dtype: torch.dtype | None = None

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""
        return self.a, self.b

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> DenseTerm:
        """The same term with its tensors replaced by these, or by None."""
        a, b = frozen
        return DenseTerm(a, b, lam, gamma, self.scale, self.unit, self.dtype)

    @property
    def wide(self) -> int:
        """M."""
        return self.b.shape[0]

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.dtype or self.b.dtype

    @property
    def product_scale(self) -> float:
        """The factor s / c of products with values from `times_af_t`."""
        return self.scale / range_power(self.gamma)

    def costs(self) -> Costs:
        """FLOPs of the products below."""
        return dense_costs(self.b.shape[0], self.gamma.shape[1], self.lam.numel())

    def b_as(self, dtype: torch.dtype) -> Tensor:
        """B in `dtype`; for ternary bases it exists only during one product."""
        return self.b.to(dtype) * self.unit if self.b.dtype == torch.int8 else self.b.to(dtype)

    def times_b(self, wide: Tensor) -> Tensor:
        """Return ``wide`` (T, M) times B: (T, K)."""
        return torch.mm(wide, self.b_as(wide.dtype))

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""
        return add_product(total, hidden, self.b_as(hidden.dtype).t(), self.product_scale)

    def times_af_t(self, narrow: Tensor) -> Tensor:
        """Return ``narrow`` (T, m) times Af^T: (T, K), scaled by c."""
        return torch.mm(narrow, self._scaled_a(narrow.dtype).t())

    def times_af(self, total: Tensor | None, u: Tensor) -> Tensor:
        """Return ``total`` (T, m) + s u Af."""
        return add_product(total, u, self._scaled_a(u.dtype), self.product_scale)

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""
        af, b = self._scaled_a(self.product_dtype), self.b_as(self.product_dtype)
        left, right = (b, af) if tall else (af.t(), b.t())
        return add_product(weight, left, right, self.product_scale)

    def gradients(self, u: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the wide side's tokens times B and the narrow side's tokens (T, m)."""
        return diagonal_gradients(self.a, self.lam, self.gamma, self.scale, torch.mm(u.t(), narrow))

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""
        d_af = torch.mm(self.b_as(d_weight.dtype).t(), d_weight)
        return diagonal_gradients(self.a, self.lam, self.gamma, self.scale, d_af)

    def _scaled_a(self, dtype: torch.dtype) -> Tensor:
        return scaled_a(self.a, self.lam, self.gamma, dtype)


def dense_costs(wide: int, narrow: int, inner: int) -> Costs:
    """FLOPs of the products with bases that are stored as matrices."""
    product, reductions = 2 * wide * narrow * inner, 4 * narrow * inner
    times_af_t = 2 * narrow * inner
    return Costs(product, 2 * wide * inner, times_af_t, times_af_t, reductions, product + reductions)
