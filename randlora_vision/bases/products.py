"""The update of one adapter, as the products from which every order of computation is built.

Shapes: M wide, m narrow, R rank, N bases, K = N * R, T tokens (rows), u = tokens B (T, K).

    delta W = s * B Af            (M, m)                                      (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                   (K, m)

`dense.DenseTerm` stores B as a matrix, `structured.StructuredTerm` as small factors; both implement `Term`.

Gamma starts at 1 / max(N, m), so products with it would be subnormal in float16. There, `Term.prepared` computes with
gamma * c and s / c, where c is the smallest power of two that is at least max(N, m). This scaling is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from randlora_vision.torch_internals import is_jit_tracing


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
    shared_wide: int
    """The part of these gradients per token that `Products.times_af` computes too, for the same u."""
    shared_narrow: int
    """The part that `Products.times_af_t` computes too, for the same narrow side."""
    gradient_once: int
    """The part of these gradients that does not depend on the number of tokens."""
    weight_gradient: int
    """Gradients of lambda and gamma from the gradient of B Af."""

    def plus(self, other: Costs) -> Costs:
        """The costs of two adapters together."""
        return Costs(*(own + more for own, more in zip(self, other, strict=True)))


class Term(Protocol):
    """One adapter's part of an update: its bases, lambda, gamma and scale."""

    @property
    def lam(self) -> Tensor:
        """The tensor lambda (R, N)."""

    @property
    def gamma(self) -> Tensor:
        """The tensor gamma (N, m)."""

    @property
    def wide(self) -> int:
        """The wide side M."""

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """The tensors of the bases."""

    def with_tensors(self, frozen: Sequence[Any], lam: Any, gamma: Any) -> Any:
        """The same term with its tensors replaced by these, or by None."""

    def costs(self) -> Costs:
        """FLOPs of the products."""

    def prepared(self) -> Products:
        """The term with what the products of forward and backward share computed once, differentiably."""


class Products(Term, Protocol):
    """A prepared term; every method is differentiable in the term's tensors.

    The arguments ``total`` and ``weight`` may be None to compute only the update. ``private`` is the result of
    `torch_internals.writes_are_private`: asking once for a pass is much cheaper than for every product.
    """

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""

    @property
    def scale(self) -> float:
        """The factor s of the products with values from `times_af_t`."""

    def times_b(self, wide: Tensor) -> Tensor:
        """Return ``wide`` (T, M) times B: (T, K)."""

    def times_b_t(self, total: Tensor | None, hidden: Tensor) -> Tensor:
        """Return ``total`` (T, M) + s hidden (T, K) B^T, for hidden values from `times_af_t`."""

    def times_af_t(self, narrow: Tensor, factor: float = 1.0, private: bool = False) -> tuple[Tensor, Any]:
        """Return ``factor`` times ``narrow`` (T, m) times Af^T (T, K), and what `gradients` takes as `projected`."""

    def times_af(self, total: Tensor | None, u: Tensor, private: bool = False) -> tuple[Tensor, Any]:
        """Return ``total`` (T, m) + s u Af, and what `gradients` takes as `classes`."""

    def add_to(self, weight: Tensor | None, tall: bool) -> Tensor:
        """Return ``weight`` (O, I) + delta W."""

    def gradients(
        self, u: Tensor, narrow: Tensor, private: bool = False, classes: Any = None, projected: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from u (T, K), the wide side times B, and the narrow side (T, m).

        `classes` and `projected` are the second results of `times_af` and `times_af_t` for them, if known.
        """

    def weight_gradients(self, d_weight: Tensor, private: bool = False) -> tuple[Tensor, Tensor]:
        """Gradients of lambda and gamma from the gradient of the update (M, m)."""


def scaled_a(a: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Af (K, m) in `dtype`."""
    af = lam[:, :, None] * a[:, None, :]
    # In place where nothing records or transforms it, since a second matrix of this size costs time. Fake tensors and
    # those of transforms are not Parameters, and compiled code multiplies lambda by its scale.
    plain = type(lam) is type(gamma) is nn.Parameter and not torch.is_grad_enabled() and not is_jit_tracing()
    af = af.mul_(gamma) if plain else af * gamma
    return af.reshape(-1, gamma.shape[1]).to(dtype)


def add_product(total: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Return ``total + factor * left @ right``; the factor is applied before the products are rounded."""
    if total is None:
        return torch.mm(left, right) * factor
    if total.dtype != left.dtype:
        return total + torch.mm(left, right).to(total.dtype) * factor
    return torch.addmm(total, left, right, alpha=factor)


def scaled_product(left: Tensor, right: Tensor, factor: float, private: bool) -> Tensor:
    """Return ``factor * left @ right`` of matrices or batches of matrices, in one operation if ``private``."""
    product, added = (torch.mm, torch.addmm) if left.ndim == 2 else (torch.bmm, torch.baddbmm)
    if factor == 1.0:
        return product(left, right)
    if not private:
        return product(left, right) * factor
    return added(left.new_empty(()), left, right, beta=0, alpha=factor)  # with beta 0, the values are not read


def diagonal_gradients(a: Tensor, lam: Tensor, gamma: Tensor, d_af: Tensor, private: bool) -> tuple[Tensor, Tensor]:
    """Gradients of lambda and gamma from that of Af (K, m), which is overwritten if ``private``."""
    rank, bases = lam.shape
    right = gamma[:, :, None]
    split, factors = d_af.to(lam.dtype).view(rank, bases, -1), a[:, None, :]
    by_base = (split.mul_(factors) if private else split * factors).transpose(0, 1)  # (N, R, m)
    d_gamma = torch.bmm(lam.t()[:, None, :], by_base)[:, 0]
    if not private:
        return torch.bmm(by_base, right)[:, :, 0].t().contiguous(), d_gamma
    d_lam = torch.empty_like(lam)
    torch.bmm(by_base, right, out=d_lam.t()[:, :, None])
    return d_lam, d_gamma
