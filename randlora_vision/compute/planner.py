"""The choice of the cheapest order of matrix products for one step of a layer; all orders are exact.

Shapes: M wide side, m narrow side, K = sum of N * R over the active adapters, T tokens. The update is B Af with
B (M, K) random and Af (K, m) trained; `tall` means that the wide side is the output (M = O). FLOPs count a
multiply-add as two, as `torch.utils.flop_counter` does; ties are decided by the size of the intermediates.

The cost is measured in FLOPs on every device. A device on which products are memory-bound would need another cost in
`_cost`, the only place that compares orders.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from randlora_vision.bases.products import Costs, Term
from randlora_vision.torch_internals import assumed_constant

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
    """True when the frozen weight is applied separately (dropout, quantised weights)."""
    costs: Costs


class Plan(NamedTuple):
    """How the products of a step are computed; None if a gradient is not needed, or if nothing is pinned."""

    forward: str | None = None
    """``dense`` builds W + B Af and applies it; ``factored`` applies Af and B to the tokens."""
    grad_input: str | None = None
    """The same choice for the gradient of the input."""
    grad_adapter: str | None = None
    """Computed from the weight's gradient (``weight``: B^T (g^T x)) or from the tokens (``tokens``: (g B)^T x)."""


ANY = Plan()
PINNED = {
    "auto": ANY,
    "dense": Plan("dense", "dense", "weight"),
    "factored": Plan("factored", "factored", "tokens"),
    "memory": Plan(grad_adapter="fewest bytes"),
}
"""The orders that each value of `RandLoRAConfig.compute` fixes."""


def forward_flops(problem: Problem, order: str) -> int:
    """FLOPs of computing the output."""
    t, costs = problem.tokens, problem.costs
    base = 2 * t * problem.wide * problem.narrow
    if order == "dense":
        return costs.build + base
    return (0 if problem.branch else base) + t * (costs.times_af_t + costs.times_b)


def backward_flops(problem: Problem, plan: Plan, weight_grad: bool = False) -> int:
    """FLOPs of the gradients of the input and of the adapter, if g^T x of the weight is computed anyway or not.

    `tokens` needs the wide side's tokens times B. For a tall map, the ``factored`` input gradient computes this product
    anyway; for a wide map, the ``factored`` forward does. Structured bases share more with the ``factored`` input
    gradient.
    """
    t, costs = problem.tokens, problem.costs
    total = 0 if plan.grad_input is None else forward_flops(problem, plan.grad_input)
    if plan.grad_adapter == "weight":
        product = 0 if weight_grad else 2 * t * problem.wide * problem.narrow
        total += product + costs.weight_gradient
    elif plan.grad_adapter == "tokens":
        multiplied = (plan.grad_input if problem.tall else plan.forward) == "factored"
        shared = costs.shared_wide if problem.tall else costs.shared_narrow
        saved = shared if plan.grad_input == "factored" else 0
        total += t * (costs.gradient - saved + (0 if multiplied else costs.times_b)) + costs.gradient_once
    return total


def plans(grad_input: bool, grad_adapter: bool, pinned: Plan = ANY) -> list[Plan]:
    """Every plan of a step that computes the requested gradients and respects the pinned orders."""
    forward, for_input, for_adapter = pinned
    return [
        Plan(*orders)
        for orders in itertools.product(
            (forward,) if forward else FORWARDS,
            ((for_input,) if for_input else GRAD_INPUTS) if grad_input else (None,),
            ((for_adapter,) if for_adapter else GRAD_ADAPTERS) if grad_adapter else (None,),
        )
    ]


def choose(
    problem: Problem,
    grad_input: bool = False,
    grad_adapter: bool = False,
    weight_grad: bool = False,
    pinned: Plan = ANY,
) -> Plan:
    """The cheapest plan for a whole step; its orders are chosen together because the products share work.

    With `PINNED["memory"]`, it is the cheapest of those that keep the fewest bytes for the backward pass: a wide map
    keeps x B (T, K) for `tokens`, and x (T, M) for `weight`; a tall map keeps x (T, m) for either.
    """
    if pinned.grad_adapter == PINNED["memory"].grad_adapter:
        pinned = pinned._replace(grad_adapter=None if problem.tall else "tokens")
    return min(plans(grad_input, grad_adapter, pinned), key=lambda plan: _cost(problem, plan, weight_grad))


