"""The mathematics, once: an exact, memory-efficient autograd core under every layer, merge and export.

Shapes: O out, I in, M = max(O, I) wide, m = min(O, I) narrow, R rank, N = ceil(m / R) bases, K = N * R, T tokens.

    delta W = s * B Af            (O, I), transposed when O < I                  (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                      (K, m)

with A (R, m) and B (M, K) frozen and random, lambda (R, N) and gamma (N, m) trained. The rows of Af are in PEFT's
order, so its checkpoints mean the same numbers. The backward pass keeps the input, lambda and gamma; what else it
needs (the frozen weight, the shared bases) is alive anyway, and Af, B Af and W + s B Af are built again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_vision.planner import BackwardPlan, Problem, plan_backward, plan_forward


class Term(NamedTuple):
    """One adapter's part of an update.

    Attributes:
        a: A (R, m), in the dtype of lambda and gamma.
        b: B (M, K), in the dtype that matrix products run in.
        lam: lambda (R, N).
        gamma: gamma (N, m).
        scale: s = alpha / rank times the run-time scale.
    """

    a: Tensor
    b: Tensor
    lam: Tensor
    gamma: Tensor
    scale: float


def randlora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: tuple[Term, ...],
    out_features: int,
    dtype: torch.dtype | None = None,
    forward_plan: str | None = None,
    backward_plan: BackwardPlan | None = None,
) -> Tensor:
    """``x (W + sum of the updates)^T + bias`` by the cheapest exact order for this number of tokens.

    Args:
        x: (..., I), any number of leading dimensions, empty ones too.
        weight: (O, I) frozen weight, or None for the sum of the updates alone (the branch form that dropout and
            quantised weights need).
        bias: (O,) or None.
        terms: The active adapters' parts, at least one.
        out_features: O.
        dtype: Of the matrix products; None means x's. Lambda, gamma and their gradients keep their own.
        forward_plan: Pins the forward order ("dense" or "factored") instead of the cheapest.
        backward_plan: Pins the backward orders.

    Returns:
        (..., O) in `dtype`.
    """
    dtype = x.dtype if dtype is None else dtype
    call = _Call(dtype, out_features, tuple(term.scale for term in terms), forward_plan, backward_plan)
    frozen = [tensor for term in terms for tensor in (term.a, term.b)]
    trained = [tensor for term in terms for tensor in (term.lam, term.gamma)]
    return _RandLoRALinear.apply(x.to(dtype), weight, bias, call, *frozen, *trained)


def effective_weight(weight: Tensor, terms: tuple[Term, ...], dtype: torch.dtype | None = None) -> Tensor:
    """``W + sum of the updates``, differentiable in lambda, gamma and W, in W's shape.

    Args:
        weight: (O, ...); beyond two dimensions (convolutions) it is seen as (O, I).
        terms: The active adapters' parts; their B may be of a lower precision than W (autocast).
        dtype: Of the result; None means W's.
    """
    call = (tuple(term.scale for term in terms), weight.dtype if dtype is None else dtype)
    frozen = [tensor for term in terms for tensor in (term.a, term.b)]
    trained = [tensor for term in terms for tensor in (term.lam, term.gamma)]
    return _EffectiveWeight.apply(weight, call, *frozen, *trained)


def scaled_a(term: Term, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(Af * c, s / c): Af (K, m) in `dtype`, and the factor that its products with B are multiplied by.

    Gamma starts at 1 / max(N, m), so that Af's entries would be subnormal in float16. c is the power of two next to
    max(N, m): an exact scaling that puts them back in range, undone where products accumulate in float32.
    """
    bases, narrow = term.gamma.shape
    c = 2 ** math.ceil(math.log2(max(bases, narrow)))
    af = term.lam[:, :, None] * term.a[:, None, :] * (term.gamma * c)[None]
    return af.reshape(-1, narrow).to(dtype), term.scale / c


class _Call(NamedTuple):
    """The arguments of `_RandLoRALinear` that are no tensors."""

    dtype: torch.dtype
    out_features: int
    scales: tuple[float, ...]
    forward_plan: str | None
    backward_plan: BackwardPlan | None


