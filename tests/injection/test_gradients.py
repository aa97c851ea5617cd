"""The first-step check: it names weights that should get gradients but do not, and accepts those that need none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from randlora_vision import RandLoRAConfig, check_gradients, inject, load_adapter, merge, save_adapter, set_active
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


def test_zero_gradients_everywhere_are_an_error() -> None:
    model = mlp()
    inject(model, CONFIG)
    (model(X) * 0).sum().backward()
    with pytest.raises(ValueError, match="0.weight, 2.weight"):
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


def test_an_adapter_that_is_dead_everywhere_is_seen_beside_one_that_learns() -> None:
    model = mlp()
    inject(model, CONFIG)
    inject(model, CONFIG, "second")
    step(model)
    for name, parameter in model.named_parameters():
        if name.endswith("_second"):
            parameter.grad = None
    with pytest.raises(ValueError, match="no gradient"):
        check_gradients(model)
