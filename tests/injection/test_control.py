"""Adapters at run time: the reference is W + the sum of the dense updates, and undoing is exact bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.operations import python_calls
from randlora_vision import (
    InjectionReport,
    RandLoRAConfig,
    adapter_parameters,
    delete_adapter,
    disabled,
    inject,
    merge,
    remove,
    set_active,
    set_scale,
    unmerge,
)
from randlora_vision.injection.record import own_record
from randlora_vision.layers.adapted import adapted_modules
from tests.helpers import dense_weights, mlp, parameter_path, randomize, snapshot, tensor_bytes, vit

CONFIGS = {
    "a": RandLoRAConfig(rank=2, target_modules=["0", "2"]),
    "b": RandLoRAConfig(rank=3, alpha=7.0, seed=5, bases="sparse", target_modules=["0", "2"]),
    "c": RandLoRAConfig(rank=4, seed=9, bases="normal", init="gamma-zero", target_modules=["0"]),
}
X = torch.linspace(-2, 2, 24).reshape(3, 8)


def adapted(*names: str) -> tuple[nn.Sequential, nn.Sequential, dict[str, InjectionReport]]:
    """A base, an adapted copy of it and the reports of its adapters."""
    base = mlp()
    model = copy.deepcopy(base)
    reports = {name: inject(model, CONFIGS[name], name) for name in names}
    for i, name in enumerate(names):
        randomize(model, name, seed=i)
    return base, model, reports


def truth(base: nn.Module, model: nn.Module, reports: dict[str, InjectionReport], scales: dict[str, float]) -> Tensor:
    """The float64 output of W + sum of scale * dense update."""
    exact = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, scale in scales.items():
            for path, weight in dense_weights(base, model.state_dict(), reports[name], scale).items():
                exact.get_parameter(path).add_(weight - base.get_parameter(path).double())
        return exact(X.double())


def check(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(model(X).double(), expected, rtol=1e-4, atol=1e-4)


def test_active_adapters_add_up_at_their_scales() -> None:
    base, model, reports = adapted("a", "b", "c")
    check(model, truth(base, model, reports, {"a": 1, "b": 1, "c": 1}))
    set_scale(model, 0.5, "b")
    set_scale(model, -2.0, "c")
    check(model, truth(base, model, reports, {"a": 1, "b": 0.5, "c": -2}))
    set_active(model, ["c", "a"])
    check(model, truth(base, model, reports, {"a": 1, "c": -2}))
    set_scale(model, 0)
    assert torch.equal(model(X), base(X))
    set_scale(model, 1.0)
    set_active(model, "b")
    check(model, truth(base, model, reports, {"b": 1}))
    set_active(model, [])
    assert torch.equal(model(X), base(X))


def test_only_active_trainable_adapters_require_gradients() -> None:
    _, model, _ = adapted("a", "b")
    set_active(model, "b")
    for name in ("a", "b"):
        assert all(parameter.requires_grad == (name == "b") for _, parameter in adapter_parameters(model, name))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_randlora_" not in n)
    set_active(model, ["a", "b"])
    assert all(parameter.requires_grad for _, parameter in adapter_parameters(model))


def test_an_optimizer_step_changes_only_the_active_adapter() -> None:
    base, model, _ = adapted("a", "b")
    set_active(model, "b")
    before = {name: tensor_bytes(tensor) for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if tensor_bytes(tensor) != before[name]}
    assert changed == {name for name in before if name.endswith("_b")} and len(changed) == 4


def test_adapter_parameters_yields_each_tensor_once() -> None:
    _, model, _ = adapted("a", "b", "c")
    for name, count in ((None, 10), ("a", 4), ("c", 2)):
        found = list(adapter_parameters(model, name))
        assert len(found) == count == len({id(p) for _, p in found}) == len({n for n, _ in found})
    registered = {id(p) for n, p in model.named_parameters() if "_randlora_" in n}
    assert {id(p) for _, p in adapter_parameters(model)} == registered


@pytest.mark.parametrize("state", ["active", "merged", "part-merged", "inactive"])
def test_disabled_is_the_base_and_puts_everything_back(state: str) -> None:
    base, model, _ = adapted("a", "b")
    if state != "active":
        merge(model, ["a"] if state == "part-merged" else None)
    if state == "inactive":
        set_active(model, [])
    out, merged = model(X), model[0].base_weight() if state == "merged" else None
    for _ in range(2):
        with pytest.raises(KeyError), disabled(model):
            assert torch.equal(model(X), base(X))
            with disabled(model):
                assert torch.equal(model(X), base(X))
            assert torch.equal(model(X), base(X))
            raise KeyError
        assert torch.equal(model(X), out)
    if merged is not None:
        assert torch.equal(model[0].base_weight(), merged)
        unmerge(model)
        check(model, out.double())


def test_an_adapter_injected_while_disabled_does_not_act_until_after() -> None:
    base, model, _ = adapted("c")
    with disabled(model):
        inject(model, CONFIGS["a"], "a")
        randomize(model, "a")
        assert torch.equal(model(X), base(X))
    assert not torch.allclose(model(X), base(X), atol=1e-3)


def test_removal_within_disabled_is_final() -> None:
    base, model, _ = adapted("a")
    merge(model)
    with disabled(model):
        remove(model)
    assert torch.equal(model(X), base(X)) and type(model[0]) is nn.Linear


def test_deletion_within_disabled_is_final() -> None:
    base, model, _ = adapted("a", "b")
    merge(model, "a")
    with disabled(model):
        delete_adapter(model, "a")
        assert torch.equal(model(X), base(X))
    alone = adapted("a", "b")[1]
    set_active(alone, "b")
    assert torch.equal(model(X), alone(X))


# Merging.


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_merging_and_unmerging_in_any_order(order: tuple[str, str]) -> None:
    base, model, reports = adapted("a", "b")
    originals = [model[0].base_weight(), model[2].base_weight()]
    exact = truth(base, model, reports, {"a": 1, "b": 1})
    for step, names in ((merge, "a"), (merge, "b"), (unmerge, order[0]), (unmerge, order[1])):
        step(model, names)
        check(model, exact)
    assert model[0].base_weight() is originals[0] and model[2].base_weight() is originals[1]
    remove(model)
    assert {n: tensor_bytes(t) for n, t in model.state_dict().items()} == {
        n: tensor_bytes(t) for n, t in base.state_dict().items()
    }


def test_merged_weights_equal_the_formula_and_cost_nothing_at_run_time() -> None:
    base, model, reports = adapted("a", "b")
    set_scale(model, 0.5, "b")
    trained = model.state_dict()
    merge(model)
    for name, path in ((target.name, parameter_path(base, target.name)) for target in reports["a"].targets):
        exact = base.get_parameter(path).double()
        for adapter, scale in (("a", 1.0), ("b", 0.5)):
            weight = dense_weights(base, trained, reports[adapter], scale)[path]
            exact = exact + weight - base.get_parameter(path).double()
        torch.testing.assert_close(model.get_submodule(name).weight.double(), exact, rtol=1e-5, atol=1e-5)
        assert model.get_submodule(name).weight is model.get_submodule(name).base_weight()


def test_merge_then_remove_is_a_plain_model() -> None:
    base, model, _ = adapted("a", "b")
    out = model(X)
    merge(model, "a")
    remove(model)
    _, only_a, _ = adapted("a")
    assert torch.allclose(model(X), only_a(X), atol=1e-4) and not torch.allclose(model(X), out, atol=1e-3)
    assert snapshot(model)["types"] == snapshot(base)["types"]
    assert snapshot(model)["attributes"] == snapshot(base)["attributes"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_broken_adapters_and_touches_nothing(value: float) -> None:
    _, model, _ = adapted("a", "b")
    merge(model, "a")
    with torch.no_grad():
        model[2].weight_randlora_lambda_b[0, 0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match="merging a, b into 2.weight gives non-finite numbers"):
        merge(model, "b")
    assert snapshot(model) == before
    unmerge(model, "a")
    merge(model, safe=False)
    assert not torch.isfinite(model[2].weight).all()


def test_merge_in_bfloat16_is_the_rounded_truth() -> None:
    base, model, reports = adapted("a")
    model.bfloat16()
    base.bfloat16()
    weights = dense_weights(base, model.state_dict(), reports["a"])
    merge(model)
    for path, exact in weights.items():
        merged = model.get_submodule(path.rpartition(".")[0]).weight
        assert merged.dtype == torch.bfloat16
        spacing = exact.abs().clamp(min=1e-3) * 2**-8  # half a unit in the last place, at most
        assert bool(((merged.double() - exact).abs() <= 1.01 * spacing).all())


def test_moving_while_merged_moves_the_kept_original() -> None:
    base, model, _ = adapted("a")
    merge(model)
    model.bfloat16()
    unmerge(model)
    assert torch.equal(model[0].base_weight(), base[0].weight.bfloat16())
    remove(model)
    assert torch.equal(model(X.bfloat16()), base.bfloat16()(X.bfloat16()))


def test_merging_again_takes_the_base_as_it_is_now() -> None:
    _, model, _ = adapted("a")
    merge(model)
    unmerge(model)
    model.load_state_dict(mlp(seed=1).state_dict(), assign=True)
    out = model(X)
    merge(model)
    torch.testing.assert_close(model(X), out, rtol=1e-4, atol=1e-4)


def test_merging_where_inference_mode_is_on_leaves_a_trainable_model() -> None:
    _, model, _ = adapted("a")
    with torch.inference_mode():
        merge(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_a_head_that_was_exchanged_after_injection_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    inject(model, RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    head = model[1]
    for other, found in ((nn.Identity(), "gone"), (nn.Linear(8, 3), r"now \(3, 8\)")):
        model[1] = other
        with pytest.raises(ValueError, match=rf"1.weight.*{found}"):
            remove(model)
    model[1] = head
    remove(model)


# Errors, each a ValueError that says what to do.

ERRORS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "unknown": (lambda m: set_active(m, "zz"), "no adapter 'zz'; this model has: a, b"),
    "delete": (lambda m: delete_adapter(m, "zz"), "no adapter 'zz'; this model has: a, b"),
    "scale": (lambda m: set_scale(m, float("nan")), "finite number"),
    "scale-type": (lambda m: set_scale(m, "a"), "finite number"),  # type: ignore[arg-type]
    "parameters": (lambda m: list(adapter_parameters(m, "zz")), "no adapter 'zz'"),
    "name taken": (lambda m: inject(m, CONFIGS["a"], "a"), "already has an adapter 'a'"),
    "scale merged": (lambda m: set_scale(m, 2.0, "b"), "'b' is merged.*unmerge it first"),
    "delete merged": (lambda m: delete_adapter(m, "b"), "'b' is merged.*unmerge it first"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do_and_change_nothing(case: str) -> None:
    call, message = ERRORS[case]
    _, model, _ = adapted("a", "b")
    merge(model, "b")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("call", [remove, merge, unmerge, lambda m: set_active(m, []), lambda m: set_scale(m, 1.0)])
def test_a_model_without_adapters_is_an_error(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match="has no adapters"):
        call(mlp())


def test_deleting_adapters_one_by_one() -> None:
    base, model, reports = adapted("a", "b", "c")
    delete_adapter(model, "b")
    check(model, truth(base, model, reports, {"a": 1, "c": 1}))
    assert not any(name.endswith("_b") for name in model.state_dict())
    delete_adapter(model, "c")
    check(model, truth(base, model, reports, {"a": 1}))
    delete_adapter(model, "a")
    assert snapshot(model)["types"] == snapshot(base)["types"]
    assert snapshot(model)["bytes"] == snapshot(base)["bytes"]
    assert all(parameter.requires_grad for parameter in model.parameters())


# Modules trained in full.


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def two_heads() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A base, a copy with adapters a and b that trained its head, and the outputs by adapter."""
    base = WithHead()
    model = copy.deepcopy(base)
    outs = {"": base.eval()(X).detach()}
    for i, name in enumerate(("a", "b")):
        inject(model, RandLoRAConfig(rank=2, target_modules=["body"], modules_to_save=["head"]), name)
        set_active(model, name)
        randomize(model, name, seed=i)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):  # updates the batch norm's buffers too
            model.train()(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        outs[name] = model.eval()(X).detach()
    assert not torch.allclose(outs["a"], outs["b"], atol=1e-3)
    return base, model, outs


def through(model: nn.Module, how: str) -> nn.Module:
    copies = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    return copies[how](model)


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_modules_to_save_switch_with_their_adapter(how: str) -> None:
    base, model, outs = two_heads()
    model = through(model, how)
    for name in ("a", "b", "", "a", ""):
        set_active(model, name)
        assert torch.equal(model(X), outs[name])
        assert [key for key in model.state_dict() if "_randlora_" not in key] == list(base.state_dict())
        with disabled(model):
            assert torch.equal(model(X), outs[""])
        assert torch.equal(model(X), outs[name])
    set_active(model, "b")
    merge(model)
    torch.testing.assert_close(model(X), outs["b"])
    with disabled(model):
        assert torch.equal(model(X), outs[""])
    unmerge(model)
    set_active(model, "a")
    delete_adapter(model, "b")
    assert torch.equal(model(X), outs["a"])
    remove(model)
    assert torch.equal(model(X), outs[""])
    assert snapshot(model)["bytes"] == snapshot(base)["bytes"]
    assert snapshot(model)["requires_grad"] == snapshot(base)["requires_grad"]


def test_modules_to_save_survive_a_move_between_switches() -> None:
    _, model, _ = two_heads()
    set_active(model, "a")
    model.double().train()(X.double())  # updates the batch norm's buffers, in new tensors
    out = model.eval()(X.double())
    set_active(model, "b")
    assert not torch.allclose(model(X.double()), out, atol=1e-3)
    set_active(model, "a")
    assert torch.equal(model(X.double()), out)


def test_merge_then_remove_keeps_the_trained_head() -> None:
    base, model, outs = two_heads()
    set_active(model, "a")
    merge(model)
    remove(model)
    torch.testing.assert_close(model(X), outs["a"])
    assert list(model.state_dict()) == list(base.state_dict())


def test_tied_modules_to_save_stay_tied_and_come_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    original = model[1].weight
    before = snapshot(model)
    report = inject(model, RandLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1", "2"]))
    assert model[1].weight is model[2].weight is not original
    assert report.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model[1].weight.add_(1)
    with disabled(model):
        assert model[1].weight is model[2].weight is original
    remove(model)
    assert model[1].weight is model[2].weight is original
    assert snapshot(model) == before


def test_every_weight_holds_the_records_own_switches() -> None:
    model = vit(depth=1)
    inject(model, RandLoRAConfig(rank=4), "a")
    inject(model, RandLoRAConfig(rank=4, seed=1, target_modules=["attn.qkv"]), "b")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for copied in (model, copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        record = own_record(copied)
        assert record is not None
        states = [state for _, _, _, state in adapted_modules(copied)]
        assert len(states) == 4 and all(state.switches is record.switches for state in states)
        set_active(copied, "b")
        assert [state.live() for state in states] == [["b"] if "b" in state.slots else [] for state in states]


def test_switching_does_not_depend_on_the_number_of_adapters() -> None:
    calls = []
    for count in (3, 60):
        model = mlp()
        for i in range(count):
            inject(model, CONFIGS["a"], f"a{i}")
        set_active(model, "a0")
        calls.append(python_calls(lambda model=model: set_active(model, "a1")))
        trained = [name for name, parameter in adapter_parameters(model) if parameter.requires_grad]
        assert len(trained) == 4 and all(".a1." in name for name in trained)
    assert calls[0] == calls[1]
