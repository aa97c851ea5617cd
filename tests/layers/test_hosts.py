"""What hosts do to their layers: load weights, patch, share, tie, call in unusual ways."""

from __future__ import annotations

import copy
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, merge, plan, remove, save_adapter, unmerge
from randlora_vision.layers.adapted import AdaptedModule
from tests.helpers import dense_model, mlp, randomize, snapshot


def adapted_mlp(*names: str) -> nn.Sequential:
    model = mlp()
    for name in names or ("default",):
        inject(model, RandLoRAConfig(rank=2, target_modules=["0", "2"], seed=len(name)), name)
    randomize(model)
    return model


# Loading state dicts.


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_loads_strictly_and_keeps_the_adapter(assign: bool) -> None:
    model, other = adapted_mlp(), mlp(seed=1)
    report = plan(other, RandLoRAConfig(rank=2, target_modules=["0", "2"], seed=len("default")))
    model.load_state_dict(other.state_dict(), assign=assign)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x).double(), dense_model(other, model, report)(x.double()), rtol=1e-4, atol=1e-5)


def test_an_adapted_state_dict_round_trips() -> None:
    model, other = adapted_mlp("a", "bb"), adapted_mlp("a", "bb")
    randomize(other, seed=5)
    x = torch.randn(3, 8)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("missing", ["2.weight_randlora_lambda_default", "2.weight_randlora", "0.weight_randlora"])
def test_a_state_dict_with_part_of_an_adapter_is_refused(missing: str) -> None:
    model = adapted_mlp()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(missing)}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_a_missing_base_key_is_still_an_error() -> None:
    model, state = adapted_mlp(), mlp().state_dict()
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight"'):
        model.load_state_dict(state)


def test_loading_while_merged_is_refused() -> None:
    model = adapted_mlp()
    merge(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="unmerge"):
        model.load_state_dict(mlp(seed=1).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "weight" in key)


# Calling and patching.


def test_calls_by_keyword_and_patched_forwards() -> None:
    model = adapted_mlp()
    x = torch.randn(3, 8)
    expected = model[0](x)
    assert torch.equal(model[0](input=x), expected)

    patched, late = mlp(), adapted_mlp()
    original = patched[0].forward
    patched[0].forward = lambda x: 2 * original(x)
    inject(patched, RandLoRAConfig(rank=2, target_modules=["0", "2"], seed=len("default")))
    randomize(patched)
    late[0].forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias), late[0])
    for host in (patched, late):
        torch.testing.assert_close(host[0](x), 2 * expected)


def test_functional_call_replaces_adapter_and_base_weights() -> None:
    model, other = adapted_mlp(), adapted_mlp()
    other.load_state_dict(mlp(seed=1).state_dict())
    randomize(other, seed=3)
    x = torch.randn(3, 8)
    before = model(x)
    assert torch.equal(functional_call(model, dict(other.named_parameters()), (x,)), other(x))
    assert torch.equal(model(x), before)


def test_replacing_the_weight_parameter_replaces_the_base() -> None:
    model, other = adapted_mlp(), adapted_mlp()
    new = nn.Parameter(torch.randn(16, 8), requires_grad=False)
    delta = model[0].weight - model[0].base_weight()
    model[0].weight = new
    assert model[0].base_weight() is new
    torch.testing.assert_close(model[0].weight, new + delta)
    with pytest.raises((TypeError, RuntimeError)):
        other[0].weight = torch.randn(16, 8)
    with pytest.raises(RuntimeError, match="before inject"):
        del other[0].weight
    other(torch.randn(3, 8))


def test_a_sequential_iterates_as_before() -> None:
    base, model = mlp(), adapted_mlp()
    assert len(model) == len(base) and [type(m).__name__ for m in model] == [type(m).__name__ for m in base]
    assert isinstance(model[:2](torch.randn(1, 8)), Tensor)


# Sharing and tying.


class Tied(nn.Module):
    """Two linear layers with one matrix, optionally an embedding with it too."""

    def __init__(self, embedding: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.free = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        if embedding:
            self.embedding = nn.Embedding(8, 8)
            self.embedding.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.second(torch.tanh(self.first(x))))


