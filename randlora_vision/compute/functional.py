"""The mathematics, in one place: an exact, memory-efficient autograd core for every layer, merge and export.

Shapes: O out, I in, M = max(O, I) wide, m = min(O, I) narrow, R rank, N = ceil(m / R) bases, K = N * R, T tokens.

    delta W = s * B Af            (O, I), transposed when O < I                  (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                      (K, m)

with A (R, m) and B (M, K) frozen and random, lambda (R, N) and gamma (N, m) trained. The rows of Af are in PEFT's
order, so PEFT's checkpoints give the same values. The backward pass saves lambda, gamma and the input, or the input
times B where that is smaller and sufficient. Everything else it needs (the frozen weight, the shared bases) is in
memory anyway; Af, B Af and W + s B Af are recomputed. The products are those of `bases.products.Term`, and `planner`
chooses their order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_vision.bases.products import Costs, Term
from randlora_vision.compute.planner import ANY, PINNED, Plan, Problem, choose, variants
from randlora_vision.torch_internals import assumed_constant, is_exporting, reshaped_as_own


def randlora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: tuple[Term, ...],
    out_features: int,
    dtype: torch.dtype | None = None,
    pinned: Plan = ANY,
) -> Tensor:
    """Compute ``x (W + sum of the updates)^T + bias`` in the cheapest exact order for this number of tokens.

    Args:
        x: (..., I), with any number of leading dimensions, including empty ones.
        weight: (O, I) frozen weight, or None for only the sum of the updates (the branch form that dropout and
            quantised weights need).
        bias: (O,) or None.
        terms: The active adapters' parts, at least one.
        out_features: O.
        dtype: The dtype of the matrix products; None means x's. Lambda, gamma and their gradients keep their dtype.
        pinned: Orders to use instead of the cheapest.

    Returns:
        (..., O) in `dtype`.
    """
    x = x.to(x.dtype if dtype is None else dtype)
    frozen = [tensor for term in terms for tensor in term.frozen]
    trained = [tensor for term in terms for tensor in (term.lam, term.gamma)]
    if is_exporting():  # exact for any number of tokens, and never much dearer than another order
        return _forward(x, weight, bias, terms, out_features, PINNED["factored"])
    tall = _is_tall(out_features, terms)
    tokens = x.numel() // (terms[0].gamma.shape[1] if tall else terms[0].wide)
    problem = _problem(tokens, out_features, terms, weight is None)
    needed = _needed(x, weight, trained)
    plan = _cheapest(problem, *needed, pinned)
    if not (any(needed) or (bias is not None and torch.is_grad_enabled() and bias.requires_grad)):
        return _forward(x, weight, bias, terms, out_features, plan)
    kept = []
    if plan.grad_adapter == "tokens" and not tall:  # all that this gradient needs of x, and smaller
        kept = [term.times_b(x.reshape(-1, x.shape[-1])) for term in terms]
    call = _Call(x.dtype, out_features, _blank(terms), plan, pinned, len(kept))
    return _RandLoRALinear.apply(x, weight, bias, call, *kept, *frozen, *trained)


def effective_weight(weight: Tensor, terms: tuple[Term, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``W + sum of the updates``, differentiable in lambda, gamma and W, in W's shape.

    Args:
        weight: (O, ...); more than two dimensions (convolutions) are treated as (O, I).
        terms: The active adapters' parts; their bases may have a lower precision than W (autocast).
        dtype: The dtype of the result; None means W's.
    """
    dtype = weight.dtype if dtype is None else dtype
    trained = [tensor for term in terms for tensor in (term.lam, term.gamma)]
    if is_exporting() or not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, *trained))):
        return _built(weight, terms, dtype)
    call = (_blank(terms), dtype)
    frozen = [tensor for term in terms for tensor in term.frozen]
    return _EffectiveWeight.apply(weight, call, *frozen, *trained)


def pays_to_build(tokens: int, weight: Tensor, terms: tuple[Term, ...]) -> bool:
    """True if, for this many tokens, building the effective weight (O, I) and using it is cheaper."""
    return choose(_problem(tokens, weight.shape[0], terms, branch=False)).forward == "dense"


class _Call(NamedTuple):
    """The non-tensor arguments of `_RandLoRALinear`."""

    dtype: torch.dtype
    out_features: int
    terms: tuple[Term, ...]
    """Without their tensors."""
    plan: Plan
    pinned: Plan
    kept: int
    """Number of products x B computed in advance: one per term, or zero."""


