"""The mathematics, in one place: an exact, memory-efficient autograd core for every layer, merge and export.

Shapes: O out, I in, M = max(O, I) wide, m = min(O, I) narrow, R rank, N = ceil(m / R) bases, K = N * R, T tokens.

    delta W = s * B Af            (O, I), transposed when O < I                  (RandLoRA, arXiv 2502.00987)
    Af[k * N + n, j] = lambda[k, n] * A[k, j] * gamma[n, j]                      (K, m)

with A (R, m) and B (M, K) frozen and random, lambda (R, N) and gamma (N, m) trained. The rows of Af are in PEFT's
order, so PEFT's checkpoints give the same values. The backward pass saves lambda, gamma and the input, or the input
times B where that is smaller and sufficient. Everything else it needs (the frozen weight, the shared bases) is in
memory anyway; Af, B Af and W + s B Af are recomputed. The products are those of `bases.products.Products`, `planner`
chooses their order, and `orders` computes them in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_vision.bases.products import Products, Term
from randlora_vision.compute import orders
from randlora_vision.compute.planner import ANY, Call, Plan, cheapest, choose, known, problem_of
from randlora_vision.torch_internals import (
    eager_unsafe_view,
    is_exporting,
    is_jit_tracing,
    is_proxied,
    torch_exports,
    transforms_are_active,
    unsafe_view,
    writes_are_private,
)


def randlora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: tuple[Term, ...],
    out_features: int,
    dtype: torch.dtype | None = None,
    pinned: Plan = ANY,
    compiling: bool | None = None,
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
        compiling: Result of ``torch.compiler.is_dynamo_compiling()``, if the caller knows it.

    Returns:
        (..., O) in `dtype`.
    """
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    ready: list[Products] = []
    for term in terms:  # not a comprehension, which is one more call per pass of a layer
        ready.append(term.prepared())
    narrow, features = terms[0].gamma.shape[1], x.shape[-1]
    if compiling is None:
        compiling = torch.compiler.is_dynamo_compiling()
    # In compiled code, the sizes of x may be symbols; those of Parameters are not.
    tall = out_features == ready[0].wide if compiling else features == narrow
    wide = ready[0].wide if compiling else max(features, out_features)
    flat = x.reshape(-1, features)
    plain = not compiling and type(x) is Tensor  # torch.export traces with tensors of another type
    if (not plain and torch_exports()) or (not compiling and is_jit_tracing()):
        # Exact for any number of tokens, and never much dearer than another order.
        return orders.output(flat, weight, bias, ready, tall, "factored").reshape(*x.shape[:-1], out_features)
    for_input = for_adapter = for_weight = for_bias = False
    trained: list[Tensor] = []
    kinds: tuple[Any, ...] = ()
    for term in ready:
        kinds += (type(term), term.lam.shape)
        trained += (term.lam, term.gamma)
    if torch.is_grad_enabled():
        for_input, for_weight = x.requires_grad, weight is not None and weight.requires_grad
        for_bias = bias is not None and bias.requires_grad
        for tensor in trained:
            for_adapter = for_adapter or tensor.requires_grad
    call = (wide, narrow, tall, weight is None, () if compiling else kinds)
    needed = (for_input, for_adapter, for_weight)
    plan = known((flat.shape[0], call, needed, pinned)) if plain else None
    if plan is None:
        plan = cheapest(flat.shape[0], call, ready, needed, pinned, compiling)
    shape, view = (*x.shape[:-1], out_features), unsafe_view if compiling else eager_unsafe_view
    if not (for_input or for_adapter or for_weight or for_bias):
        out = orders.output(flat, weight, bias, ready, tall, plan.forward, private=writes_are_private())
        return view(out.contiguous(), shape)
    kept: list[Tensor] = []
    if plan.grad_adapter == "tokens" and not tall:  # all that this gradient needs of x, and smaller
        for term in ready:
            kept.append(term.times_b(flat))
    # The compiler and transforms replace the tensors that a function computes with, and a graph may run with gradients.
    if compiling or transforms_are_active() or is_proxied() is not None:
        frozen = [tensor for term in ready for tensor in term.frozen]
        step = (call, _blank(ready), plan, pinned, len(kept), len(frozen))
        out = _RandLoRALinear.apply(flat, weight, bias, step, *kept, *frozen, *trained)
    else:
        out = _PlainLinear.apply(flat, weight, bias, (call, ready, plan, pinned, len(kept), 0), *kept, *trained)
    return view(out.contiguous(), shape)  # the products of structured bases may end in a view


