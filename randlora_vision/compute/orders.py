"""The products of one step of a layer in the orders that a plan names.

Shapes: O out, I in, T tokens (rows), K = N * R; the wide side is the output if `tall`. See `functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_vision.bases.products import Products
from randlora_vision.compute.planner import Plan


def updated(weight: Tensor | None, terms: Sequence[Products], tall: bool) -> Tensor:
    """W + the sum of the updates, or only the sum, as (O, I)."""
    for term in terms:
        weight = term.add_to(weight, tall)
    assert weight is not None
    return weight


def built(weight: Tensor, terms: Sequence[Products], dtype: torch.dtype) -> Tensor:
    """W + the sum of the updates in W's shape (O, ...)."""
    flat = weight.reshape(weight.shape[0], -1).to(dtype)
    return updated(flat, terms, flat.shape[0] >= flat.shape[1]).reshape(weight.shape)


def output(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    terms: Sequence[Products],
    tall: bool,
    forward: str | None,
    kept: Sequence[Tensor] = (),
    private: bool = False,
) -> Tensor:
    """The output (T, O) of x (T, I), in x's dtype, from x B of every term if that is known."""
    out = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if forward == "dense":
        for term in terms:
            out = term.add_to(out, tall)
        return F.linear(x, out, bias)  # type: ignore[arg-type]
    out = None if out is None else F.linear(x, out, bias)
    for i, term in enumerate(terms):
        if tall:
            out = term.times_b_t(out, term.times_af_t(x, private=private)[0])
        else:
            out = term.times_af(out, kept[i] if kept else term.times_b(x), private)[0]
    return out  # type: ignore[return-value]


def gradients(
    g: Tensor,
    x: Tensor | None,
    base: Tensor | None,
    terms: Sequence[Products],
    tall: bool,
    plan: Plan,
    weight_grad: bool,
    kept: Sequence[Tensor] = (),
    private: bool = False,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The gradients of the input (T, I), of the weight, of every x B that was kept, and of every lambda and gamma.

    Args:
        g: The output's gradient (T, O).
        x: The input (T, I); None if `kept` replaces it, or if no gradient needs it.
        base: The frozen weight (O, I) in g's dtype, or None in the branch form.
        terms: The active adapters' parts.
        tall: True when the wide side is the output.
        plan: The orders.
        weight_grad: True if the frozen weight's gradient is needed.
        kept: x B of every term, if the forward pass computed it in advance.
        private: See `Products`.
    """
    d_kept: list[Tensor | None] = [None] * len(kept)
    wide_side: list[Tensor] = list(kept)  # the wide side's tokens times B
    shared: list[dict[str, Any]] = [{} for _ in terms]  # what the input's gradient and those of the adapter both need
    d_x = None
    if plan.grad_input == "dense":
        d_x = torch.mm(g, updated(base, terms, tall))
    elif plan.grad_input is not None:
        d_x = None if base is None else torch.mm(g, base)
        for i, term in enumerate(terms):
            if tall:
                wide_side.append(term.times_b(g))
                d_x, shared[i]["classes"] = term.times_af(d_x, wide_side[i], private)
            elif kept:
                d_kept[i], shared[i]["projected"] = term.times_af_t(g, term.scale, private)
            else:
                d_x = term.times_b_t(d_x, term.times_af_t(g, private=private)[0])

    d_weight = None
    if x is not None and (weight_grad or plan.grad_adapter == "weight"):
        d_weight = torch.mm(g.t(), x)
    d_trained: list[Tensor | None] = [None] * (2 * len(terms))
    for i, term in enumerate(terms):
        if plan.grad_adapter == "weight":
            assert d_weight is not None
            d_trained[2 * i : 2 * i + 2] = term.weight_gradients(d_weight if tall else d_weight.t(), private)
        elif plan.grad_adapter == "tokens":
            wide, narrow = (g, x) if tall else (x, g)
            u = wide_side[i] if wide_side else term.times_b(wide)  # type: ignore[arg-type]
            d_trained[2 * i : 2 * i + 2] = term.gradients(u, narrow, private, **shared[i])  # type: ignore[arg-type]
    return d_x, d_weight if weight_grad else None, d_kept, d_trained
