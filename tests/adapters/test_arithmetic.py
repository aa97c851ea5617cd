"""Sums of adapters against dense weights in float64: a sum is either one exact adapter or refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import (
    RandLoRAConfig,
    delete_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_active,
    set_scale,
    set_weights,
    unmerge,
    weighted_sum,
    weighted_sum_files,
)
from randlora_vision.layers.adapted import adapted_modules
from tests.helpers import IMAGES, mlp, randomize, snapshot, vit

CONFIG = RandLoRAConfig(rank=3, target_modules=["0", "2"])
X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(3, 8)


def two(share: str | None = "gamma", first: RandLoRAConfig = CONFIG, second: RandLoRAConfig | None = None) -> nn.Module:
    """A float64 model with the random adapters "a" and "b"; b has a's gamma, a's lambda, or neither."""
    model = mlp().double()
    for i, (name, config) in enumerate((("a", first), ("b", second or first))):
        inject(model, config, name)
        randomize(model, name, seed=i)
    for _, module, param, _ in adapted_modules(model) if share else ():
        (lam, gamma), (other_lam, other_gamma) = (module.adapter_tensors(param, name) for name in "ab")
        with torch.no_grad():
            if share == "gamma":
                other_gamma.copy_(gamma)
            elif share == "lambda":
                other_lam.copy_(lam)
    return model


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The dense update of one adapter, read off the effective weights."""
    set_active(model, name)
    found = {path: module.weight.detach() - module.base_weight() for path, module, _, _ in adapted_modules(model)}
    assert all(delta.dtype == torch.float64 for delta in found.values())
    return found


def expect(model: nn.Module, weights: dict[str, float], name: str = "sum") -> None:
    """The adapter `name` is the weighted sum of the others' dense updates."""
    parts = {part: deltas(model, part) for part in weights}
    for path, delta in deltas(model, name).items():
        wanted = sum(weight * parts[part][path] for part, weight in weights.items())
        torch.testing.assert_close(delta, wanted, rtol=1e-12, atol=1e-13)
        assert wanted.norm() > 0.01