def _blank(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    # The terms without their tensors, which autograd needs as separate arguments.
    return tuple(term.with_tensors((None,) * len(term.frozen), None, None) for term in terms)


def _filled(blank: tuple[Term, ...], tensors: Sequence[Tensor]) -> tuple[Term, ...]:
    # The frozen tensors of every term come first, then lambda and gamma of every term.
    start, trained, terms = 0, _count_frozen(blank), []
    for i, term in enumerate(blank):
        end = start + len(term.frozen)
        lam, gamma = tensors[trained + 2 * i : trained + 2 * i + 2]
        terms.append(term.with_tensors(tensors[start:end], lam, gamma))
        start = end
    return tuple(terms)


def _count_frozen(terms: tuple[Term, ...]) -> int:
    return sum(len(term.frozen) for term in terms)


def _problem(tokens: int, out_features: int, terms: tuple[Term, ...], branch: bool) -> Problem:
    # These sizes are numbers even where torch.compile has symbols for those of the input.
    costs = terms[0].costs()
    for term in terms[1:]:
        costs = costs.plus(term.costs())
    inner = sum([term.lam.numel() for term in terms])
    narrow, wide = terms[0].gamma.shape[1], terms[0].wide
    return Problem(tokens, wide, narrow, inner, _is_tall(out_features, terms), branch, costs)


def _is_tall(out_features: int, terms: tuple[Term, ...]) -> bool:
    return out_features == terms[0].wide


_remembered = functools.lru_cache(maxsize=4096)(choose)
_remembered_variants = functools.lru_cache(maxsize=4096)(variants)


@assumed_constant
def _variants(problem: tuple[Any, ...], costs: tuple[int, ...], pinned: tuple[str | None, ...], *needed: bool) -> Any:
    """`variants` of plain tuples, which torch.compile calls while it traces."""
    return _remembered_variants(Problem._make((0, *problem, Costs(*costs))), *needed, Plan(*pinned))


def _cheapest(problem: Problem, for_input: bool, for_adapter: bool, for_weight: bool, pinned: Plan) -> Plan:
    """`choose` with a cache, as all blocks of a model have the same problem."""
    if torch.compiler.is_dynamo_compiling():
        fixed = tuple(problem)[1:-1]
        for start, plan in _variants(fixed, tuple(problem.costs), tuple(pinned), for_input, for_adapter, for_weight):
            if problem.tokens >= start:
                return Plan(*plan)
    try:
        return _remembered(problem, for_input, for_adapter, for_weight, pinned)
    except TypeError:  # symbolic sizes cannot be looked up
        return choose(problem, for_input, for_adapter, for_weight, pinned)


def _own(out: Tensor) -> Tensor:
    """Return `out` as a tensor that is not a view: autograd forbids in-place writes to a view from a Function."""
    return reshaped_as_own(out.contiguous(), out.shape)


def _needed(x: Tensor, weight: Tensor | None, trained: list[Tensor]) -> tuple[bool, bool, bool]:
    """Whether the input, lambda or gamma, and the weight will need gradients, as far as is known now."""
    asked = torch.is_grad_enabled()
    for_weight = weight is not None and weight.requires_grad
    return asked and x.requires_grad, asked and any(t.requires_grad for t in trained), asked and for_weight


def _updated(weight: Tensor | None, terms: tuple[Term, ...], tall: bool) -> Tensor:
    """W + the sum of the updates, or only the sum, as (O, I)."""
    for term in terms:
        weight = term.add_to(weight, tall)
    assert weight is not None
    return weight


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: tuple[Term, ...],
    out_features: int,
    plan: Plan,
    kept: Sequence[Tensor] = (),
) -> Tensor:
    """The output, in x's dtype, from x B of every term if that is known."""
    tall = _is_tall(out_features, terms)
    base = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if plan.forward == "dense":
        return F.linear(x, _updated(base, terms, tall), bias)
    flat = x.reshape(-1, x.shape[-1])
    out = None if base is None else F.linear(flat, base, bias)
    for i, term in enumerate(terms):
        if tall:
            out = term.times_b_t(out, term.times_af_t(flat))
        else:
            out = term.times_af(out, kept[i] if kept else term.times_b(flat))
    assert out is not None
    return out.reshape([*x.shape[:-1], out.shape[-1]])


