"""What hosts do to adapted layers after the injection: right, or one clear error, and never a weight changed twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    delete_adapter,
    inject,
    load_adapter,
    merge,
    plan,
    remove,
    save_adapter,
    unmerge,
)
from randlora_vision.layers.adapted import AdaptedModule
from tests.helpers import dense_weights, mlp, randomize, snapshot

CONFIG = RandLoRAConfig(rank=2, target_modules=["0", "2"])
X = torch.linspace(-1, 1, 24).reshape(3, 8)


def adapted(model: nn.Module | None = None) -> nn.Module:
    model = mlp() if model is None else model
    inject(model, CONFIG)
    randomize(model)
    return model


# Replacing the weight.


def tie(model: nn.Module) -> None:
    model[0].weight = nn.Linear(8, 16).weight
    model[0].weight = model[0].weight  # the effective weight


def grow(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(20, 8))


def old_weight_norm(model: nn.Module) -> None:
    torch.nn.utils.weight_norm(model[0])


def old_spectral_norm(model: nn.Module) -> None:
    torch.nn.utils.spectral_norm(model[0])


def new_weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model[0])


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)


def pruned_globally(model: nn.Module) -> None:
    prune.global_unstructured([(model[0], "weight")], prune.L1Unstructured, amount=0.5)


def quantised(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def merged_and_assigned(model: nn.Module) -> None:
    merge(model)
    try:
        model[0].weight = nn.Parameter(torch.zeros(16, 8))
    finally:
        unmerge(model)


def without_lambda(model: nn.Module) -> None:
    del model[0].weight_randlora_lambda_default


def lambda_of_another(model: nn.Module) -> None:
    model[0].weight_randlora_lambda_default = nn.Parameter(torch.zeros(3, 3))


def without_weight(model: nn.Module) -> None:
    model[0].weight = None


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "grow": (grow, r"shape \(20, 8\), which does not fit its adapters of 16 x 8: change layers before inject"),
    "old weight norm": (old_weight_norm, "weight norm .*before inject, or merge and remove"),
    "old spectral norm": (old_spectral_norm, "cannot be replaced or deleted .*before inject, or merge and remove"),
    "weight norm": (new_weight_norm, "cannot be replaced or deleted .*before inject, or merge and remove"),
    "pruning": (pruned, "pruning .*before inject, or merge and remove"),
    "global pruning": (pruned_globally, "pruning .*before inject, or merge and remove"),
    "quantised": (quantised, "quantise before inject"),
    "no weight": (without_weight, "cannot be replaced or deleted .*before inject, or merge and remove"),
    "no lambda": (
        without_lambda,
        "'weight_randlora_lambda_default' .* cannot be deleted: use delete_adapter or remove",
    ),
    "another lambda": (lambda_of_another, r"shape \(2, 4\) and was assigned a tensor of shape \(3, 3\): delete"),
    "merged and assigned": (merged_and_assigned, "default is merged into it: .*unmerge, or merge and remove, first"),
}


@pytest.mark.filterwarnings("ignore:.*_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_is_refused_where_it_happens(change: str, tmp_path: Path) -> None:
    model = adapted()
    expected, before = model(X), snapshot(model)
    apply, message = CHANGES[change]
    with pytest.raises(RuntimeError, match=message):
        apply(model)
    assert snapshot(model) == before
    assert torch.equal(model(X), expected)
    save_adapter(model, tmp_path / "adapter.safetensors")


def test_the_effective_weight_is_not_taken_for_a_parameter() -> None:
    """``b.weight = a.weight`` would tie to a temporary tensor."""
    model = adapted()
    with pytest.raises(
        RuntimeError, match=r"'weight' of an adapted Linear cannot be set to a plain tensor.*base_weight"
    ):
        tie(model)


def test_a_batch_norm_is_not_fused_into_an_adapted_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    model[1].running_var.fill_(0.3)
    inject(model, RandLoRAConfig(rank=2, target_modules=["0"]))
    randomize(model)
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    with pytest.raises(RuntimeError, match="fusion of a batch norm .*before inject, or merge and remove"):
        fusion.fuse_conv_bn_eval(model[0], model[1])
    merge(model)
    remove(model)
    torch.testing.assert_close(fusion.fuse_conv_bn_eval(model[0], model[1])(x), expected)


def test_tying_parameters_after_inject(tmp_path: Path) -> None:
    """Two layers that share a base from now on, each with its own adapter, as before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8))
    other = copy.deepcopy(model)
    inject(model, RandLoRAConfig(rank=2, target_modules=["0", "1"]))
    randomize(model)
    model[1].weight = model[0].base_weight()
    delta = model[1].weight - model[1].base_weight()
    assert not torch.allclose(delta, model[0].weight - model[0].base_weight())
    load_adapter(other, save_adapter(model, tmp_path / "tied.safetensors"))
    other[1].weight = other[0].base_weight()
    assert torch.equal(other[1](X), model[1](X)) and torch.equal(other[0](X), model[0](X))
    model[0].weight = model[2].weight  # as transformers' tie_weights does
    save_adapter(model, tmp_path / "embedding.safetensors")
    expected = model[0](X)
    merge(model)
    torch.testing.assert_close(model[0](X), expected)
    unmerge(model)
    assert model[0].base_weight() is model[2].weight