@pytest.mark.parametrize("weights", [{"a": 2.5}, {"a": -1}, {"a": 1, "b": 1}, {"a": 0.3, "b": -0.7}, {"a": 0, "b": 2}])
@pytest.mark.parametrize("share", ["gamma", "lambda"])
def test_sums_that_are_one_adapter(share: str, weights: dict[str, float]) -> None:
    model = two(share)
    report = weighted_sum(model, weights, "sum")
    assert report.config == CONFIG
    out = model(X)  # the sum alone is active
    expect(model, weights)
    set_weights(model, weights)
    torch.testing.assert_close(model(X), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bases", ["normal", "very_sparse", "structured", "peft", "peft_sparse"])
def test_every_kind_of_bases(bases: str) -> None:
    model = two("gamma", RandLoRAConfig(rank=3, target_modules=["0", "2"], bases=bases))
    weighted_sum(model, {"a": 1, "b": -2}, "sum")
    expect(model, {"a": 1, "b": -2})


def test_the_rule_holds_weight_by_weight_and_zero_is_zero() -> None:
    model = two(None)
    layers = {path: module for path, module, _, _ in adapted_modules(model)}
    with torch.no_grad():
        (lam, _), (other, _) = (layers["0"].adapter_tensors("weight", name) for name in "ab")
        other.copy_(lam)  # equal lambdas here
        layers["2"].adapter_tensors("weight", "b")[0].zero_()  # and no update at all there
    weighted_sum(model, {"a": 0.5, "b": 4}, "sum")
    expect(model, {"a": 0.5, "b": 4})


def test_alphas_differ() -> None:
    second = RandLoRAConfig(rank=3, target_modules=["0", "2"], alpha=7, alpha_pattern={"2": 1.5})
    model = two("gamma", second=second)
    weighted_sum(model, {"a": 1, "b": 3}, "sum")
    expect(model, {"a": 1, "b": 3})


def test_scales_of_the_run_do_not_count() -> None:
    model = two()
    set_scale(model, 0.25, "a")
    weighted_sum(model, {"a": 1, "b": 1}, "sum")
    set_scale(model, 1, "a")
    expect(model, {"a": 1, "b": 1})


def test_a_sum_beyond_one_adapter_is_refused_and_still_computed_by_weights_and_merging() -> None:
    model = two(None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no single adapter equals this sum of 'a', 'b'.* at 0 and 1 more.*bilinear"):
        weighted_sum(model, {"a": 1, "b": 1}, "sum")
    assert snapshot(model) == before
    parts = {name: deltas(model, name) for name in "ab"}
    set_weights(model, {"b": -0.5, "a": 2})
    effective = {path: module.weight.detach().clone() for path, module, _, _ in adapted_modules(model)}
    merge(model)
    for path, module, param, _ in adapted_modules(model):
        wanted = mlp().double().get_submodule(path).weight + 2 * parts["a"][path] - 0.5 * parts["b"][path]
        torch.testing.assert_close(module.base_weight(param), wanted, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(effective[path], wanted, rtol=1e-12, atol=1e-13)
    unmerge(model)


OTHERS = {
    "seed": (RandLoRAConfig(rank=3, target_modules=["0", "2"], seed=1), "different bases.*seed 0.*seed 1"),
    "kind": (RandLoRAConfig(rank=3, target_modules=["0", "2"], bases="normal"), "different bases.*structured.*normal"),
    "rank": (RandLoRAConfig(rank=2, target_modules=["0", "2"]), "different ranks"),
    "targets": (RandLoRAConfig(rank=3, target_modules=["0"]), r"different weights.* \(2\)"),
    "modules": (
        RandLoRAConfig(rank=3, target_modules=["0", "2"], modules_to_save=["0.bias"]),
        "different modules in full.*0.bias",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_adapters_are_refused_but_can_be_weighted(case: str, tmp_path: Path) -> None:
    second, message = OTHERS[case]
    model = two(None, second=second)
    with pytest.raises(ValueError, match=message):
        weighted_sum(model, {"a": 1, "b": 1}, "sum")
    files = {save_adapter(model, tmp_path / f"{name}.safetensors", name): 1.0 for name in "ab"}
    with pytest.raises(ValueError, match=message):
        weighted_sum_files(files, tmp_path / "sum.safetensors")
    assert not (tmp_path / "sum.safetensors").exists()
    parts = {name: deltas(model, name) for name in "ab"}
    set_weights(model, {"a": 1, "b": -1})
    both = {path: module.weight.detach().clone() for path, module, _, _ in adapted_modules(model)}
    for path, weight in both.items():
        wanted = mlp().double().get_submodule(path).weight + parts["a"][path] - parts["b"][path]
        torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-13)


def test_bases_that_depend_on_the_largest_layer_must_be_alike() -> None:
    """Very sparse bases take their density from the largest layer that the adapter has."""
    first = RandLoRAConfig(rank=3, target_modules=["0", "2"], bases="very_sparse")
    model = two(None, first, RandLoRAConfig(rank=3, target_modules=["2"], bases="very_sparse"))
    with pytest.raises(ValueError, match="different bases"):
        weighted_sum(model, {"a": 1, "b": 1}, "sum")


# Files.


def test_files_give_the_same_sum(tmp_path: Path) -> None:
    model = two()
    files = {name: save_adapter(model, tmp_path / f"{name}.safetensors", name) for name in "ab"}
    path = weighted_sum_files({files["a"]: 1.5, files["b"]: -1}, tmp_path / "sum.safetensors")
    load_adapter(model, path, "sum")
    expect(model, {"a": 1.5, "b": -1})
    delete_adapter(model, "sum")
    weighted_sum(model, {"a": 1.5, "b": -1}, "sum")
    assert save_adapter(model, tmp_path / "again.safetensors", "sum").read_bytes() == path.read_bytes()


def test_negation_undoes_an_adapter(tmp_path: Path) -> None:
    """Task-vector negation of a file in place: negating twice restores the file."""
    model = vit()
    inject(model, RandLoRAConfig(rank=4))
    randomize(model)
    path = save_adapter(model, tmp_path / "adapter.safetensors")
    before = path.read_bytes()
    weighted_sum_files({str(path): -1}, path)
    fresh, x = vit(), torch.randn(IMAGES)
    base = fresh(x)
    load_adapter(fresh, path, "minus")
    assert (fresh(x) - base).abs().max() > 1e-3
    inject_again = tmp_path / "plus.safetensors"
    inject_again.write_bytes(before)
    load_adapter(fresh, inject_again, "plus")
    torch.testing.assert_close(fresh(x), base, rtol=1e-5, atol=1e-5)
    weighted_sum_files({str(path): -1}, path)
    assert path.read_bytes() == before


def test_modules_trained_in_full(tmp_path: Path) -> None:
    config = RandLoRAConfig(rank=4, modules_to_save=["head"])
    base = vit()
    model = copy.deepcopy(base)
    heads, files = {}, {}
    for i, name in enumerate("ab"):
        inject(model, config, name)
        set_active(model, name)
        randomize(model, name)
        with torch.no_grad():
            model.head.weight.add_(torch.full_like(model.head.weight, i + 1.0))
        heads[name] = model.head.weight.detach().clone()
        files[name] = save_adapter(model, tmp_path / f"{name}.safetensors", name)
    weighted_sum(model, {"a": 2, "b": -0.5}, "sum")
    parts = {name: head - base.head.weight for name, head in heads.items()}
    torch.testing.assert_close(model.head.weight, base.head.weight + 2 * parts["a"] - 0.5 * parts["b"])
    with pytest.raises(ValueError, match="needs the base model's"):
        weighted_sum_files({files["a"]: 2, files["b"]: -0.5}, tmp_path / "sum.safetensors")
    load_adapter(model, weighted_sum_files({files["a"]: 0.25, files["b"]: 0.75}, tmp_path / "mean.safetensors"), "mean")
    set_active(model, "mean")
    torch.testing.assert_close(model.head.weight, 0.25 * heads["a"] + 0.75 * heads["b"])


def test_bad_input_is_refused(tmp_path: Path) -> None:
    model = two()
    before = snapshot(model)
    for weights in ({}, {"a": float("nan")}, {"a": True}, {"a": "1"}, ["a"]):
        for call in (lambda w: weighted_sum(model, w, "sum"), lambda w: set_weights(model, w)):
            with pytest.raises(ValueError, match="weight"):
                call(weights)
    with pytest.raises(ValueError, match="no adapter 'c'"):
        weighted_sum(model, {"c": 1}, "sum")
    with pytest.raises(ValueError, match="already has an adapter 'b'"):
        weighted_sum(model, {"a": 1}, "b")
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        weighted_sum_files({tmp_path / "no.safetensors": 1}, tmp_path / "sum.safetensors")
    with pytest.raises(ValueError, match=r"one .safetensors file"):
        weighted_sum_files({tmp_path / "no.safetensors": 1}, tmp_path / "sum.bin")
    assert snapshot(model) == before
