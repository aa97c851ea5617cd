"""Graphs of adapted models: torch.fx reads the live weights, torch.export and torch.jit record the present ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    disabled,
    inject,
    merge,
    remove,
    set_active,
    set_scale,
    unmerge,
)
from tests.helpers import mlp, randomize

pytestmark = pytest.mark.filterwarnings("ignore:dropout has no effect")


class Reader(nn.Linear):
    """Not a leaf for torch.fx: its forward is traced."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Plain(nn.Linear):
    """Not a leaf either, but with the forward of nn.Linear."""


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader, self.plain, self.leaf = Reader(6, 8), Plain(8, 6), nn.Linear(6, 6)
        self.stem = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.leaf(self.plain(input=self.reader(x).relu()))
        return x + F.linear(x, self.leaf.weight) + F.linear(x, self.leaf.weight.square()) + self.stem.weight.sum()


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    inject(model, RandLoRAConfig(**{"rank": 2, "target_modules": "all", **settings}))
    randomize(model)
    return model


def changes(model: nn.Module) -> Iterator[str]:
    """Everything that changes the effective weights, in turn."""
    yield "nothing"
    set_scale(model, 0.4)
    yield "scale"
    with disabled(model):
        yield "disabled"
    set_active(model, [])
    yield "inactive"
    set_active(model, "default")
    randomize(model, seed=1)
    yield "values"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(1.5)
    yield "base"
    merge(model)
    yield "merged"
    unmerge(model)
    remove(model)
    yield "removed"


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}


def test_a_traced_graph_follows_the_model() -> None:
    torch.manual_seed(0)
    model = adapted(Host().double(), dropout=0.5)
    traced, x = fx.symbolic_trace(model), torch.randn(3, 6, dtype=torch.float64)
    traced.graph.lint()
    model.eval()
    assert not any(node.op == "get_attr" and not node.users for node in traced.graph.nodes)
    found, expected = gradients(model, traced, x), gradients(model, model, x)
    assert len(expected) == 8 and found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    outputs = {}
    for change in changes(model):
        outputs[change] = model(x)
        torch.testing.assert_close(traced(x), outputs[change], msg=change)
    assert not torch.allclose(outputs["nothing"], outputs["scale"])
    torch.testing.assert_close(copy.deepcopy(traced)(x), outputs["removed"])


def test_dropout_in_a_traced_graph_is_that_of_the_layer() -> None:
    model = adapted(Host(), dropout=0.5)
    traced, x = fx.symbolic_trace(model), torch.randn(3, 6)
    for run in (model.train(), model.eval()):
        outputs = []
        for call in (run, traced):
            torch.manual_seed(0)
            outputs.append(call(x))
        assert torch.equal(*outputs)


def test_a_single_layer_cannot_be_traced() -> None:
    for layer in (Reader(4, 4), nn.Linear(4, 4)):
        with pytest.raises(RuntimeError, match="trace a module that contains it"):
            fx.symbolic_trace(adapted(layer))


FX: dict[str, dict[str, Any]] = {
    "mobilenetv3_small_050": {},
    "tf_mobilenetv3_small_minimal_100": {},  # convolutions with padding "same"
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},  # reads `qkv.weight`
}


@pytest.mark.parametrize("name", FX)
def test_feature_extraction_of_timm_models(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **FX[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a branch that starts at zero would hide what is before it
                parameter.fill_(0.1)
    adapted(model)
    x = torch.randn(1, 3, 32, 32)
    names = timm.layers.get_graph_node_names(model)[1]
    features = timm.layers.create_feature_extractor(model, names[-1:])

    def run(x: Tensor) -> Tensor:
        (out,) = features(x).values()
        return out

    found, expected = gradients(model, run, x), gradients(model, model, x)
    assert found.keys() == expected.keys() and expected
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, expected[path], rtol=1e-3, atol=1e-4 * float(expected[path].abs().max()))
    before = model(x)
    torch.testing.assert_close(run(x), before)
    set_scale(model, 0.1)
    torch.testing.assert_close(run(x), model(x))
    assert not torch.allclose(run(x), before)


@pytest.mark.parametrize("kind", ["uniform", "structured", "sparse"])
def test_export_equals_eager_for_any_batch_size(kind: str) -> None:
    model = adapted(mlp(), bases=kind)
    batch = torch.export.Dim("batch", min=2)
    for options in ({}, {"strict": True}):
        with torch.no_grad():
            exported = torch.export.export(model, (torch.randn(2, 8),), dynamic_shapes=({0: batch},), **options)
        for count in (2, 7):
            x = torch.randn(count, 8)
            torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_exported_graph_has_the_gradients_of_the_layer() -> None:
    model, x = adapted(mlp()), torch.randn(5, 8)
    exported = torch.export.export(model, (x,)).module()
    expected = gradients(model, model, x)
    exported.zero_grad()
    exported(x).square().sum().backward()
    for name, parameter in exported.named_parameters():
        if "randlora" in name:
            path, _, part = name.partition(".weight_randlora_")
            torch.testing.assert_close(
                parameter.grad, expected[f"{path}.weight.default.{part.partition('_')[0]}"], rtol=1e-3, atol=1e-3
            )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["uniform", "structured"])
def test_a_jit_trace_equals_eager_and_can_be_saved(kind: str, tmp_path: Any) -> None:
    model, x = (
        adapted(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(9, 6)), bases=kind),
        torch.randn(2, 1, 5, 5),
    )
    traced = torch.jit.trace(model, (x,))
    other = torch.randn(3, 1, 5, 5)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-5)
    torch.jit.save(traced, tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(other), traced(other))
