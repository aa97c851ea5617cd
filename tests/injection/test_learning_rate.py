"""The suggested rate against its definition: the change that a step makes to the weights, or to the features."""

from functools import partial
from statistics import median

import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, merge, suggest_lr
from randlora_vision.injection.learning_rate import FEATURE_STEP


def network(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.GELU(), nn.Linear(48, 48))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def change_of_one_step(model: nn.Module, lr: float) -> float:
    """The median over the weights of the change by one step, relative to the weight."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    before = [module.weight.detach().clone() for module in linear]
    optimizer = torch.optim.Adam([parameter for _, parameter in adapter_parameters(model)], lr=lr)
    inputs, targets = (torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()
    merge(model)
    after = [module.weight.detach() for module in linear]
    return median(float((new - old).norm() / old.norm()) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("bases", ["uniform", "sparse", "structured"])
@pytest.mark.parametrize("init", ["lambda-zero", "gamma-zero"])
@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, 80.0, 1.0), (16, 16.0, 0.2), (8, 400.0, 5.0)])
def test_one_step_of_adam_changes_the_weights_by_the_relative_step(
    bases: str, init: str, rank: int, alpha: float, scale: float
) -> None:
    model = network(scale)
    inject(model, RandLoRAConfig(rank=rank, alpha=alpha, init=init, bases=bases, target_modules="all-linear"))
    lr = suggest_lr(model, relative_step=0.02)
    assert lr == suggest_lr(model, relative_step=0.02) == pytest.approx(2 * suggest_lr(model, relative_step=0.01))
    assert change_of_one_step(model, lr) == pytest.approx(0.02, rel=0.5)  # gradients' signs are not random ones


def test_the_model_stays_as_it_is() -> None:
    model = network()
    inject(model, RandLoRAConfig(rank=4, target_modules="all-linear"))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suggest_lr(model)
    suggest_lr(model, features=lambda: model(INPUTS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True] and model.training


INPUTS = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))


def change_of_features(model: nn.Module, lr: float, seed: int, draws: int = 1) -> float:
    """The change of the outputs by signs times the rate in what starts at zero, relative to the outputs' spread.

    It is the root mean square over a number of draws of signs.
    """
    generator = torch.Generator().manual_seed(seed)
    zeros = [parameter for _, parameter in adapter_parameters(model) if not parameter.any()]
    with torch.no_grad():
        before, squares = model(INPUTS), 0.0
        for _ in range(draws):
            for parameter in zeros:
                parameter.copy_(lr * (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1))
            squares += float((model(INPUTS) - before).square().sum() / (before - before.mean(0)).square().sum()) / draws
        for parameter in zeros:
            parameter.zero_()
    return squares**0.5


@pytest.mark.parametrize("bases", ["uniform", "structured"])
@pytest.mark.parametrize(("init", "alpha"), [("lambda-zero", 80.0), ("lambda-zero", 400.0), ("gamma-zero", 80.0)])
@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_random_signs_change_the_features_by_the_part_of_their_spread(
    bases: str, init: str, alpha: float, scale: float
) -> None:
    model = network(scale)
    inject(model, RandLoRAConfig(rank=4, alpha=alpha, init=init, bases=bases, target_modules="all-linear"))
    lr = suggest_lr(model, features=lambda: model(INPUTS))
    shifted = suggest_lr(model, features=lambda: 7 * model(INPUTS) + torch.arange(48))
    assert lr == pytest.approx(shifted, rel=1e-3)
    assert change_of_features(model, lr, seed=5) == pytest.approx(FEATURE_STEP, rel=0.25)  # other signs
    assert change_of_features(model, lr, seed=0, draws=4) == pytest.approx(FEATURE_STEP, rel=0.01)  # its own


@pytest.mark.parametrize(("init", "other"), [("lambda-zero", 1 / 48), ("gamma-zero", 1 / 12)])  # 12 bases of rank 4
def test_the_rate_is_at_most_the_size_of_the_other_factor(init: str, other: float) -> None:
    model = network()
    inject(model, RandLoRAConfig(rank=4, alpha=1e-3, init=init, target_modules="all-linear"))
    assert suggest_lr(model) == pytest.approx(other)
    assert suggest_lr(model, features=lambda: model(INPUTS)) == pytest.approx(other)


def test_depth_lowers_the_rate_of_the_features_and_not_that_of_the_weights() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self:
                x = x + layer(x)
            return x

    rates = {}
    for depth in (2, 32):
        torch.manual_seed(0)
        model = Residual(*(nn.Linear(48, 48) for _ in range(depth)))
        inject(model, RandLoRAConfig(rank=4, target_modules="all-linear"))
        rates[depth] = suggest_lr(model), suggest_lr(model, features=lambda model=model: model(INPUTS))
    assert rates[32][0] == pytest.approx(rates[2][0], rel=0.05)
    assert rates[32][1] < 0.5 * rates[2][1]


def test_of_several_features_the_one_that_changes_most_counts() -> None:
    model = network()
    inject(model, RandLoRAConfig(rank=4, target_modules="all-linear"))
    both = suggest_lr(model, features=lambda: (model(INPUTS), INPUTS))
    assert both == suggest_lr(model, features=lambda: model(INPUTS))


def test_features_that_give_no_rate_are_an_error() -> None:
    model = network()
    inject(model, RandLoRAConfig(rank=4, target_modules=["4"]))
    equal, rounded, infinite = INPUTS[:1], 1 + 1e-7 * INPUTS, float("nan") * INPUTS
    for inputs in (equal, rounded, infinite):
        features = partial(model, inputs)
        with pytest.raises(ValueError, match="samples are all equal, or not finite"):
            suggest_lr(model, features=features)
    with pytest.raises(ValueError, match="features do not depend on the adapter 'default'"):
        suggest_lr(model, features=lambda: model[:4](INPUTS))
    at_first = model(INPUTS).detach()

    def jumping() -> torch.Tensor:
        moved = model(INPUTS).detach()
        return moved + 9 * (moved - at_first).sign() * ((moved - at_first).norm() > 0.05 * at_first.norm())

    with pytest.raises(ValueError, match=r"no rate was found .* they jump"):
        suggest_lr(model, features=jumping)


def test_what_has_no_norm_to_go_by_is_an_error() -> None:
    model = network()
    with pytest.raises(ValueError, match="this Sequential has no adapter 'default'"):
        suggest_lr(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    inject(model, RandLoRAConfig(rank=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="quantised, offloaded or zero"):
        suggest_lr(model)