def test_weights_that_accelerate_sets(tmp_path: Path) -> None:
    from accelerate.utils import set_module_tensor_to_device

    model, other = adapted(), mlp(seed=1)
    delta = model[0].weight - model[0].base_weight()
    set_module_tensor_to_device(model, "0.weight", "cpu", value=other[0].weight.detach())
    torch.testing.assert_close(model[0].weight, other[0].weight + delta)
    expected = model(X)
    set_module_tensor_to_device(model, "0.weight", "meta")
    with pytest.raises(RuntimeError, match="on the meta device got values"):
        model(X)
    assert model[0].weight.is_meta
    save_adapter(model, tmp_path / "adapter.safetensors")
    set_module_tensor_to_device(model, "0.weight", "cpu", value=other[0].weight.detach())
    assert torch.equal(model(X), expected)


def test_assigned_adapters_stay_in_float32() -> None:
    model = adapted()
    half = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    model.load_state_dict(half, assign=True)
    assert model[0].base_weight().dtype == torch.bfloat16
    for name, parameter in adapter_parameters(model):
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name
    model(X.bfloat16()).sum().backward()


# Removing and wrapping layers.


def test_what_is_left_of_an_adapter_is_saved(tmp_path: Path) -> None:
    model = adapted()
    kept = {name: parameter.clone() for name, parameter in adapter_parameters(model)}
    model[2] = nn.Linear(16, 6)
    with pytest.warns(UserWarning, match="^2: adapted, but removed from the model or replaced"):
        path = save_adapter(model, tmp_path / "left.safetensors")
    saved = {key.partition(".")[0]: tensor for key, tensor in load_file(path).items()}
    assert len(saved) == 2
    for part, tensor in saved.items():
        assert torch.equal(tensor[0], kept[f"0.weight.default.{part}"])
    del model[0]
    with pytest.raises(ValueError, match="nothing is left of adapter 'default': 0, 2: adapted, but removed"):
        save_adapter(model, tmp_path / "nothing.safetensors")
    remove(model)


def checkpointed(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model[0] = checkpoint_wrapper(model[0])


def compiled(model: nn.Module) -> None:
    model[0] = torch.compile(model[0], backend="eager")


@pytest.mark.parametrize("wrap", [checkpointed, compiled])
def test_layers_in_wrappers_keep_their_names(wrap: Callable[[nn.Module], None], tmp_path: Path) -> None:
    plain, model = adapted(), adapted()
    wrap(model)
    torch.testing.assert_close(model(X), plain(X))  # compiled code rounds otherwise
    ours, theirs = (save_adapter(m, tmp_path / f"{n}.safetensors") for n, m in (("ours", model), ("theirs", plain)))
    assert ours.read_bytes() == theirs.read_bytes()
    late = mlp()
    wrap(late)
    report = load_adapter(late, ours)
    assert [target.name for target in report.targets] == ["0", "2"]
    torch.testing.assert_close(late(X), plain(X))
    remove(late)
    assert torch.equal(late(X), mlp()(X))
    assert [parameter.requires_grad for parameter in late.parameters()] == [True] * 4


# Values that come after the injection.


@pytest.mark.parametrize("init", ["lambda-zero", "gamma-zero"])
@pytest.mark.parametrize("how", ["to_empty", "assign", "trained"])
def test_adapters_without_values_start_anew(how: str, init: str) -> None:
    """`to_empty` and a base checkpoint leave a model that equals its base, not one with arbitrary adapters."""
    config = RandLoRAConfig(rank=2, target_modules=["0", "2"], init=init)
    fresh = mlp()
    inject(fresh, config)
    with torch.device("meta" if how != "trained" else "cpu"):
        model = mlp()
    inject(model, config)
    if how == "assign":
        model.load_state_dict(mlp().state_dict(), assign=True)
    else:
        if how == "trained":
            randomize(model)
        model.to_empty(device="cpu")
        model.load_state_dict(mlp().state_dict())
    for (name, ours), (_, theirs) in zip(adapter_parameters(model), adapter_parameters(fresh), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad, name
    model(X).sum().backward()
    assert torch.equal(model(X), mlp()(X))


# Weights that torch.nn.utils computes.


def normed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(8, 6), (3, 8)),
        "convolution": (nn.Conv2d(3, 8, 3), (1, 3, 8, 8)),
        "spectral": (nn.Linear(8, 6), (3, 8)),
        "symmetric": (nn.Linear(8, 8), (3, 8)),
    }
    layer, shape = layers[kind]
    norm = {"spectral": parametrizations.spectral_norm, "symmetric": symmetric}.get(kind, parametrizations.weight_norm)
    model = nn.Sequential(norm(layer)).eval()
    model.register_buffer("x", torch.randn(shape))
    return model


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


