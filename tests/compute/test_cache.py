"""Inside a `cached` block W + delta W is cached, and never stale: every way to change the model is tested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from randlora_vision import (
    RandLoRAConfig,
    adapter_parameters,
    cached,
    delete_adapter,
    disabled,
    inject,
    merge,
    remove,
    set_active,
    set_scale,
    unmerge,
)
from randlora_vision.training.harness.ema import Ema
from tests.helpers import randomize


class Host(nn.Module):
    """A called layer of each orientation, packed attention and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(x).relu())
        x = self.attention(x, x, x, need_weights=False)[0] + x
        return self.mix(x)


def host(**settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Host().eval()
    inject(model, RandLoRAConfig(rank=2, target_modules="all", **settings))
    randomize(model)
    return model, torch.randn(20, 6, 8)


def truth(model: nn.Module, x: Tensor) -> Tensor:
    """The output of a copy that has never used a cache, outside any block."""
    with torch.enable_grad():
        return copy.deepcopy(model)(x).detach()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((got.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("bases", ["uniform", "sparse", "structured"])
def test_a_second_pass_costs_what_the_merged_model_costs(bases: str) -> None:
    model, x = host(bases=bases)
    merged = copy.deepcopy(model)
    merge(merged)
    with torch.no_grad(), cached():
        model(x)
        assert close(model(x), merged(x))
        assert flops(model, x) == flops(merged, x)
    with torch.no_grad():
        assert flops(model, x) > flops(merged, x)


def optimiser_step(model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    with torch.enable_grad():
        model(torch.ones(2, 6, 8)).square().sum().backward()
    optimizer.step()


def through_data(model: nn.Module) -> None:
    for _, parameter in adapter_parameters(model):
        parameter.data.mul_(1.5)  # does not increment the version counter


def other_storage(model: nn.Module) -> None:
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data * 1.5


def other_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if "_randlora_" in name and parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach() * 1.5)


def averages(model: nn.Module) -> None:
    ema = Ema(dict(adapter_parameters(model)), 0.5)
    for average in ema.averages.values():
        average.mul_(1.5)
    ema.put_into_model()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def second_adapter(model: nn.Module) -> None:
    inject(model, RandLoRAConfig(rank=3, seed=5, target_modules="all"), "second")
    randomize(model, "second")


def switched(model: nn.Module) -> None:
    second_adapter(model)
    set_active(model, "second")


def base_moved(model: nn.Module) -> None:
    with torch.no_grad():
        model.down.base_weight().add_(0.1)


CHANGES: list[Callable[[nn.Module], Any]] = [
    optimiser_step,
    through_data,
    other_storage,
    other_parameters,
    averages,
    loaded,
    second_adapter,
    switched,
    base_moved,
    lambda model: set_scale(model, 0.5),
    lambda model: set_scale(model, 0.0),
    lambda model: set_active(model, []),
    merge,
    remove,
    lambda model: model.double(),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_leaves_a_stale_weight(change: Callable[[nn.Module], Any]) -> None:
    model, x = host()
    with torch.no_grad(), cached():
        for _ in range(2):
            before = model(x)
        change(model)
        x = x.to(next(model.parameters()).dtype)
        expected = truth(model, x)
        for _ in range(2):
            assert close(model(x), expected)
    if change is not merge and expected.dtype == torch.float32:
        assert not close(before, expected, 1e-2)  # the change has an effect


def test_there_and_back() -> None:
    model, x = host()
    with torch.no_grad(), cached():
        first = model(x)
        with disabled(model):
            assert close(model(x), truth(model, x))
        assert close(model(x), first)
        merge(model)
        unmerge(model)
        set_scale(model, 2.0)
        set_scale(model, 1.0)
        second_adapter(model)
        model(x)
        delete_adapter(model, "second")
        assert close(model(x), first)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert close(model(x), first)
        assert low.dtype == torch.bfloat16
        assert close(low, first, 0.05)


def test_passes_that_record_gradients_do_without() -> None:
    model, x = host()
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in adapter_parameters(model) if p.grad is not None}
    model.zero_grad()
    with cached():
        with torch.no_grad():
            model(x)
            model(x)
        with torch.enable_grad():
            model(x).square().sum().backward()
    assert expected
    for name, parameter in adapter_parameters(model):
        assert close(parameter.grad, expected[name])


def test_a_weight_that_a_user_reads_is_not_the_kept_one() -> None:
    model, x = host()
    with torch.no_grad(), cached():
        model(x)
        expected = model(x)
        model.up.weight.data.zero_()
        model.attention.in_proj_weight.zero_()
        assert close(model(x), expected)


def test_few_tokens_do_not_build_a_matrix_until_it_pays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64))
    inject(model, RandLoRAConfig(rank=4))
    randomize(model)
    x = torch.randn(1, 32)
    with torch.no_grad(), cached():
        costs = [flops(model, x) for _ in range(64)]
    plain = 2 * 32 * 64
    built = costs.index(max(costs))
    assert plain < costs[0] < max(costs)
    assert 5 < built < 60 and costs[built + 1 :] == [plain] * (63 - built)


def test_blocks_nest_and_end() -> None:
    model, x = host()
    with torch.no_grad():
        with cached():
            model(x)
            with cached():
                inner = flops(model, x)
            assert flops(model, x) == inner
        assert flops(model, x) > inner


def test_inference_mode_compiled_and_functional_calls() -> None:
    model, x = host()
    expected = truth(model, x)
    with cached():
        with torch.inference_mode():
            assert close(model(x), expected)
            assert close(model(x), expected)
        with torch.no_grad():
            assert close(model(x), expected)
            compiled = torch.compile(model, backend="eager")
            assert close(compiled(x), expected)
            set_scale(model, 0.5)
            assert close(compiled(x), truth(model, x))
            layer = nn.Linear(8, 8)
            inject(layer, RandLoRAConfig(rank=2))
            randomize(layer)
            own = dict(layer.named_parameters())
            name = next(name for name in own if "lambda" in name)
            stack = torch.stack([own[name].detach(), own[name].detach() * 3])
            rows = torch.randn(50, 8)
            layer(rows)
            mapped = torch.vmap(lambda lam: torch.func.functional_call(layer, {name: lam}, (rows,)))(stack)
            assert close(mapped[0], layer(rows))
            delta = layer(rows) - F.linear(rows, layer.base_weight(), layer.bias)  # type: ignore[operator]
            assert close(mapped[1], layer(rows) + 2 * delta)
    torch._dynamo.reset()
