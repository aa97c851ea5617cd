"""The branch form: with dropout the adapter has a different input from the base, and packed weights stay packed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, disabled, inject, load_adapter, merge, plan, remove, save_adapter
from randlora_vision.layers.adapted import AdaptedModule
from tests.helpers import dense_weights, randomize

SHAPES = [(6, 4), (4, 6), (5, 5)]
RATE = 0.4


def adapted(shape: tuple[int, int]) -> tuple[nn.Linear, Tensor, Tensor]:
    """(layer with an adapter with dropout and one without, the update of each), in float64 and training mode."""
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0]).double()
    layer = copy.deepcopy(base)
    reports = [
        inject(layer, RandLoRAConfig(rank=2, alpha=3.0, dropout=RATE), "dropped"),
        inject(layer, RandLoRAConfig(rank=3, alpha=3.0, seed=1), "kept"),
    ]
    randomize(layer)
    trained = dict(layer.named_parameters())
    updates = [dense_weights(base, trained, report)["weight"] - base.weight.detach() for report in reports]
    return layer.train(), updates[0], updates[1]


def seeded(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return call(x)


@pytest.mark.parametrize("lead", [(3,), (2, 3), ()])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_acts_on_the_adapters_input_alone(shape: tuple[int, int], lead: tuple[int, ...]) -> None:
    layer, dropped, kept = adapted(shape)
    x = torch.randn(*lead, shape[1], dtype=torch.float64, requires_grad=True)
    weight = layer.base_weight().detach()  # type: ignore[operator]

    def reference(x: Tensor) -> Tensor:
        return F.linear(x, weight + kept, layer.bias) + F.linear(F.dropout(x, RATE), dropped)

    out, expected = seeded(layer, x), seeded(reference, x)
    torch.testing.assert_close(out, expected)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    got, want = (torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True) for y in (out, expected))
    for mine, truth in zip(got, want, strict=True):
        torch.testing.assert_close(mine, truth)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, weight + kept + dropped, layer.bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_with_dropout(shape: tuple[int, int]) -> None:
    layer, _, _ = adapted(shape)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    x = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return seeded(lambda x: torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,)), x)

    assert torch.autograd.gradcheck(call, (x, *(layer.get_parameter(name) for name in names)))


def test_dropout_on_weights_that_are_read_is_said_not_to_act() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.MultiheadAttention(8, 2)])
    report = plan(model, RandLoRAConfig(rank=2, dropout=0.1))
    assert any("1.in_proj_weight" in warning and "dropout" in warning for warning in report.warnings)
    assert not plan(model, RandLoRAConfig(rank=2)).warnings


class Int8Linear(nn.Linear):
    """A packed layer as in quantisation libraries: an integer weight, a scale and a custom forward."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        scale = source.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((source.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = source.bias

    def unpacked(self) -> Tensor:
        return self._parameters["weight"].float() * self.scale  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))


@pytest.mark.parametrize("dropout", [0.0, RATE])
def test_packed_weights_take_the_branch(dropout: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Int8Linear(nn.Linear(8, 12)), nn.GELU(), Int8Linear(nn.Linear(12, 6)))
    model, fresh = copy.deepcopy(base), copy.deepcopy(base)
    x = torch.randn(5, 8)
    report = inject(model, RandLoRAConfig(rank=2, dropout=dropout))
    assert [(t.name, t.kind, t.shape) for t in report.targets] == [
        ("0", "quantized", (12, 8)),
        ("2", "quantized", (6, 12)),
    ]
    assert torch.equal(model(x), base(x))
    randomize(model)
    dense = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)).double()
    for i in (0, 2):
        dense[i].load_state_dict({"weight": base[i].unpacked().double(), "bias": base[i].bias.double()})
    weights = dense_weights(dense, model.state_dict(), report)
    with torch.no_grad():
        for path, weight in weights.items():
            dense.get_parameter(path).copy_(weight)
    model.eval()
    torch.testing.assert_close(model(x).double(), dense(x.double()), rtol=1e-5, atol=1e-5)
    out = model.train()(x)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert model[0]._parameters["weight"].dtype == torch.int8
    with pytest.raises(ValueError, match="quantised"):
        merge(model)
    with disabled(model):
        assert torch.equal(model(x), base(x))
    model.eval()
    target = io.BytesIO()
    torch.save(model, target)
    assert torch.equal(torch.load(io.BytesIO(target.getvalue()), weights_only=False)(x), model(x))
    remove(model)
    assert type(model[0]) is Int8Linear and not isinstance(model[0], AdaptedModule)
    assert torch.equal(model(x), fresh(x))


def test_packed_weights_save_and_load(tmp_path: object) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Int8Linear(nn.Linear(8, 12)))
    model, x = copy.deepcopy(base), torch.randn(5, 8)
    inject(model, RandLoRAConfig(rank=2))
    randomize(model)
    path = save_adapter(model, f"{tmp_path}/adapter.safetensors")
    load_adapter(base, path)
    assert torch.equal(base(x), model(x))