def symmetric(layer: nn.Module) -> nn.Module:
    """A parametrization without an inverse: the merged matrix is not symmetric."""
    return parametrize.register_parametrization(layer, "weight", Symmetric())


@pytest.mark.parametrize("kind", ["linear", "convolution", "spectral", "symmetric"])
def test_a_parametrised_weight_is_merged(kind: str) -> None:
    model, plain = normed(kind), normed(kind).double()
    parametrize.remove_parametrizations(plain[0], "weight")
    twin, twins = copy.deepcopy(model), model(model.x)
    report = inject(model, RandLoRAConfig(rank=2, target_modules=["0"]))
    randomize(model)
    trained = model.state_dict()
    out, before = model(model.x), {key: tensor.clone() for key, tensor in trained.items()}
    weight = dense_weights(plain, trained, report)["0.weight"]
    merge(model)
    torch.testing.assert_close(model[0].weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(model.x), out)
    merged = {key: tensor for key, tensor in model.state_dict().items() if "randlora" not in key}
    if kind in ("linear", "convolution"):  # weight norm can compute any weight
        other = normed(kind)
        other.load_state_dict(merged)
        torch.testing.assert_close(other(other.x), out)
    else:
        assert not any("parametrizations" in key for key in merged)
    unmerge(model)
    assert torch.equal(model(model.x), out)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())
    inject(model, RandLoRAConfig(rank=2, target_modules=["0"], seed=1), "second")
    randomize(model, "second")
    both = model(model.x)
    merge(model, "default")
    merge(model, "second")
    torch.testing.assert_close(model(model.x), both)
    unmerge(model, "second")
    delete_adapter(model, "second")
    torch.testing.assert_close(model(model.x), out)
    remove(model)
    torch.testing.assert_close(model(model.x), out)
    if kind in ("linear", "convolution"):
        assert parametrize.is_parametrized(model[0], "weight") and not isinstance(model[0], AdaptedModule)
    else:
        assert type(model[0]) is nn.Linear and sorted(dict(model.named_parameters())) == ["0.bias", "0.weight"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(twin(twin.x), twins)  # a copy shares the class that torch.nn.utils.parametrize has made


def test_a_parametrised_weight_is_left_as_it_was() -> None:
    model = normed("linear")
    out, before = model(model.x), snapshot(model)
    inject(model, RandLoRAConfig(rank=2, target_modules=["0"]))
    randomize(model)
    merge(model)
    unmerge(model)
    remove(model)
    assert torch.equal(model(model.x), out)
    after = snapshot(model)
    assert {key: after[key] for key in ("types", "bytes", "requires_grad")} == {
        key: before[key] for key in ("types", "bytes", "requires_grad")
    }


@pytest.mark.filterwarnings("ignore:.*_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("hook", "advice"),
    [
        (torch.nn.utils.weight_norm, r"parametrizations.weight_norm, or call torch.nn.utils.remove_weight_norm first"),
        (torch.nn.utils.spectral_norm, r"parametrizations.spectral_norm, or call .*remove_spectral_norm first"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"pruning computes .*prune.remove first"),
    ],
)
def test_weights_that_hooks_compute_are_named_at_inject(hook: Callable[[nn.Module], object], advice: str) -> None:
    model = mlp()
    hook(model[0])
    with pytest.raises(ValueError, match=advice):
        plan(model, RandLoRAConfig(rank=2, target_modules=["0"]))
    report = inject(model, RandLoRAConfig(rank=2))
    assert [target.name for target in report.targets] == ["2"] and not isinstance(model[0], AdaptedModule)