def effective_weight(weight: Tensor, terms: tuple[Term, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``W + sum of the updates``, differentiable in lambda, gamma and W, in W's shape.

    W is (O, I) or a convolution's (O, ...). The bases of `terms` may have a lower precision than W (autocast); the
    result has `dtype`, or else W's.
    """
    dtype = weight.dtype if dtype is None else dtype
    ready = [term.prepared() for term in terms]
    trained = [tensor for term in ready for tensor in (term.lam, term.gamma)]
    if is_exporting() or not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, *trained))):
        return orders.built(weight, ready, dtype)
    if torch.compiler.is_dynamo_compiling() or transforms_are_active():
        frozen = [tensor for term in ready for tensor in term.frozen]
        return _EffectiveWeight.apply(weight, (_blank(ready), dtype, len(frozen)), *frozen, *trained)
    return _PlainWeight.apply(weight, (ready, dtype, None), *trained)


def pays_to_build(tokens: int, weight: Tensor, terms: tuple[Term, ...]) -> bool:
    """True if, for this many tokens, building the effective weight (O, I) and using it is cheaper."""
    wide, narrow = terms[0].wide, terms[0].gamma.shape[1]
    call = (wide, narrow, weight.shape[0] == wide, False, ())
    return choose(problem_of(call, tokens, terms)).forward == "dense"


_Step = tuple[Call, Sequence[Products], Plan, Plan, int, int]
"""What `_RandLoRALinear` and `_PlainLinear` get besides tensors: call, terms, plan, pinned orders, kept, frozen.

`kept` is the number of products x B computed in advance, one per term or zero, and `frozen` the number of tensors of
the bases among the arguments: the terms have none then. It is a plain tuple, as every pass of a layer makes one.
"""


def _blank(terms: Sequence[Products]) -> tuple[Products, ...]:
    return tuple(term.with_tensors((None,) * len(term.frozen), None, None) for term in terms)


def _filled(terms: Sequence[Products], frozen: Sequence[Tensor], trained: Sequence[Tensor]) -> list[Products]:
    """The terms with these tensors: all bases, and then lambda and gamma of every term."""
    start, filled = 0, []
    for i, term in enumerate(terms):
        end = start + len(term.frozen)
        filled.append(term.with_tensors(frozen[start:end], trained[2 * i], trained[2 * i + 1]))
        start = end
    return filled


class _RandLoRALinear(torch.autograd.Function):
    """See `randlora_linear`. Arguments: x, weight, bias, step, x B of every term if kept, bases, lambdas and gammas.

    A kept x B is a separate input: autograd adds the gradient that reaches x through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, step: _Step, *tensors: Tensor) -> Tensor:
        (_, _, tall, _, _), blank, plan, _, kept, frozen = step
        terms = _filled(blank, tensors[kept : kept + frozen], tensors[kept + frozen :])
        return orders.output(x, weight, bias, terms, tall, plan.forward, tensors[:kept])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, kept, frozen = ctx.step = inputs[3]
        kept += 4
        trained = kept + frozen
        # The bases are shared constants: as context attributes they are neither copied nor offloaded per layer.
        ctx.frozen = inputs[kept:trained]
        ctx.need_terms = True in ctx.needs_input_grad[trained:]
        need_x = ctx.needs_input_grad[1] or (ctx.need_terms and kept == 4)
        ctx.save_for_backward(inputs[0] if need_x else None, inputs[1], *inputs[4:kept], *inputs[trained:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        call, blank, planned, pinned, count, frozen = ctx.step
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        kept = saved[:count]
        terms = blank if ctx.frozen is None else _filled(blank, ctx.frozen, saved[count:])
        base = None if weight is None else weight.to(grad.dtype)
        fixed = Plan(planned.forward, pinned.grad_input, "tokens" if kept else pinned.grad_adapter)
        needed, compiling = (need_x, ctx.need_terms, need_weight), torch.compiler.is_dynamo_compiling()
        plan = cheapest(grad.shape[0], call, terms, needed, fixed, compiling)
        d_x, d_weight, d_kept, d_trained = orders.gradients(
            grad, x, base, terms, call[2], plan, need_weight, kept, not compiling and writes_are_private()
        )
        return (
            d_x,
            None if d_weight is None else d_weight.to(weight.dtype),
            grad.sum(0) if need_bias else None,
            None,
            *d_kept,
            *(None,) * frozen,
            *d_trained,
        )


class _PlainLinear(torch.autograd.Function):
    """`_RandLoRALinear` outside of torch.func and torch.compile, with complete terms and without bases as arguments.

    PyTorch binds the arguments of a function with `setup_context` to their names, which takes longer than a small
    product of matrices.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, step: _Step, *tensors: Tensor
    ) -> Tensor:
        (_, _, tall, _, _), terms, plan, _, kept, _ = ctx.step = step
        ctx.frozen, ctx.need_terms = None, True in ctx.needs_input_grad[4 + kept :]
        need_x = ctx.needs_input_grad[1] or (ctx.need_terms and not kept)
        # Lambda and gamma are those of the terms: autograd checks that nothing writes to them before the backward pass.
        ctx.save_for_backward(x if need_x else None, weight, *tensors)
        return orders.output(x, weight, bias, terms, tall, plan.forward, tensors[:kept], private=True)

    backward = _RandLoRALinear.backward


class _EffectiveWeight(torch.autograd.Function):
    """See `effective_weight`. Arguments: weight, (terms, dtype, frozen), bases, every lambda and gamma.

    `frozen` is the number of tensors of the bases among the arguments, or None if the terms are complete.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, call: tuple[Any, torch.dtype, int | None], *tensors: Tensor) -> Tensor:
        terms, dtype, frozen = call
        if frozen is not None:
            terms = _filled(terms, tensors[:frozen], tensors[frozen:])
        return orders.built(weight, terms, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, (ctx.terms, _, frozen), *tensors = inputs
        ctx.dtype, ctx.passed = weight.dtype, frozen or 0
        ctx.frozen = None if frozen is None else tuple(tensors[:frozen])
        ctx.need_terms = True in ctx.needs_input_grad[2 + ctx.passed :]
        ctx.save_for_backward(*tensors[ctx.passed :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trained, private = ctx.saved_tensors, writes_are_private()
        terms = ctx.terms if ctx.frozen is None else _filled(ctx.terms, ctx.frozen, trained)
        gradients: list[Tensor | None] = [None] * (2 * len(terms))
        if ctx.need_terms:
            flat = grad.reshape(grad.shape[0], -1)
            wide_first = flat if flat.shape[0] >= flat.shape[1] else flat.t()
            for i, term in enumerate(terms):
                gradients[2 * i : 2 * i + 2] = term.weight_gradients(wide_first.to(term.product_dtype), private)
        d_weight = grad.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return (d_weight, None, *(None,) * ctx.passed, *gradients)


class _PlainWeight(torch.autograd.Function):
    """`_EffectiveWeight` outside of torch.func and torch.compile, as `_PlainLinear` is."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = _EffectiveWeight.forward(*args)
        _EffectiveWeight.setup_context(ctx, args, output)
        return output

    backward = _EffectiveWeight.backward
