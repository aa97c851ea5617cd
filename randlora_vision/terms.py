"""One adapter's part of an update, as the products that every order of computation is put together from.

Shapes: M wide, m narrow, R rank, N bases, K = N * R, T tokens (rows), u = tokens B (T, K).

    delta W = s * B Af            (M, m)                                      (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                   (K, m)

`Term` holds B as a matrix, `structured.StructuredTerm` as small factors; both have the same methods. Every method is
differentiable in its tensors. ``total + ...`` arguments may be None for the update alone.

Gamma starts at 1 / max(N, m), so that what it multiplies would be subnormal in float16. Everything is computed with
gamma * c, c the power of two next to max(N, m): an exact scaling that puts it back in range, undone where products
accumulate in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from randlora_vision.planner import Costs, dense_costs


class Term(NamedTuple):
    """A dense pair of bases with its lambda and gamma.

    Attributes:
        a: A (R, m), in the dtype of lambda and gamma.
        b: B (M, K), in the dtype that matrix products run in, or ternary as int8.
        lam: lambda (R, N).
        gamma: gamma (N, m).
        scale: s = alpha / rank times the run-time scale.
        unit: What ternary numbers are multiplied by.
        dtype: That products run in where B is ternary; None means B's.
    """

    a: Tensor
    b: Tensor
    lam: Tensor
    gamma: Tensor
    scale: float
    unit: float = 1.0
    dtype: torch.dtype | None = None

    @property
    def products(self) -> torch.dtype:
        """Dtype that matrix products run in."""
        return self.dtype or self.b.dtype

    @property
    def mixed_scale(self) -> float:
        """S / c: what products with values from `mix` are multiplied by."""
        return self.scale / power(self.gamma)

    def costs(self) -> Costs:
        """FLOPs of the products below."""
        return dense_costs(self.b.shape[0], self.gamma.shape[1], self.lam.numel())

    def b_in(self, dtype: torch.dtype) -> Tensor:
        """B in `dtype`; of ternary bases it lives for the span of one product."""
        return self.b.to(dtype) * self.unit if self.b.dtype == torch.int8 else self.b.to(dtype)

    def contract(self, wide: Tensor) -> Tensor:
        """(T, M) B: (T, K)."""
        return torch.mm(wide, self.b_in(wide.dtype))

    def spread(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Total (T, M) + hidden (T, K) B^T, for hidden values from `mix`."""
        return add_product(total, hidden, self.b_in(hidden.dtype).t(), self.mixed_scale)

    def mix(self, narrow: Tensor) -> Tensor:
        """(T, m) Af^T: (T, K), times c."""
        return torch.mm(narrow, self._scaled_a(narrow.dtype).t())

    def unmix(self, total: Tensor | None, u: Tensor) -> Tensor:
        """Total (T, m) + s u Af."""
        return add_product(total, u, self._scaled_a(u.dtype), self.mixed_scale)

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Weight (O, I) + delta W."""
        af, b = self._scaled_a(self.products), self.b_in(self.products)
        left, right = (b, af) if tall else (af.t(), b.t())
        return add_product(weight, left, right, self.mixed_scale)

    def gradients(self, u: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the wide side's tokens times B and the narrow side's tokens (T, m)."""
        return diagonal_gradients(self.a, self.lam, self.gamma, self.scale, torch.mm(u.t(), narrow))

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the update's own, (M, m)."""
        d_af = torch.mm(self.b_in(d_weight.dtype).t(), d_weight)
        return diagonal_gradients(self.a, self.lam, self.gamma, self.scale, d_af)

    def _scaled_a(self, dtype: torch.dtype) -> Tensor:
        return scaled_a(self.a, self.lam, self.gamma, dtype)


def power(gamma: Tensor) -> int:
    """c: the power of two next to max(N, m)."""
    return 2 ** math.ceil(math.log2(max(gamma.shape)))


def scaled_a(a: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Af * c (K, m) in `dtype`."""
    af = lam[:, :, None] * a[:, None, :] * (gamma * power(gamma))[None]
    return af.reshape(-1, gamma.shape[1]).to(dtype)


def add_product(total: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``total + factor * left @ right``; the factor meets the products before they are rounded."""
    if total is None:
        return torch.mm(left, right) * factor
    if total.dtype != left.dtype:
        return total + torch.mm(left, right).to(total.dtype) * factor
    return torch.addmm(total, left, right, alpha=factor)


def diagonal_gradients(a: Tensor, lam: Tensor, gamma: Tensor, scale: float, d_af: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of lambda and gamma from B^T dW (K, m), the gradient of Af without the scale s."""
    rank, bases = lam.shape
    product = d_af.to(lam.dtype).view(rank, bases, -1) * (a * scale)[:, None, :]
    d_lam = torch.einsum("knj,nj->kn", product, gamma)
    d_gamma = torch.einsum("knj,kn->nj", product, lam)
    return d_lam, d_gamma