def variants(problem: Problem, *rest: Any) -> tuple[tuple[int, Plan], ...]:
    """The plans of compiled code, whose number of tokens may not be known: (least number of tokens, plan), downwards.

    Plans change only at powers of four, the same ones for all layers, so that a model is compiled for few ranges.
    """
    found: list[tuple[int, Plan]] = []
    for start in (0, *(4**power for power in range(1, 16))):
        plan = choose(problem._replace(tokens=max(2 * start, 1)), *rest)
        if not found or found[-1][1] != plan:
            found.append((start, plan))
    return tuple(reversed(found))


def _cost(problem: Problem, plan: Plan, weight_grad: bool) -> tuple[int, int]:
    """(FLOPs of the step, numbers in its intermediates)."""
    assert plan.forward is not None
    flops = forward_flops(problem, plan.forward) + backward_flops(problem, plan, weight_grad)
    matrix = problem.narrow * (problem.inner + problem.wide)
    factored = problem.tokens * problem.inner
    return flops, sum(factored if order in ("factored", "tokens") else matrix for order in plan if order)


@functools.lru_cache(maxsize=4096)
def _remembered_variants(*arguments: Any) -> tuple[tuple[int, Plan], ...]:
    return variants(*arguments)


@assumed_constant
def _variants(problem: tuple[Any, ...], costs: tuple[int, ...], needed: tuple[bool, ...], pinned: Any) -> Any:
    """`variants` of plain tuples, which torch.compile calls while it traces."""
    return _remembered_variants(Problem._make((0, *problem, Costs(*costs))), *needed, Plan(*pinned))


Call = tuple[int, int, bool, bool, tuple[Any, ...]]
"""What fixes the plan of a call apart from its number of tokens: wide, narrow, tall and branch of `Problem`, and type
and shape of lambda of every adapter, which determine its costs.

It is a plain tuple, as every pass of a layer makes one.
"""


_KNOWN: dict[tuple[Any, ...], Plan] = {}
known: Callable[[tuple[int, Call, tuple[bool, bool, bool], Plan]], Plan | None] = _KNOWN.get
"""The plan for the number of tokens, the call, the gradients and the pinned orders, if `cheapest` has chosen it."""


def problem_of(call: Call, tokens: int, terms: Sequence[Term]) -> Problem:
    """The problem for this number of tokens, with these adapters."""
    costs, inner = terms[0].costs(), terms[0].lam.numel()
    for term in terms[1:]:
        costs, inner = costs.plus(term.costs()), inner + term.lam.numel()
    wide, narrow, tall, branch, _ = call
    return Problem(tokens, wide, narrow, inner, tall, branch, costs)


def cheapest(
    tokens: int, call: Call, terms: Sequence[Term], needed: tuple[bool, bool, bool], pinned: Plan, compiling: bool
) -> Plan:
    """`choose`, remembered, as all blocks of a model have the same problem.

    `needed` are the gradients: of the input, the adapter and the weight. While compiling, `tokens` may be a symbol.
    """
    if compiling:
        problem = problem_of(call, 0, terms)
        for start, plan in _variants(tuple(problem)[1:-1], tuple(problem.costs), needed, tuple(pinned)):
            if tokens >= start:
                return Plan(*plan)
    try:
        key = (tokens, call, needed, pinned)
        plan = _KNOWN.get(key)
    except TypeError:  # symbolic sizes cannot be looked up
        return choose(problem_of(call, tokens, terms), *needed, pinned)
    if plan is None:
        if len(_KNOWN) >= 4096:
            _KNOWN.clear()
        plan = _KNOWN[key] = choose(problem_of(call, tokens, terms), *needed, pinned)
    return plan
