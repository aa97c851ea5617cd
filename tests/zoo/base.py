"""What one entry of the zoo is, and the few helpers that all its builders share."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.copies import template

Build = Callable[[], nn.Module]
Run = Callable[[nn.Module], Tensor]

# A constant below this is a start that mutes its branch (zero gate, layer scale of 1e-6), not a norm's weight.
MUTED = 0.11
# A matrix whose entries times the root of its fan-in stay below this passes hardly any signal on.
FAINT = 0.5


@dataclass(frozen=True)
class Entry:
    """One small host model and how to run it.

    `build` gives the same model, in eval mode, at every call. `run` gives one floating tensor that depends on all
    of the model; its inputs are fixed, and in the model's precision. `target` is the `target_modules` to adapt.
    `unreachable` lists regular expressions of parameter names whose parameters cannot change `run`'s output.
    `float32_inside` marks a host that computes a part in float32 whatever the model's precision.
    """

    name: str
    build: Build
    run: Run
    target: str = "all-linear"
    slow: bool = False
    unreachable: tuple[str, ...] = ()
    rank: int = 4
    float32_inside: bool = False

    @property
    def every_switch(self) -> bool:
        """Whether all ways to switch adapters are tried. torch's modules have every kind of adapted layer."""
        return self.name.startswith("torch/")


def entry(name: str, make: Build, run: Run, **options: Any) -> Entry:
    """An entry whose `build` draws `make`'s model from a fixed seed, without mute branches, ready for inference."""

    @functools.cache
    def kept() -> Callable[[], nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make()
            unmute(model)
        return template(model.eval())

    # A copy takes a fraction of the time of a new one.
    return replace(Entry(name, lambda: kept()(), run), **options)


@torch.no_grad()
def unmute(model: nn.Module) -> None:
    """Let every branch be heard: behind a muted one no adapter moves the output, whatever it does.

    Zero or tiny constant parameters are redrawn; matrices whose start suits a wide model only are scaled up.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = parameter.aminmax()
        if low == high and abs(high.item()) < MUTED:
            parameter.normal_(std=0.1)
        elif low < high and parameter.ndim >= 2:
            gain = parameter.std() * parameter[0].numel() ** 0.5
            parameter.mul_((FAINT / gain).clamp(min=1))


def precision(model: nn.Module) -> torch.dtype:
    """float64 once the model was turned to it; an adapter's float32 parameters do not decide."""
    doubled = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if doubled else torch.float32


def numbers(model: nn.Module, *shape: int) -> Tensor:
    """Fixed inputs, spread evenly over [-1.5, 1.5] and shuffled, in the model's precision."""
    return _spread(math.prod(shape)).reshape(shape).to(precision(model), copy=True)


@functools.cache
def _spread(count: int) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return torch.linspace(-1.5, 1.5, count, dtype=torch.float64)[order]


def tokens(*shape: int, vocabulary: int = 32) -> Tensor:
    """Fixed token ids between 3 and the vocabulary's last but one: no padding, start or end token."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randint(3, vocabulary - 1, shape, generator=generator)


def flat(*outputs: Tensor) -> Tensor:
    """Several outputs as one."""
    return torch.cat([output.flatten() for output in outputs])


def reading(output: Tensor) -> Tensor:
    """A number that every entry of the output moves. A mean square would not do: after a LayerNorm it is constant."""
    weights = torch.randn(output.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (output.flatten() * weights.to(output.dtype)).sum()