class _RandLoRALinear(torch.autograd.Function):
    """See `randlora_linear`. Arguments: x, weight, bias, call, x B of every term if kept, bases, lambdas and gammas.

    A kept x B is a separate input: autograd adds the gradient that reaches x through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call, *tensors: Tensor) -> Tensor:
        kept, terms = tensors[: call.kept], _filled(call.terms, tensors[call.kept :])
        return _own(_forward(x, weight, bias, terms, call.out_features, call.plan, kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, call, *tensors = inputs
        kept, tensors = tensors[: call.kept], tensors[call.kept :]
        frozen = _count_frozen(call.terms)
        # The bases are shared constants: as context attributes they are neither copied nor offloaded per layer.
        ctx.frozen = tuple(tensors[:frozen])
        ctx.call, ctx.shape = call, x.shape
        ctx.need_terms = any(ctx.needs_input_grad[4 + call.kept + frozen :])
        need_x = ctx.needs_input_grad[1] or (ctx.need_terms and not kept)
        ctx.save_for_backward(x if need_x else None, weight, *kept, *tensors[frozen:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        call, (need_x, need_weight, need_bias) = ctx.call, ctx.needs_input_grad[:3]
        kept, trained = saved[: call.kept], saved[call.kept :]
        terms = _filled(call.terms, (*ctx.frozen, *trained))
        g = grad.reshape(-1, call.out_features)
        flat = None if x is None else x.reshape(-1, ctx.shape[-1])
        base = None if weight is None else weight.to(call.dtype)
        problem = _problem(g.shape[0], call.out_features, terms, weight is None)
        fixed = Plan(call.plan.forward, call.pinned.grad_input, "tokens" if kept else call.pinned.grad_adapter)
        plan = _cheapest(problem, need_x, ctx.need_terms, need_weight, fixed)

        d_x, contracted, d_kept = _input_gradient(g, base, terms, problem.tall, plan, kept)
        d_weight = None
        if flat is not None and (need_weight or plan.grad_adapter == "weight"):
            d_weight = torch.mm(g.t(), flat)
        d_trained = _adapter_gradients(g, flat, d_weight, contracted, terms, problem.tall, plan)
        return (
            None if d_x is None else d_x.reshape(ctx.shape),
            d_weight.to(weight.dtype) if need_weight and d_weight is not None else None,
            g.sum(0) if need_bias else None,
            None,
            *d_kept,
            *(None for _ in ctx.frozen),
            *d_trained,
        )


def _input_gradient(
    g: Tensor, base: Tensor | None, terms: tuple[Term, ...], tall: bool, plan: Plan, kept: list[Tensor]
) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
    """The input's gradient g (W + updates), the wide side's tokens times B if known, and the gradients of kept x B."""
    none: list[Tensor | None] = [None for _ in kept]
    if plan.grad_input is None:
        return None, kept, none
    if plan.grad_input == "dense":
        return torch.mm(g, _updated(base, terms, tall)), kept, none
    d_x = None if base is None else torch.mm(g, base)
    if kept:
        return d_x, kept, [term.times_af_t(g) * term.product_scale for term in terms]
    contracted = []
    for term in terms:
        if tall:
            contracted.append(term.times_b(g))
            d_x = term.times_af(d_x, contracted[-1])
        else:
            d_x = term.times_b_t(d_x, term.times_af_t(g))
    return d_x, contracted, none


def _adapter_gradients(
    g: Tensor,
    x: Tensor | None,
    d_weight: Tensor | None,
    contracted: list[Tensor],
    terms: tuple[Term, ...],
    tall: bool,
    plan: Plan,
) -> list[Tensor | None]:
    """Gradients of every lambda and gamma, computed from the weight's gradient or from the tokens."""
    if plan.grad_adapter is None:
        return [None] * (2 * len(terms))
    gradients: list[Tensor | None] = []
    for i, term in enumerate(terms):
        if plan.grad_adapter == "weight":
            assert d_weight is not None
            gradients.extend(term.weight_gradients(d_weight if tall else d_weight.t()))
            continue
        wide, narrow = (g, x) if tall else (x, g)
        u = contracted[i] if contracted else term.times_b(wide)  # type: ignore[arg-type]
        gradients.extend(term.gradients(u, narrow))  # type: ignore[arg-type]
    return gradients


def _built(weight: Tensor, terms: tuple[Term, ...], dtype: torch.dtype) -> Tensor:
    flat = weight.reshape(weight.shape[0], -1).to(dtype)
    return _updated(flat, terms, flat.shape[0] >= flat.shape[1]).reshape(weight.shape)


class _EffectiveWeight(torch.autograd.Function):
    """See `effective_weight`. Arguments: weight, (terms without tensors, dtype), the bases, every lambda and gamma."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, call: tuple[tuple[Term, ...], torch.dtype], *tensors: Tensor) -> Tensor:
        blank, dtype = call
        return _built(weight, _filled(blank, tensors), dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, (blank, _), *tensors = inputs
        frozen = _count_frozen(blank)
        ctx.terms, ctx.frozen, ctx.dtype = blank, tuple(tensors[:frozen]), weight.dtype
        ctx.need_terms = any(ctx.needs_input_grad[2 + frozen :])
        ctx.save_for_backward(*tensors[frozen:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        terms = _filled(ctx.terms, (*ctx.frozen, *ctx.saved_tensors))
        gradients: list[Tensor | None] = [None] * (2 * len(terms))
        if ctx.need_terms:
            flat = grad.reshape(grad.shape[0], -1)
            wide_first = flat if flat.shape[0] >= flat.shape[1] else flat.t()
            gradients = [d for term in terms for d in term.weight_gradients(wide_first.to(term.product_dtype))]
        d_weight = grad.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return (d_weight, None, *(None for _ in ctx.frozen), *gradients)
