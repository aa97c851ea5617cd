"""The autograd core against autograd on the dense matrix, in float64, on every branch the planner can take."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from randlora_vision.functional import Term, effective_weight, randlora_linear
from randlora_vision.planner import (
    FORWARDS,
    BackwardPlan,
    Problem,
    backward_flops,
    backward_plans,
    forward_flops,
    plan_backward,
    plan_forward,
)

SHAPES = [(6, 4), (4, 6), (5, 5)]  # tall, wide, square with a rank that does not divide it
INPUTS = [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)]


def make_terms(
    out_features: int, in_features: int, count: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Term, ...]:
    generator = torch.Generator().manual_seed(0)
    narrow, wide = sorted((out_features, in_features))
    terms = []
    for index in range(count):
        rank = 2 + index
        bases = -(-narrow // rank)
        shapes = ((rank, narrow), (wide, bases * rank), (rank, bases), (bases, narrow))
        a, b, lam, gamma = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        terms.append(Term(a, b, lam.requires_grad_(), gamma.requires_grad_(), 0.7 + index))
    return tuple(terms)


def trained(terms: tuple[Term, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor for term in terms for tensor in (term.lam, term.gamma))


def with_trained(terms: tuple[Term, ...], tensors: tuple[Tensor, ...]) -> tuple[Term, ...]:
    return tuple(t._replace(lam=tensors[2 * i], gamma=tensors[2 * i + 1]) for i, t in enumerate(terms))


def dense_delta(terms: tuple[Term, ...], out_features: int, in_features: int) -> Tensor:
    """The sum of the updates by the paper's formula, one base at a time, rows in PEFT's order."""
    total = torch.zeros(out_features, in_features, dtype=terms[0].lam.dtype)
    for term in terms:
        rank, bases = term.lam.shape
        for k, n in itertools.product(range(rank), range(bases)):
            outer = torch.outer(term.b[:, k * bases + n], term.lam[k, n] * term.a[k] * term.gamma[n])
            total = total + term.scale * (outer if out_features >= in_features else outer.t())
    return total


def make_inputs(
    lead: tuple[int, ...], out_features: int, in_features: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return randn(*lead, in_features), randn(out_features, in_features), randn(out_features) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", INPUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_matrix(shape: tuple[int, int], lead: tuple[int, ...], bias: bool) -> None:
    terms = make_terms(*shape, count=2)
    x, weight, b = make_inputs(lead, *shape, bias)
    leaves = [t for t in (x, weight, b, *trained(terms)) if t is not None]
    expected = F.linear(x, weight + dense_delta(terms, *shape), b)
    wanted = torch.autograd.grad(expected.sin().sum(), leaves)
    for forward, backward in itertools.product((*FORWARDS, None), (*backward_plans(True, True), None)):
        out = randlora_linear(x, weight, b, terms, shape[0], forward_plan=forward, backward_plan=backward)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected)
        for got, want in zip(torch.autograd.grad(out.sin().sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("branch", [False, True], ids=["fused", "branch"])
@pytest.mark.parametrize("plan", backward_plans(True, True), ids=lambda plan: "-".join(plan))
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_of_every_plan(shape: tuple[int, int], forward: str, plan: BackwardPlan, branch: bool) -> None:
    terms = make_terms(*shape)
    x, weight, bias = make_inputs((3,), *shape, True)

    def call(x: Tensor, weight: Tensor, bias: Tensor, *tensors: Tensor) -> Tensor:
        base = (None, None) if branch else (weight, bias)
        return randlora_linear(
            x, *base, with_trained(terms, tensors), shape[0], forward_plan=forward, backward_plan=plan
        )

    inputs = (x, weight, bias, *trained(terms))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("lead", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_of_input_shapes(shape: tuple[int, int], bias: bool, lead: tuple[int, ...]) -> None:
    terms = make_terms(*shape)
    x, weight, b = make_inputs(lead, *shape, bias)
    weight.requires_grad_(False)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return randlora_linear(x, weight, b, with_trained(terms, tensors), shape[0])

    assert torch.autograd.gradcheck(call, (x, *trained(terms)))


@pytest.mark.parametrize("shape", [*SHAPES, (6, 2, 2), (3, 4, 2, 1)])
def test_effective_weight(shape: tuple[int, ...]) -> None:
    flat = (shape[0], int(torch.Size(shape[1:]).numel()))
    terms = make_terms(*flat, count=2)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = weight + dense_delta(terms, *flat).reshape(shape)
    torch.testing.assert_close(effective_weight(weight, terms), expected)

    def call(weight: Tensor, *tensors: Tensor) -> Tensor:
        return effective_weight(weight, with_trained(terms, tensors))

    assert torch.autograd.gradcheck(call, (weight, *trained(terms)))


def counted_flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 24, 48, 96, 400])
@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (32, 32)])
def test_the_chosen_plan_has_the_fewest_counted_flops(shape: tuple[int, int], tokens: int, need_x: bool) -> None:
    terms = make_terms(*shape, dtype=torch.float32)
    term = terms[0]
    x = torch.randn(tokens, shape[1], requires_grad=need_x)
    weight = torch.randn(shape)
    problem = Problem(tokens, max(shape), min(shape), term.lam.numel(), shape[0] >= shape[1], False)
    forwards, backwards = {}, {}
    for forward, backward in itertools.product(FORWARDS, backward_plans(need_x, True)):
        out: list[Tensor] = []

        def run(forward: str = forward, backward: BackwardPlan = backward, out: list[Tensor] = out) -> None:
            out.append(randlora_linear(x, weight, None, terms, shape[0], None, forward, backward))

        forwards[forward] = counted_flops(run)
        backwards[backward] = counted_flops(out[0].sum().backward)
    # the reductions to lambda's and gamma's gradients are common to all orders
    reductions = {counted - backward_flops(problem, plan) for plan, counted in backwards.items()}
    assert forwards == {order: forward_flops(problem, order) for order in FORWARDS}
    assert len(reductions) == 1
    assert forwards[plan_forward(problem)] == min(forwards.values())
    assert backwards[plan_backward(problem, need_x, True)] == min(backwards.values())


def test_the_planner_uses_both_orders() -> None:
    few, many = (Problem(t, 3072, 768, 768, True, False) for t in (4, 4096))
    assert (plan_forward(few), plan_forward(many)) == ("factored", "dense")
    assert plan_backward(few, True, True) == BackwardPlan("factored", "tokens")
    assert plan_backward(many, True, True) == BackwardPlan("dense", "weight")


def test_frozen_adapter_keeps_no_input() -> None:
    terms = tuple(t._replace(lam=t.lam.detach(), gamma=t.gamma.detach()) for t in make_terms(6, 4))
    x, weight, _ = make_inputs((3,), 6, 4, False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = randlora_linear(x, weight.detach(), None, terms, 6)
    assert x.data_ptr() not in saved
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected = torch.autograd.grad(F.linear(x, weight + dense_delta(terms, 6, 4)).sum(), x)
    torch.testing.assert_close(grad, expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", FORWARDS)
def test_half_precision_error_is_within_twice_the_references(dtype: torch.dtype, plan: str) -> None:
    """Judged against PEFT's formulation in the same precision; float64 is the truth for both."""
    torch.manual_seed(0)
    narrow, wide, rank, tokens = 64, 128, 8, 256
    bases = narrow // rank
    a, b = torch.randn(rank, narrow), torch.randn(wide, narrow)
    lam = (1e-3 * torch.randn(rank, bases)).requires_grad_()
    gamma = torch.full((bases, narrow), 1 / narrow).requires_grad_()
    x, weight = torch.randn(tokens, narrow), torch.randn(wide, narrow) / 8
    g = torch.randn(tokens, wide)

    def af(d: torch.dtype) -> Tensor:
        return (lam[:, :, None] * a[:, None, :] * gamma[None]).reshape(-1, narrow).to(d)

    def results(out: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(out, (lam, gamma), g.to(out.dtype))
        return [tensor.double() for tensor in (out, *grads)]

    def peft(d: torch.dtype) -> Tensor:
        return F.linear(x.to(d), weight.to(d)) + F.linear(F.linear(x.to(d), af(d)), b.to(d)) * 20

    term = Term(a, b.to(dtype), lam, gamma, 20.0)
    ours = results(randlora_linear(x, weight, None, (term,), wide, dtype, forward_plan=plan))
    for mine, reference, truth in zip(ours, results(peft(dtype)), results(peft(torch.float64)), strict=True):
        assert (mine - truth).norm() <= 2 * (reference - truth).norm() + 1e-12


def test_vmap_and_per_sample_gradients() -> None:
    terms = make_terms(6, 4)
    x, weight, bias = make_inputs((5,), 6, 4, True)
    expected = F.linear(x, weight + dense_delta(terms, 6, 4), bias)
    torch.testing.assert_close(torch.vmap(lambda row: randlora_linear(row, weight, bias, terms, 6))(x), expected)

    def loss(lam: Tensor, row: Tensor) -> Tensor:
        return randlora_linear(row, weight, bias, (terms[0]._replace(lam=lam),), 6).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(terms[0].lam.detach(), x.detach())
    wanted = torch.autograd.grad(expected.sin().sum(), terms[0].lam)[0]
    torch.testing.assert_close(per_sample.sum(0), wanted)
