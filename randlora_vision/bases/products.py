"""The update of one adapter, as the products from which every order of computation is built.

Shapes: M wide, m narrow, R rank, N bases, K = N * R, T tokens (rows), u = tokens B (T, K).

    delta W = s * B Af            (M, m)                                      (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                   (K, m)

`dense.DenseTerm` stores B as a matrix, `structured.StructuredTerm` as small factors; both implement `Term`.

Gamma starts at 1 / max(N, m), so products with it would be subnormal in float16. Everything is computed with
gamma * c, where c is the smallest power of two that is at least max(N, m). This scaling is exact, brings the values
back into range, and is undone where products accumulate in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Costs(NamedTuple):
    """FLOPs of the products of an update, summed over the active adapters."""

    build: int
    """Building B Af as a matrix."""
    times_b: int
    """One token times B, from M to K numbers. The way back from K to M costs the same."""
    times_af_t: int
    """One token times Af^T, from m to K numbers. The way back from K to m costs the same."""
    gradient: int
    """Gradients of lambda and gamma per token, with the wide side already multiplied by B."""
    gradient_once: int
    """The part of these gradients that does not depend on the number of tokens."""
    weight_gradient: int
    """Gradients of lambda and gamma from the gradient of B Af."""

    def plus(self, other: Costs) -> Costs:
        """The costs of two adapters together."""
        return Costs(*(own + more for own, more in zip(self, other, strict=True)))


class Term(Protocol):
    """One adapter's part of an update; every method is differentiable in the term's tensors.

    The arguments ``total`` and ``weight`` may be None to compute only the update.
    """

    @property
    def lam(self) -> Tensor:
        """The tensor lambda (R, N)."""

    @property
    def gamma(self) -> Tensor:
        """The tensor gamma (N, m)."""

    @property
    def scale(self) -> float:
        """The scale s: alpha / rank times the run-time scale."""

    @property
    def wide(self) -> int:
        """The wide side M."""

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""

    @property
    def product_scale(self) -> float:
        """The factor s / c of products with values from `times_af_t`."""

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> Term:
        """The same term with its tensors replaced by these, or by None."""

    def costs(self) -> Costs:
        """FLOPs of the products below."""

    def times_b(self, wide: Tensor) -> Tensor:
        """Return ``wide`` (T, M) times B: (T, K)."""

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""

    def times_af_t(self, narrow: Tensor) -> Tensor:
        """Return ``narrow`` (T, m) times Af^T: (T, K), scaled by c."""

    def times_af(self, total: Tensor | None, u: Tensor) -> Tensor:
        """Return ``total`` (T, m) + s u Af."""

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""

    def gradients(self, u: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the wide side's tokens times B and the narrow side's tokens (T, m)."""

    def weight_gradients(self, d_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""


def range_power(gamma: Tensor) -> int:
    """The factor c: the smallest power of two that is at least max(N, m)."""
    return 2 ** math.ceil(math.log2(max(gamma.shape)))


def scaled_a(a: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Af * c (K, m) in `dtype`."""
    af = lam[:, :, None] * a[:, None, :] * (gamma * range_power(gamma))[None]
    return af.reshape(-1, gamma.shape[1]).to(dtype)


def add_product(total: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Return ``total + factor * left @ right``; the factor is applied before the products are rounded."""
    if total is None:
        return torch.mm(left, right) * factor
    if total.dtype != left.dtype:
        return total + torch.mm(left, right).to(total.dtype) * factor
    return torch.addmm(total, left, right, alpha=factor)


def diagonal_gradients(a: Tensor, lam: Tensor, gamma: Tensor, scale: float, d_af: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of lambda and gamma from B^T dW (K, m), which is the gradient of Af without the scale s."""
    rank, bases = lam.shape
    product = d_af.to(lam.dtype).view(rank, bases, -1) * (a * scale)[:, None, :]
    d_lam = torch.einsum("knj,nj->kn", product, gamma)
    d_gamma = torch.einsum("knj,kn->nj", product, lam)
    return d_lam, d_gamma