def _terms(scales: tuple[float, ...], tensors: tuple[Tensor, ...]) -> tuple[Term, ...]:
    """Put flat arguments together again: (a, b) of every term, then (lambda, gamma) of every term."""
    half = 2 * len(scales)
    frozen, trained = tensors[:half], tensors[half:]
    return tuple(
        Term(frozen[2 * i], frozen[2 * i + 1], trained[2 * i], trained[2 * i + 1], scale)
        for i, scale in enumerate(scales)
    )


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``total + factor * left @ right``; the factor meets the products before they are rounded."""
    if total is None:
        return torch.mm(left, right) * factor
    if total.dtype != left.dtype:
        return total + torch.mm(left, right).to(total.dtype) * factor
    return torch.addmm(total, left, right, alpha=factor)


def _updated(weight: Tensor | None, terms: tuple[Term, ...], tall: bool) -> Tensor:
    """W + sum s B Af, or the sum alone, as (O, I)."""
    total = weight
    for term in terms:
        af, factor = scaled_a(term, term.b.dtype)
        total = _add_product(total, *((term.b, af) if tall else (af.t(), term.b.t())), factor)
    assert total is not None
    return total


def _problem(tokens: int, in_features: int, out_features: int, terms: tuple[Term, ...], branch: bool) -> Problem:
    wide, narrow = max(out_features, in_features), min(out_features, in_features)
    inner = sum(term.lam.numel() for term in terms)
    return Problem(tokens, wide, narrow, inner, out_features >= in_features, branch)


def _trained_gradients(term: Term, d_af: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of lambda and gamma from B^T gW (K, m), the gradient of Af without the scale s."""
    rank, bases = term.lam.shape
    product = d_af.to(term.lam.dtype).view(rank, bases, -1) * (term.a * term.scale)[:, None, :]
    d_lam = torch.einsum("knj,nj->kn", product, term.gamma)
    d_gamma = torch.einsum("knj,kn->nj", product, term.lam)
    return d_lam, d_gamma


class _RandLoRALinear(torch.autograd.Function):
    """See `randlora_linear`. Arguments: x, weight, bias, call, then every a and b, then every lambda and gamma."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call, *tensors: Tensor) -> Tensor:
        terms = _terms(call.scales, tensors)
        flat = x.reshape(-1, x.shape[-1])
        problem = _problem(flat.shape[0], flat.shape[1], call.out_features, terms, weight is None)
        base = None if weight is None else weight.to(call.dtype)
        bias = None if bias is None else bias.to(call.dtype)
        if (call.forward_plan or plan_forward(problem)) == "dense":
            return F.linear(x, _updated(base, terms, problem.tall), bias)
        out = None if base is None else F.linear(flat, base, bias)
        for term in terms:
            af, factor = scaled_a(term, call.dtype)
            first, second = (af.t(), term.b.t()) if problem.tall else (term.b, af)
            out = _add_product(out, torch.mm(flat, first), second, factor)
        assert out is not None
        return out.reshape(*x.shape[:-1], call.out_features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, call, *tensors = inputs
        half = 2 * len(call.scales)
        # The bases are shared constants: on the context they are neither copied nor offloaded layer by layer.
        ctx.frozen = tuple(tensors[:half])
        ctx.call, ctx.shape = call, x.shape
        ctx.need_terms = any(ctx.needs_input_grad[4 + half :])
        need_x = ctx.need_terms or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if need_x else None, weight, *tensors[half:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *trained = ctx.saved_tensors
        call, (need_x, need_weight, need_bias) = ctx.call, ctx.needs_input_grad[:3]
        terms = _terms(call.scales, (*ctx.frozen, *trained))
        g = grad.reshape(-1, call.out_features)
        problem = _problem(g.shape[0], ctx.shape[-1], call.out_features, terms, weight is None)
        plan = call.backward_plan or plan_backward(problem, need_x, ctx.need_terms, need_weight)
        flat = None if x is None else x.reshape(-1, ctx.shape[-1])
        base = None if weight is None else weight.to(call.dtype)

        d_x, g_b = _input_gradient(g, base, terms, problem, plan)
        d_weight = None
        if flat is not None and (need_weight or plan.grad_adapter == "weight"):
            d_weight = torch.mm(g.t(), flat)
        d_trained = _adapter_gradients(g, flat, d_weight, g_b, terms, problem, plan)
        return (
            None if d_x is None else d_x.reshape(ctx.shape),
            d_weight.to(weight.dtype) if need_weight and d_weight is not None else None,
            g.sum(0) if need_bias else None,
            None,
            *(None for _ in ctx.frozen),
            *d_trained,
        )


def _input_gradient(
    g: Tensor, base: Tensor | None, terms: tuple[Term, ...], problem: Problem, plan: BackwardPlan
) -> tuple[Tensor | None, list[Tensor]]:
    """G (W + sum of the updates), and the products g B that a tall map's adapter gradient shares."""
    if plan.grad_input is None:
        return None, []
    if plan.grad_input == "dense":
        return torch.mm(g, _updated(base, terms, problem.tall)), []
    d_x = None if base is None else torch.mm(g, base)
    shared = []
    for term in terms:
        af, factor = scaled_a(term, g.dtype)
        first, second = (term.b, af) if problem.tall else (af.t(), term.b.t())
        product = torch.mm(g, first)
        d_x = _add_product(d_x, product, second, factor)
        if problem.tall and plan.grad_adapter == "tokens":
            shared.append(product)
    return d_x, shared


