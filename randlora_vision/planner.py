"""Which order of matrix products is cheapest: a choice among exact equals.

Shapes: M wide side, m narrow side, K = sum of N * R over the active adapters, T tokens. The update is B Af with
B (M, K) random and Af (K, m) trained; `tall` says that the wide side is the output (M = O). FLOPs count a
multiply-add as two, as `torch.utils.flop_counter` does.
"""

from __future__ import annotations

from typing import NamedTuple

FORWARDS = ("dense", "factored")
GRAD_INPUTS = ("dense", "factored")
GRAD_ADAPTERS = ("weight", "tokens")


class Problem(NamedTuple):
    """One call of an adapted linear map."""

    tokens: int
    wide: int
    narrow: int
    inner: int
    tall: bool
    """True when the wide side is the output."""
    branch: bool
    """True when the frozen weight is applied elsewhere (dropout, quantised weights)."""


class BackwardPlan(NamedTuple):
    """How the backward pass computes its two products; None where a gradient is not needed."""

    grad_input: str | None
    grad_adapter: str | None


def forward_flops(problem: Problem, order: str) -> int:
    """FLOPs of the output.

    ``dense`` builds W + B Af and applies it; ``factored`` applies Af and B to the tokens.
    """
    t, wide, narrow, inner, _, branch = problem
    if order == "dense":
        return 2 * wide * narrow * inner + 2 * t * wide * narrow
    return (0 if branch else 2 * t * wide * narrow) + 2 * t * inner * (wide + narrow)


def backward_flops(problem: Problem, plan: BackwardPlan, weight_grad: bool = False) -> int:
    """FLOPs of the input's and the adapter's gradients.

    The adapter's gradient goes over the weight's (``weight``: B^T (g^T x)) or over the tokens (``tokens``:
    (g B)^T x). For a tall map the ``factored`` input gradient and ``tokens`` share g B.

    Args:
        problem: The call.
        plan: The orders.
        weight_grad: True if the frozen weight's own gradient g^T x is computed anyway.
    """
    t, wide, narrow, inner, tall, _ = problem
    total = 0
    if plan.grad_input is not None:
        total += forward_flops(problem, plan.grad_input)
    if plan.grad_adapter == "weight":
        total += (0 if weight_grad else 2 * t * wide * narrow) + 2 * wide * narrow * inner
    elif plan.grad_adapter == "tokens":
        shared = tall and plan.grad_input == "factored"
        total += (0 if shared else 2 * t * wide * inner) + 2 * t * narrow * inner
    return total


def plan_forward(problem: Problem) -> str:
    """The cheapest forward order."""
    return "dense" if forward_flops(problem, "dense") < forward_flops(problem, "factored") else "factored"


def backward_plans(grad_input: bool, grad_adapter: bool) -> list[BackwardPlan]:
    """Every order of the backward pass that yields the gradients asked for."""
    inputs = GRAD_INPUTS if grad_input else (None,)
    adapters = GRAD_ADAPTERS if grad_adapter else (None,)
    return [BackwardPlan(a, b) for a in inputs for b in adapters]


def plan_backward(problem: Problem, grad_input: bool, grad_adapter: bool, weight_grad: bool = False) -> BackwardPlan:
    """The cheapest backward orders, chosen together because they share work."""
    best, cost = None, None
    for plan in backward_plans(grad_input, grad_adapter):
        flops = backward_flops(problem, plan, weight_grad)
        if cost is None or flops < cost:
            best, cost = plan, flops
    assert best is not None
    return best
