"""The autograd core against autograd on the dense matrix, in float64, on every branch the planner can take.

Where more than two things vary, a test takes the combinations of `pairwise`: every pair of values meets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from randlora_vision.bases import BasesSpec, generate, get_bases
from randlora_vision.bases.dense import DenseTerm
from randlora_vision.bases.products import Costs
from randlora_vision.bases.structured import StructuredTerm
from randlora_vision.compute.functional import effective_weight, randlora_linear
from randlora_vision.compute.planner import ANY, PINNED, Plan, Problem, backward_flops, choose, forward_flops, plans

SHAPES = [(6, 4), (4, 6), (5, 5)]  # tall, wide, square with a rank that does not divide it
KINDS = ["dense", "structured"]
INPUTS = [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)]


def pairwise(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few combinations, in which any two values of different lists meet; the longest lists come first."""
    lists = [list(each) for each in values]
    numbers = list(itertools.product(*(range(len(each)) for each in lists)))
    pairs = list(itertools.combinations(range(len(lists)), 2))
    missing = {(i, j, combination[i], combination[j]) for combination in numbers for i, j in pairs}
    chosen = []
    while missing:
        best = max(numbers, key=lambda c: sum((i, j, c[i], c[j]) in missing for i, j in pairs))
        missing -= {(i, j, best[i], best[j]) for i, j in pairs}
        chosen.append(best)
    return [tuple(each[n] for each, n in zip(lists, combination, strict=True)) for combination in sorted(chosen)]


