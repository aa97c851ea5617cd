"""What one adapter adds to a weight, as the products that every order of computation is put together from.

Shapes: M wide, m narrow, R rank, N bases, K = N * R, T tokens (rows), u = tokens B (T, K).

    delta W = s * B Af            (M, m)                                      (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                   (K, m)

`dense.DenseTerm` holds B as a matrix, `structured.StructuredTerm` as small factors; both are a `Term`.

Gamma starts at 1 / max(N, m), so that what it multiplies would be subnormal in float16. Everything is computed with
gamma * c, c the power of two next to max(N, m): an exact scaling that puts it back in range, undone where products
accumulate in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Costs(NamedTuple):
    """FLOPs of an update's products, added up over the active adapters."""

    build: int
    """B Af as a matrix."""
    times_b: int
    """A token times B, to K numbers. Back from K to M costs the same."""
    times_af_t: int
    """A token times Af^T, m to K numbers. Back from K to m costs the same."""
    gradient: int
    """Gradients of lambda and gamma from a token of each side, the wide one already times B."""
    gradient_once: int
    """What that costs however many the tokens are."""
    weight_gradient: int
    """Gradients of lambda and gamma from B Af's own."""

    def plus(self, other: Costs) -> Costs:
        """Those of two adapters together."""
        return Costs(*(own + more for own, more in zip(self, other, strict=True)))


class Term(Protocol):
    """One adapter's part of an update. Every method is differentiable in the term's tensors.

    ``total + ...`` arguments may be None for the update alone.
    """

    @property
    def lam(self) -> Tensor:
        """Lambda (R, N)."""

    @property
    def gamma(self) -> Tensor:
        """Gamma (N, m)."""

    @property
    def scale(self) -> float:
        """S = alpha / rank times the run-time scale."""

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype that matrix products run in."""

    @property
    def product_scale(self) -> float:
        """S / c: what products with values from `times_af_t` are multiplied by."""

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> Term:
        """The same term with these tensors, or None, in place of its own."""

    def costs(self) -> Costs:
        """FLOPs of the products below."""

    def times_b(self, wide: Tensor) -> Tensor:
        """(T, M) B: (T, K)."""

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Total (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""

    def times_af_t(self, narrow: Tensor) -> Tensor:
        """(T, m) Af^T: (T, K), times c."""

    def times_af(self, total: Tensor | None, u: Tensor) -> Tensor:
        """Total (T, m) + s u Af."""

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Weight (O, I) + delta W."""

    def gradients(self, u: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the wide side's tokens times B and the narrow side's tokens (T, m)."""

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the update's own, (M, m)."""


def range_power(gamma: Tensor) -> int:
    """c: the power of two next to max(N, m)."""
    return 2 ** math.ceil(math.log2(max(gamma.shape)))


def scaled_a(a: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Af * c (K, m) in `dtype`."""
    af = lam[:, :, None] * a[:, None, :] * (gamma * range_power(gamma))[None]
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
