"""The suggested rate against its definition: the change that one step of Adam of PyTorch makes to the weights."""

from statistics import median

import pytest
import torch
from torch import nn

from randlora_vision import RandLoRAConfig, adapter_parameters, inject, merge, suggest_lr


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
@pytest.mark.parametrize(("rank", "alpha", "scale"), [(4, 80.0, 1.0), (16, 16.0, 0.2), (8, 8.0, 5.0)])
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
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suggest_lr(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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
