"""Names that select nothing: the message says what the model has under that name, and names that overlap are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, plan, remove
from tests.helpers import snapshot


class Host(nn.Module):
    """A language model in small, with one of everything."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.act, self.norm, self.rnn = nn.GELU(), nn.LayerNorm(8), nn.LSTM(8, 8)
        self.grouped = nn.Conv1d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 12, bias=False)
        self.register_buffer("table", torch.zeros(8, 8))
        self.register_buffer("passing", torch.zeros(8, 8), persistent=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x)))


UNMATCHED = {
    "embedding": r"'embedding' is of type Embedding, which cannot be adapted; linear layers, convolutions",
    "norm": r"'norm' is of type LayerNorm, which cannot be adapted",
    "norm.weight": r"'norm.weight' is a parameter of shape \(8,\), which cannot be adapted; .* two-dimensional",
    "act": r"'act' is of type GELU and has no parameters, which cannot be adapted",
    "rnn": r"'rnn' is of type LSTM, which cannot be adapted",
    "attn": r"'attn' is of type ModuleDict and contains other layers: name those instead \(attn.qkv, attn.proj\)",
    "table": r"'table' is a buffer of shape \(8, 8\), which cannot be adapted",
    "qkv.bias": r"'qkv.bias' is a parameter of shape \(24,\), which cannot be adapted",
    "nope": r"'nope' matches nothing in the model",
}


@pytest.mark.parametrize("name", UNMATCHED)
def test_a_target_that_cannot_be_adapted_is_described(name: str) -> None:
    model = Host()
    before = snapshot(model)
    if name != "nope":
        with pytest.raises(ValueError, match=f"leaves nothing to adapt: {UNMATCHED[name]}"):
            plan(model, RandLoRAConfig(rank=2, target_modules=[name]))
        with pytest.raises(ValueError, match=f"leaves nothing to adapt: {UNMATCHED[name]}"):
            plan(model, RandLoRAConfig(rank=2, target_modules=name))
    report = plan(model, RandLoRAConfig(rank=2, target_modules=[name, "proj"], rank_pattern={name: 2}))
    assert [target.name for target in report.targets] == ["attn.proj"]
    assert [warning.partition(":")[0] for warning in report.warnings] == ["target_modules", "rank_pattern"]
    assert snapshot(model) == before
    with pytest.warns(UserWarning, match=f"target_modules: {UNMATCHED[name]}"):
        inject(model, RandLoRAConfig(rank=2, target_modules=[name, "proj"]))


def test_a_grouped_convolution_is_a_matrix() -> None:
    (target,) = plan(Host(), RandLoRAConfig(rank=2, target_modules=["grouped"])).targets
    assert target.shape == (8, 6)


OVERLAPS = {
    "a module and its parameter": (["head", "head.weight"], False, {"head.weight"}),
    "a parameter and its module": (["norm.weight", "norm"], False, {"norm.weight", "norm.bias"}),
    "tied": (["embedding", "head"], True, {"embedding.weight"}),
    "tied, the other name": (["head"], True, {"head.weight"}),
    "the same twice": (["norm", "norm"], False, {"norm.weight", "norm.bias"}),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_names_that_overlap_are_saved_once(case: str) -> None:
    names, tied, expected = OVERLAPS[case]
    model = Host(tied)
    before, x = model.state_dict(), torch.arange(3)
    out = model(x)
    report = inject(model, RandLoRAConfig(rank=2, target_modules=["qkv"], modules_to_save=names))
    assert {path for path, _ in report.saved} == expected
    if tied:
        assert model.head.weight is model.embedding.weight and model.head.weight.requires_grad
    with torch.no_grad():
        for path in expected:
            model.get_parameter(path).mul_(2)
    assert not torch.allclose(model(x), out)
    remove(model)
    assert torch.equal(model(x), out) and all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("act", "is of type GELU and has no parameters, which is not part of the state dict"),
        ("passing", r"is a buffer of shape \(8, 8\), which is not part of the state dict"),
        ("nope", "matches nothing; the model's top level has: embedding, attn"),
    ],
)
def test_what_cannot_be_saved_is_described(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"modules_to_save: '{name}' {what}"):
        plan(Host(), RandLoRAConfig(rank=2, target_modules=["qkv"], modules_to_save=[name]))


def test_adapters_are_not_trained_in_full_by_others() -> None:
    model = Host()
    inject(model, RandLoRAConfig(rank=2, target_modules=["qkv"]), "first")
    first = dict(adapter_parameters(model))
    report = inject(model, RandLoRAConfig(rank=2, target_modules=["proj"], modules_to_save=["attn.qkv"]), "second")
    assert [path for path, _ in report.saved] == ["attn.qkv.weight", "attn.qkv.bias"]
    assert all(dict(adapter_parameters(model, "first"))[name] is parameter for name, parameter in first.items())