def make_terms(
    out_features: int,
    in_features: int,
    count: int = 1,
    dtype: torch.dtype = torch.float64,
    kind: str = "dense",
    rank: int = 2,
) -> tuple[DenseTerm, ...]:
    generator = torch.Generator().manual_seed(0)
    narrow, wide = sorted((out_features, in_features))
    terms: list[DenseTerm] = []
    for index in range(count):
        own = rank + index
        bases = -(-narrow // own)
        shapes = ((own, narrow), (wide, bases * own), (own, bases), (bases, narrow))
        a, b, lam, gamma = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        lam.requires_grad_()
        gamma.requires_grad_()
        if kind == "dense":
            terms.append(DenseTerm(a, b, lam, gamma, 0.7 + index))
        else:
            spec = BasesSpec("structured", 0, own, narrow, wide, bases * own)
            terms.append(get_bases(spec).term(lam, gamma, wide, 0.7 + index, dtype))
    return tuple(terms)


def trained(terms: tuple[DenseTerm, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor for term in terms for tensor in (term.lam, term.gamma))


def matrices(term: DenseTerm) -> tuple[Tensor, Tensor]:
    """A and B as dense matrices."""
    if isinstance(term, DenseTerm):
        return term.a, term.b
    shapes = ((term.lam.shape[0], term.gamma.shape[1]), (term.wide, term.lam.numel()))
    a, b = (torch.from_numpy(generate("structured", 0, i, *shape, 0)) for i, shape in enumerate(shapes))
    return a.to(term.lam.dtype), b.to(term.lam.dtype)


def with_trained(terms: tuple[DenseTerm, ...], tensors: tuple[Tensor, ...]) -> tuple[DenseTerm, ...]:
    return tuple(t._replace(lam=tensors[2 * i], gamma=tensors[2 * i + 1]) for i, t in enumerate(terms))


def dense_delta(terms: tuple[DenseTerm, ...], out_features: int, in_features: int) -> Tensor:
    """The sum of the updates by the paper's formula, one base at a time, rows in PEFT's order."""
    total = torch.zeros(out_features, in_features, dtype=terms[0].lam.dtype)
    for term in terms:
        rank, bases = term.lam.shape
        a, b = matrices(term)
        for k, n in itertools.product(range(rank), range(bases)):
            outer = torch.outer(b[:, k * bases + n], term.lam[k, n] * a[k] * term.gamma[n])
            total = total + term.scale * (outer if out_features >= in_features else outer.t())
    return total


def make_inputs(
    lead: tuple[int, ...], out_features: int, in_features: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return randn(*lead, in_features), randn(out_features, in_features), randn(out_features) if bias else None


@pytest.mark.parametrize(("lead", "shape", "bias", "kind"), pairwise(INPUTS, SHAPES, [True, False], KINDS))
def test_equals_the_dense_matrix(shape: tuple[int, int], lead: tuple[int, ...], bias: bool, kind: str) -> None:
    terms = make_terms(*shape, count=2, kind=kind)
    x, weight, b = make_inputs(lead, *shape, bias)
    leaves = [t for t in (x, weight, b, *trained(terms)) if t is not None]
    expected = F.linear(x, weight + dense_delta(terms, *shape), b)
    wanted = torch.autograd.grad(expected.sin().sum(), leaves)
    for plan in (*plans(True, True), ANY):
        out = randlora_linear(x, weight, b, terms, shape[0], pinned=plan)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected)
        for got, want in zip(torch.autograd.grad(out.sin().sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("shape", "kind", "branch"), pairwise(SHAPES[:2], KINDS, [False, True]))
@pytest.mark.parametrize("plan", plans(True, True), ids="-".join)
def test_gradcheck_of_every_plan(kind: str, shape: tuple[int, int], plan: Plan, branch: bool) -> None:
    terms = make_terms(*shape, kind=kind)
    x, weight, bias = make_inputs((3,), *shape, True)

    def call(x: Tensor, weight: Tensor, bias: Tensor, *tensors: Tensor) -> Tensor:
        base = (None, None) if branch else (weight, bias)
        return randlora_linear(x, *base, with_trained(terms, tensors), shape[0], pinned=plan)

    # A random direction is enough: test_equals_the_dense_matrix compares every entry.
    inputs = (x, weight, bias, *trained(terms))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(("lead", "shape", "bias"), pairwise(INPUTS, SHAPES, [True, False]))
def test_gradcheck_of_input_shapes(shape: tuple[int, int], bias: bool, lead: tuple[int, ...]) -> None:
    terms = make_terms(*shape)
    x, weight, b = make_inputs(lead, *shape, bias)
    weight.requires_grad_(False)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return randlora_linear(x, weight, b, with_trained(terms, tensors), shape[0])

    assert torch.autograd.gradcheck(call, (x, *trained(terms)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 2, 2), (3, 4, 2, 1)])
def test_effective_weight(shape: tuple[int, ...], kind: str) -> None:
    flat = (shape[0], int(torch.Size(shape[1:]).numel()))
    terms = make_terms(*flat, count=2, kind=kind)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = weight + dense_delta(terms, *flat).reshape(shape)
    torch.testing.assert_close(effective_weight(weight, terms), expected)

    def call(weight: Tensor, *tensors: Tensor) -> Tensor:
        return effective_weight(weight, with_trained(terms, tensors))

    assert torch.autograd.gradcheck(call, (weight, *trained(terms)))


def on_meta(terms: tuple[DenseTerm, ...]) -> tuple[DenseTerm, ...]:
    def moved(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("meta").requires_grad_(value.requires_grad)

    return tuple(type(term)(*map(moved, term)) for term in terms)  # type: ignore[arg-type]


def counted_flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def problem_of(shape: tuple[int, int], tokens: int, terms: tuple[DenseTerm, ...]) -> Problem:
    (term,) = terms
    return Problem(
        tokens, max(shape), min(shape), term.lam.numel(), shape[0] >= shape[1], branch=False, costs=term.costs()
    )


def step_flops(
    shape: tuple[int, int], tokens: int, terms: tuple[DenseTerm, ...], plan: Plan, need_x: bool = True
) -> tuple[int, int]:
    """Counted FLOPs of forward and backward, on the meta device."""
    x, weight = torch.empty(tokens, shape[1], device="meta"), torch.empty(shape, device="meta")
    x.requires_grad_(need_x)
    out: list[Tensor] = []
    forward = counted_flops(lambda: out.append(randlora_linear(x, weight, None, terms, shape[0], pinned=plan)))
    return forward, counted_flops(lambda: out[0].sum().backward())


@pytest.mark.parametrize(
    ("tokens", "shape", "kind", "need_x"),
    pairwise([1, 24, 96, 400], [(48, 24), (24, 48), (32, 32), (45, 19)], KINDS, [True, False]),
)
def test_the_planner_counts_as_the_counter_does(kind: str, shape: tuple[int, int], tokens: int, need_x: bool) -> None:
    terms = on_meta(make_terms(*shape, dtype=torch.float32, kind=kind))
    problem = problem_of(shape, tokens, terms)
    counted = {}
    for plan in plans(need_x, True):
        step = sum(step_flops(shape, tokens, terms, plan, need_x))
        counted[plan] = step
        assert step == forward_flops(problem, str(plan.forward)) + backward_flops(problem, plan)
    chosen = choose(problem, need_x, True)
    assert counted[chosen] == min(counted.values())
    assert sum(step_flops(shape, tokens, terms, ANY, need_x)) == counted[chosen]


@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (32, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_under_every_fixed_order(kind: str, shape: tuple[int, int]) -> None:
    terms = on_meta(make_terms(*shape, dtype=torch.float32, kind=kind, rank=4))
    used = set()
    for tokens in (1, 128, 65536):
        chosen = sum(step_flops(shape, tokens, terms, ANY))
        assert all(chosen <= sum(step_flops(shape, tokens, terms, plan)) for plan in plans(True, True))
        used.add(choose(problem_of(shape, tokens, terms), True, True))
    assert len(used) > 1


@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (32, 32)])
def test_never_above_peft(shape: tuple[int, int]) -> None:
    """At most the FLOPs of PEFT's layer on the same sizes."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    config = peft.RandLoraConfig(r=4, randlora_alpha=4, target_modules=["0"])
    theirs = peft.get_peft_model(model, config).to("meta")
    for tokens in (1, 64, 65536):
        x = torch.empty(tokens, shape[1], device="meta", requires_grad=True)
        reference = counted_flops(lambda x=x: theirs(x).sum().backward())  # type: ignore[misc]
        for kind in KINDS:
            terms = on_meta(make_terms(*shape, dtype=torch.float32, kind=kind, rank=4))
            assert sum(step_flops(shape, tokens, terms, ANY)) <= reference


def test_the_planner_uses_both_orders() -> None:
    costs = make_terms(3072, 768, dtype=torch.float32, rank=32)[0].costs()
    few, many = (Problem(t, 3072, 768, 768, True, False, costs) for t in (4, 4096))
    assert choose(few, True, True) == Plan("factored", "factored", "tokens")
    assert choose(many, True, True) == Plan("dense", "dense", "weight")
    assert choose(few, True, True, pinned=PINNED["dense"]) == Plan("dense", "dense", "weight")
    assert choose(many, pinned=PINNED["factored"]) == Plan("factored")


def test_equal_flops_are_decided_by_the_size_of_the_intermediates() -> None:
    free = Costs(0, 0, 0, 0, 0, 0, 0, 0)
    few, many = (Problem(tokens, 8, 8, 8, True, False, free) for tokens in (1, 1000))
    assert (choose(few).forward, choose(many).forward) == ("factored", "dense")


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
@pytest.mark.parametrize("plan", ["dense", "factored", "auto"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(128, 64), (64, 128)])
def test_half_precision_error_is_within_twice_the_references(
    shape: tuple[int, int], kind: str, plan: str, dtype: torch.dtype
) -> None:
    """The error is compared with that of PEFT's formulation in the same precision; float64 is the reference."""
    torch.manual_seed(0)
    (exact,) = make_terms(*shape, dtype=torch.float32, kind=kind, rank=8)
    a, b = matrices(exact)
    lam = (1e-3 * torch.randn(exact.lam.shape)).requires_grad_()
    gamma = torch.full(exact.gamma.shape, 1 / 64).requires_grad_()
    x, weight, g = torch.randn(256, shape[1]), torch.randn(shape) / 8, torch.randn(256, shape[0])

    def af(d: torch.dtype) -> Tensor:
        return (lam[:, :, None] * a[:, None, :] * gamma[None]).reshape(-1, 64).to(d)

    def results(out: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(out, (lam, gamma), g.to(out.dtype))
        return [tensor.double() for tensor in (out, *grads)]

    def peft(d: torch.dtype) -> Tensor:
        first, second = (af(d), b.to(d)) if shape[0] > shape[1] else (b.to(d).t(), af(d).t())
        return F.linear(x.to(d), weight.to(d)) + F.linear(F.linear(x.to(d), first), second) * 20

    if isinstance(exact, DenseTerm):
        term: DenseTerm = DenseTerm(a, b.to(dtype), lam, gamma, 20.0)
    else:
        factors = (tensor.to(dtype) for tensor in exact[:4])
        term = StructuredTerm(*factors, lam, gamma, 20.0, 128)
    ours = results(randlora_linear(x, weight, None, (term,), shape[0], dtype, PINNED[plan]))
    for mine, reference, truth in zip(ours, results(peft(dtype)), results(peft(torch.float64)), strict=True):
        assert (mine - truth).norm() <= 2 * (reference - truth).norm() + 1e-12


def test_a_wide_maps_input_is_not_kept_where_its_product_with_b_is_enough() -> None:
    """The input of an MLP's second layer is four times as large as what the adapter's gradient needs of it."""
    for kind in KINDS:
        terms = make_terms(24, 96, kind=kind, rank=4)
        x, weight, _ = make_inputs((5,), 24, 96, False)
        saved: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t.shape) or t, lambda t: t):
            randlora_linear(x, weight.detach(), None, terms, 24, pinned=PINNED["factored"])
        assert (5, 24) in saved and (5, 96) not in saved


@pytest.mark.parametrize("kind", KINDS)
def test_fewest_bytes(kind: str) -> None:
    """Many tokens, where the cheapest plan keeps a wide map's input: its product with B is kept instead."""
    tokens = 200
    for shape in ((24, 96), (96, 24), (24, 24)):
        terms = make_terms(*shape, kind=kind, rank=4)
        x, weight, _ = make_inputs((tokens,), *shape, False)
        leaves, sizes, results = (x, *trained(terms)), [], []
        for pinned in (PINNED["dense"], PINNED["memory"]):
            saved: dict[int, int] = {}

            def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
                saved[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = randlora_linear(x, weight.detach(), None, terms, shape[0], pinned=pinned)
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
            sizes.append(max(size for pointer, size in saved.items() if pointer != weight.data_ptr()))
        assert sizes == [tokens * shape[1], tokens * 24]
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_per_sample_gradients(kind: str, shape: tuple[int, int]) -> None:
    terms = make_terms(*shape, kind=kind)
    x, weight, bias = make_inputs((5,), *shape, True)
    expected = F.linear(x, weight + dense_delta(terms, *shape), bias)
    mapped = torch.vmap(lambda row: randlora_linear(row, weight, bias, terms, shape[0]))(x)
    torch.testing.assert_close(mapped, expected)

    def loss(lam: Tensor, row: Tensor) -> Tensor:
        return randlora_linear(row, weight, bias, (terms[0]._replace(lam=lam),), shape[0]).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(terms[0].lam.detach(), x.detach())
    wanted = torch.autograd.grad(expected.sin().sum(), terms[0].lam)[0]
    torch.testing.assert_close(per_sample.sum(0), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pinned", ["dense", "factored"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hosts_may_write_into_the_result(shape: tuple[int, int], pinned: str, kind: str) -> None:
    terms = make_terms(*shape, kind=kind)
    weight, bias = torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    out = randlora_linear(x, weight, bias, terms, shape[0], pinned=PINNED[pinned])
    expected = torch.autograd.grad((out + 1).square().sum(), trained(terms))
    out = randlora_linear(x, weight, bias, terms, shape[0], pinned=PINNED[pinned])
    out += 1
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), trained(terms)), expected)