@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second"]])
def test_tied_layers_are_adapted_once_and_stay_tied(targets: list[str]) -> None:
    base = Tied()
    model = copy.deepcopy(base)
    report = inject(model, RandLoRAConfig(rank=2, target_modules=targets))
    randomize(model)
    assert [target.name for target in report.targets] == ["first"] and "second" in report.targets[0].aliases
    assert len(list(adapter_parameters(model))) == 2
    x = torch.randn(3, 8)
    out = model(x)
    truth = dense_model(base, model, report)
    assert truth.first.weight is truth.second.weight
    torch.testing.assert_close(out.double(), truth(x.double()), rtol=1e-4, atol=1e-5)
    original = model.first.base_weight()
    merge(model)
    torch.testing.assert_close(model(x), out)
    assert model.first.weight is model.second.weight
    unmerge(model)
    assert model.first.base_weight() is model.second.base_weight() is original
    merge(model)
    remove(model)
    assert model.first.weight is model.second.weight and not isinstance(model.second, AdaptedModule)
    torch.testing.assert_close(model(x), out)


def test_a_layer_tied_to_an_embedding_is_left_alone() -> None:
    model = Tied(embedding=True)
    report = inject(model, RandLoRAConfig(rank=2))
    assert [target.name for target in report.targets] == ["free"]
    assert [(name, "Embedding" in reason) for name, reason in report.skipped] == [("first", True)]
    before = snapshot(other := Tied(embedding=True))
    with pytest.raises(ValueError, match="tied to 'embedding'"):
        inject(other, RandLoRAConfig(rank=2, target_modules=["second"]))
    assert snapshot(other) == before


@pytest.mark.parametrize("targets", [["left.fc"], ["right.fc"], ["fc"]])
def test_a_module_with_two_parents_is_adapted_once_under_either_name(targets: list[str]) -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({side: nn.ModuleDict({"fc": shared}) for side in ("left", "right")})
    base = copy.deepcopy(shared)
    report = inject(model, RandLoRAConfig(rank=2, target_modules=targets))
    randomize(model)
    assert [(target.name, target.aliases) for target in report.targets] == [("left.fc", ("right.fc",))]
    assert model["left"]["fc"] is model["right"]["fc"] is shared
    assert len(list(adapter_parameters(model))) == 2
    x = torch.randn(3, 8)
    out = model["right"]["fc"](x)
    assert not torch.allclose(out, base(x), atol=1e-3)
    merge(model)
    torch.testing.assert_close(model["left"]["fc"](x), out)
    unmerge(model)
    remove(model)
    assert torch.equal(shared(x), base(x))


# What cannot be adapted is skipped with a reason.


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("lazy", "not initialised"),
        ("script", "TorchScript"),
        ("weight_norm", "old-style"),
        ("packed", "leaves nothing"),
    ],
)
def test_unreachable_layers_are_skipped_with_a_reason(kind: str, reason: str) -> None:
    odd: nn.Module
    if kind == "lazy":
        odd = nn.LazyLinear(8)
    elif kind == "script":
        odd = torch.jit.script(nn.Linear(8, 8))
    elif kind == "weight_norm":
        odd = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    else:
        odd = nn.LSTM(8, 8)  # holds matrices that its kernel reads without going through Python
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "odd": odd})
    report = inject(model, RandLoRAConfig(rank=2))
    assert [target.name for target in report.targets] == ["plain"]
    if kind != "packed":  # an LSTM is not a linear layer, so the preset does not report it
        assert reason in dict(report.skipped)["odd"]
    with pytest.raises(ValueError, match=reason):
        plan(model, RandLoRAConfig(rank=2, target_modules=["odd"]), "b")
    odd(torch.randn(2, 8))
    remove(model)
    assert type(model["plain"]) is nn.Linear


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    model = nn.Linear(8, 6)
    base = copy.deepcopy(model)
    report = inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    x = torch.randn(3, 8)
    truth = dense_model(base, model, report)
    torch.testing.assert_close(model(x).double(), truth(x.double()), rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "adapter.safetensors")
    remove(model)
    assert type(model) is nn.Linear and torch.equal(model(x), base(x))
