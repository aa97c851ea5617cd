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
from randlora_vision.bases.products import (
    Costs,
    add_product,
    diagonal_gradients,
    scaled_a,
    scaled_product,
)
from randlora_vision.bases.random import filled, normal, uniform


class DenseTerm(NamedTuple):
    """A dense pair of bases with its lambda and gamma."""

    a: Tensor  # A (R, m), in the dtype of lambda and gamma
    b: Tensor  # B (M, K), in the dtype of the matrix products, or int8 for ternary bases
    lam: Tensor  # lambda (R, N)
    gamma: Tensor  # gamma (N, m)
    scale: float  # s = alpha / rank times the run-time scale
    unit: float = 1.0  # the factor that ternary values are multiplied by
    dtype: torch.dtype | None = None  # the dtype of the products if B is ternary; None means B's

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

    def prepared(self) -> DenseTerm:
        """As `Term.prepared`."""
        if torch.float16 not in (self.b.dtype, self.dtype):
            return self
        power = 1 << (int(max(self.gamma.shape)) - 1).bit_length()  # c
        return DenseTerm(self.a, self.b, self.lam, self.gamma * power, self.scale / power, self.unit, self.dtype)

    def costs(self) -> Costs:
        """FLOPs of the products below."""
        return dense_costs(self.b.shape[0], self.gamma.shape[1], self.lam.numel())

    def b_as(self, dtype: torch.dtype) -> Tensor:
        """B in `dtype`; for ternary bases it exists only during one product."""
        if self.b.dtype != torch.int8:
            return self.b.to(dtype)
        return self.b * self.unit if dtype == torch.get_default_dtype() else self.b.to(dtype) * self.unit

    def times_b(self, wide: Tensor) -> Tensor:
        """Return ``wide`` (T, M) times B: (T, K)."""
        return torch.mm(wide, self.b if self.b.dtype == wide.dtype else self.b_as(wide.dtype))

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""
        b = self.b if self.b.dtype == hidden.dtype else self.b_as(hidden.dtype)
        if total is not None and total.dtype == hidden.dtype:  # as `add_product` does, without the call
            return torch.addmm(total, hidden, b.t(), alpha=self.scale)
        return add_product(total, hidden, b.t(), self.scale)

    def times_af_t(self, narrow: Tensor, factor: float = 1.0, private: bool = False) -> tuple[Tensor, None]:
        """Return ``factor`` times ``narrow`` (T, m) times Af^T: (T, K); `gradients` has no use for parts of it."""
        af_t = scaled_a(self.a, self.lam, self.gamma, narrow.dtype).t()
        return torch.mm(narrow, af_t) if factor == 1.0 else scaled_product(narrow, af_t, factor, private), None

    def times_af(self, total: Tensor | None, u: Tensor, private: bool = False) -> tuple[Tensor, None]:
        """Return ``total`` (T, m) + s u Af; `gradients` has no use for parts of it."""
        af = scaled_a(self.a, self.lam, self.gamma, u.dtype)
        if total is not None and total.dtype == u.dtype:
            return torch.addmm(total, u, af, alpha=self.scale), None
        return add_product(total, u, af, self.scale), None

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""
        dtype = self.dtype or self.b.dtype
        b = self.b if self.b.dtype == dtype else self.b_as(dtype)
        af = scaled_a(self.a, self.lam, self.gamma, dtype)
        left, right = (b, af) if tall else (af.t(), b.t())
        if weight is not None and weight.dtype == dtype:
            return torch.addmm(weight, left, right, alpha=self.scale)
        return add_product(weight, left, right, self.scale)

    def gradients(
        self, u: Tensor, narrow: Tensor, private: bool = False, classes: None = None, projected: None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Products.gradients`."""
        d_af = scaled_product(u.t(), narrow, self.scale, private)
        return diagonal_gradients(self.a, self.lam, self.gamma, d_af, private)

    def weight_gradients(self, d_weight: Tensor, private: bool = False) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""
        d_af = scaled_product(self.b_as(d_weight.dtype).t(), d_weight, self.scale, private)
        return diagonal_gradients(self.a, self.lam, self.gamma, d_af, private)


class DenseBases(Bases, kinds=("uniform", "normal")):
    """Bases that are stored as matrices."""

    term_type = DenseTerm

    def _of_term(
        self, lam: Tensor, gamma: Tensor, wide: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        rank, bases, narrow = sizes_of(lam, gamma)
        (a,) = self._beside((A, rank, narrow), lam, lam.dtype)
        return (a, *self._beside((B, wide, rank * bases), lam, dtype)), ()

    def _made(self, key: Any, device: torch.device, dtype: torch.dtype) -> Iterable[Tensor]:
        if not isinstance(key, tuple):
            return super()._made(key, device, dtype)
        matrix, rows, columns = key
        return (self.kept(matrix, device, dtype)[0][:rows, :columns],)

    @staticmethod
    def generate(kind: str, seed: int, matrix: int, rows: int, columns: int, narrow: int) -> np.ndarray:
        """As `Bases.generate`: one stream of random bits per row, consumed from the first column on."""
        draw, count = {"uniform": (uniform, (columns + 1) // 2), "normal": (normal, 3 * columns)}[kind]
        return filled(np.empty((rows, columns), dtype=np.float32), seed, matrix, count, draw)


def dense_costs(wide: int, narrow: int, inner: int) -> Costs:
    """FLOPs of the products with bases that are stored as matrices."""
    product, reductions = 2 * wide * narrow * inner, 4 * narrow * inner
    times_af_t = 2 * narrow * inner
    return Costs(product, 2 * wide * inner, times_af_t, times_af_t, 0, 0, reductions, product + reductions)