def _adapter_gradients(
    g: Tensor,
    x: Tensor | None,
    d_weight: Tensor | None,
    g_b: list[Tensor],
    terms: tuple[Term, ...],
    problem: Problem,
    plan: BackwardPlan,
) -> list[Tensor | None]:
    """Gradients of every lambda and gamma, over the weight's gradient or over the tokens."""
    if plan.grad_adapter is None:
        return [None] * (2 * len(terms))
    assert x is not None
    gradients: list[Tensor | None] = []
    for i, term in enumerate(terms):
        if plan.grad_adapter == "weight":
            assert d_weight is not None
            d_af = torch.mm(term.b.t(), d_weight if problem.tall else d_weight.t())
        elif problem.tall:
            d_af = torch.mm((g_b[i] if g_b else torch.mm(g, term.b)).t(), x)
        else:
            d_af = torch.mm(torch.mm(x, term.b).t(), g)
        gradients.extend(_trained_gradients(term, d_af))
    return gradients


class _EffectiveWeight(torch.autograd.Function):
    """See `effective_weight`. Arguments: weight, (scales, dtype), then every a and b, every lambda and gamma."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, call: tuple[tuple[float, ...], torch.dtype], *tensors: Tensor) -> Tensor:
        scales, dtype = call
        flat = weight.reshape(weight.shape[0], -1).to(dtype)
        return _updated(flat, _terms(scales, tensors), flat.shape[0] >= flat.shape[1]).reshape(weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, (scales, _), *tensors = inputs
        half = 2 * len(scales)
        ctx.scales, ctx.frozen, ctx.dtype = scales, tuple(tensors[:half]), weight.dtype
        ctx.need_terms = any(ctx.needs_input_grad[2 + half :])
        ctx.save_for_backward(*tensors[half:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        terms = _terms(ctx.scales, (*ctx.frozen, *ctx.saved_tensors))
        gradients: list[Tensor | None] = [None] * (2 * len(terms))
        if ctx.need_terms:
            flat = grad.reshape(grad.shape[0], -1)
            wide_first = flat if flat.shape[0] >= flat.shape[1] else flat.t()
            d_afs = [torch.mm(term.b.t(), wide_first.to(term.b.dtype)) for term in terms]
            gradients = [d for term, d_af in zip(terms, d_afs, strict=True) for d in _trained_gradients(term, d_af)]
        d_weight = grad.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return (d_weight, None, *(None for _ in ctx.frozen), *gradients)
