"""The first-step check: it names weights that should get gradients but do not, and accepts those that need none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.nfnet import NfCfg, NormFreeNet
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, check_gradients, inject, load_adapter, merge, save_adapter, set_active
from randlora_vision.names import listing, summarise
from tests.helpers import IMAGES, mlp, vit

X = torch.linspace(-2, 2, 24).reshape(3, 8)
CONFIG = RandLoRAConfig(rank=2, target_modules=["0", "2"])


def step(model: nn.Module, x: Tensor = X) -> nn.Module:
    model(x).square().sum().backward()
    return model


@pytest.mark.parametrize("init", ["lambda-zero", "gamma-zero"])
def test_one_zero_gradient_at_the_start_is_as_it_should_be(init: str) -> None:
    model = vit()
    inject(model, RandLoRAConfig(rank=4, init=init))
    step(model, torch.randn(IMAGES))
    silent = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert len(silent) == 8 and all(("gamma" if init == "lambda-zero" else "lambda") in name for name in silent)
    assert check_gradients(model) == []


def test_a_model_that_has_not_run_backward_is_told() -> None:
    model = mlp()
    inject(model, CONFIG)
    with pytest.raises(ValueError, match="no gradient reaches the adapters of 0.weight, 2.weight"):
        check_gradients(model)
    with pytest.raises(ValueError, match="has no adapters"):
        check_gradients(mlp())


class Hosts(nn.Module):
    """Experts, one of which gets all tokens, and q, k, v projections that a fused one has replaced."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.to_q, self.to_qkv = nn.Linear(8, 8), nn.Linear(8, 24)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        x = self.experts[1](x)
        return self.to_qkv(x) if self.fused else self.to_qkv(x)[..., :8] + self.to_q(x)


def test_a_dead_layer_is_an_error_that_names_it_and_says_what_to_do() -> None:
    model = Hosts(fused=True)
    inject(model, RandLoRAConfig(rank=2))
    step(model)
    with pytest.raises(ValueError, match="no gradient reaches the adapters of to_q.weight: .*exclude_modules"):
        check_gradients(model)


def test_experts_without_tokens_are_notes() -> None:
    model = Hosts(fused=False)
    inject(model, RandLoRAConfig(rank=2))
    step(model)
    notes = check_gradients(model)
    assert len(notes) == 2 and "experts.0.weight" in notes[0] and "experts.2.weight" in notes[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(value: float) -> None:
    model = mlp()
    inject(model, CONFIG)
    step(model)
    model[2].weight_randlora_lambda_default.grad[0, 0] = value
    with pytest.raises(ValueError, match="not finite at 2.weight"):
        check_gradients(model)


def test_zero_gradients_are_a_note() -> None:
    model = mlp()
    inject(model, CONFIG)
    (model(X) * 0).sum().backward()
    assert check_gradients(model) == [
        "the gradient is zero in this step at *.weight (x2) (a residual branch may start at zero)"
    ]


def resnet() -> nn.Module:
    return timm.create_model("resnet18")


def regnet() -> nn.Module:
    return timm.create_model("regnety_002")


def nfnet() -> nn.Module:
    config = NfCfg(
        depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=16, attn_layer="se", attn_kwargs={}, skipinit=True
    )
    return NormFreeNet(config, num_classes=5)


@pytest.mark.parametrize("make", [resnet, regnet, nfnet])
def test_branches_that_start_at_zero_do_not_stop_training(make: Callable[[], nn.Module]) -> None:
    """The truth is the base: the weights that have a gradient there, and those whose gradient is zero."""
    torch.manual_seed(0)
    model, base = make().eval(), make().eval()
    base.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    names = [target.name for target in inject(model, RandLoRAConfig(rank=2, target_modules="timm:conv")).targets]
    step(model, x)
    (note,) = check_gradients(model)
    step(base, x)
    gradients = {name: base.get_submodule(name).weight.grad for name in names}
    assert all(gradient is not None for gradient in gradients.values())
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    assert zero and zero != set(names)
    silent = listing(summarise([f"{name}.weight" for name in names if name in zero]))
    assert note == f"the gradient is zero in this step at {silent} (a residual branch may start at zero)"
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() and not parameter.requires_grad and parameter.ndim < 2:
                parameter.fill_(0.5)  # the branches open
    model.zero_grad()
    step(model, x)
    assert check_gradients(model) == []


class Tower(nn.Module):
    """A vision tower whose last layer and pooling head are not used, as in models of vision and language."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.pooler = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        self.pooler(states[-1])
        return states[-2]


def test_what_the_loss_cannot_reach_is_named() -> None:
    model = Tower()
    inject(model, RandLoRAConfig(rank=2, exclude_modules=["pooler"]))
    step(model)
    assert check_gradients(model) == ["no gradient at layers.2.weight in this step"]
    model = Tower()
    inject(model, RandLoRAConfig(rank=2))
    step(model)
    with pytest.raises(ValueError, match="no gradient reaches the adapters of pooler.weight: .*exclude_modules"):
        check_gradients(model)


def inactive(model: nn.Module, path: str) -> None:
    inject(model, CONFIG, "other")
    set_active(model, "default")


def frozen(model: nn.Module, path: str) -> None:
    source = mlp()
    inject(source, CONFIG)
    load_adapter(model, save_adapter(source, path), "other")


def merged(model: nn.Module, path: str) -> None:
    inject(model, CONFIG, "other")
    merge(model, "other")


@pytest.mark.parametrize("add", [inactive, frozen, merged])
def test_adapters_that_do_not_train_are_not_judged(
    add: Callable[[nn.Module, str], None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = mlp()
    inject(model, CONFIG)
    add(model, str(tmp_path_factory.mktemp("other") / "other.safetensors"))
    step(model)
    assert check_gradients(model) == []
    with pytest.raises(ValueError, match="no gradient"):
        model.zero_grad()
        check_gradients(model)


def test_an_adapter_without_any_gradient_is_found_beside_one_that_learns() -> None:
    model = mlp()
    inject(model, CONFIG)
    inject(model, CONFIG, "second")
    step(model)
    for name, parameter in model.named_parameters():
        if name.endswith("_second"):
            parameter.grad = None
    with pytest.raises(ValueError, match="no gradient"):
        check_gradients(model)
