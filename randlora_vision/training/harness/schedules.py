"""Learning-rate schedules: their options, and the factor on the peak rates at every step, the same for every script.

The schedules are by hand, because the warmups of timm and diffusers start at a rate of zero, so that the first step
learns nothing, and PyTorch's chained schedulers multiply rounded rates.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from randlora_vision.training.option_fields import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    INSIDE,
    PART,
    RARE,
    Options,
    flag,
)

Shape = Literal[
    "cosine", "cosine_with_restarts", "linear", "polynomial", "tanh", "constant", "wsd", "step", "multistep", "plateau"
]
_WARMUP_FRACTION = 0.1
_LOUDEST = 0.67  # timm's, of the noise
_USES = {
    "lr_power": ("polynomial", "wsd"),
    "lr_num_cycles": ("cosine_with_restarts",),
    "lr_cycle_mul": ("cosine_with_restarts",),
    "lr_cycle_decay": ("cosine_with_restarts",),
    "decay_steps": ("step", "multistep", "wsd"),
    "decay_epochs": ("step", "multistep", "wsd"),
    "decay_rate": ("step", "multistep", "plateau"),
    "plateau_patience": ("plateau",),
}
"""The schedules that an option is for."""


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """The learning rate over time."""

    min_lr: float = field(default=0.0, metadata=RARE | AT_LEAST_0)
    """Lowest learning rate after the warmup. Other peak rates end at the same fraction of their peak."""
    warmup_fraction: float | None = field(default=None, metadata=BELOW_1)
    """Fraction of the steps over which the learning rate warms up linearly. Default: 0.1."""
    warmup_steps: int | None = field(default=None, metadata=AT_LEAST_0)
    """Steps over which it warms up, instead of a fraction."""
    warmup_epochs: float | None = field(default=None, metadata=RARE | AT_LEAST_0)
    """Epochs over which it warms up, instead of a fraction."""
    warmup_lr: float | None = field(default=None, metadata=RARE | ABOVE_0)
    """Learning rate of the first step of the warmup. Default: the peak divided by the steps of the warmup."""
    schedule: Shape = "cosine"
    """The learning rate after the warmup. It falls to --min-lr along a half cosine, a line, a power of it or a
    hyperbolic tangent; or it is constant; or falls in steps. wsd: constant, and a power over the last --decay-steps.
    step: times --decay-rate every --decay-steps, counted from the start. multistep: after each of them. plateau: after
    --plateau-patience evaluations in which --best-metric does not improve."""
    lr_power: float = field(default=1.0, metadata=RARE | ABOVE_0)
    """The power of --schedule polynomial or wsd."""
    lr_num_cycles: int = field(default=1, metadata=RARE | AT_LEAST_1)
    """How many times --schedule cosine_with_restarts falls."""
    lr_cycle_mul: float = field(default=1.0, metadata=RARE | ABOVE_0)
    """Each of its cycles takes this times the steps of the one before."""
    lr_cycle_decay: float = field(default=1.0, metadata=RARE | PART)
    """The peak of each of its cycles is this times that of the one before."""
    decay_steps: tuple[int, ...] = field(default=(), metadata=RARE)
    """One number of steps for --schedule step or wsd, several for multistep."""
    decay_epochs: tuple[float, ...] = field(default=(), metadata=RARE)
    """The same in epochs, instead of --decay-steps."""
    decay_rate: float = field(default=0.1, metadata=RARE | INSIDE)
    """What each fall of --schedule step, multistep or plateau multiplies the learning rate by."""
    plateau_patience: int = field(default=10, metadata=RARE | AT_LEAST_0)
    """Evaluations without an improvement before --schedule plateau falls: it falls after one more."""
    lr_noise: tuple[float, ...] = field(default=(), metadata=RARE)
    """Multiply the learning rate by 1 + n at every step, n normal and between -0.67 and 0.67, from this fraction of the
    steps on, or between two fractions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decay_steps", "decay_epochs"):
            times = getattr(self, name)
            if any(one >= other for one, other in zip((0, *times), times, strict=False)):
                raise ValueError(f"{flag(name)} must be above 0 and rise, got {' '.join(map(str, times))}")
        for name, shapes in _USES.items():
            usual = ScheduleOptions.__dataclass_fields__[name].default
            if getattr(self, name) != usual and self.schedule not in shapes:
                raise ValueError(f"{flag(name)} is for --schedule {' or '.join(shapes)}, not for {self.schedule}")
        if len(self.lr_noise) > 2 or list(self.lr_noise) != sorted(self.lr_noise):
            raise ValueError(f"--lr-noise must be one or two rising numbers, got {self.lr_noise}")
        times = self.decay_steps or self.decay_epochs
        if self.schedule in _USES["decay_steps"] and not times:
            raise ValueError(f"--schedule {self.schedule} needs --decay-steps or --decay-epochs")
        if self.schedule in ("step", "wsd") and len(times) > 1:
            raise ValueError(f"--schedule {self.schedule} takes one number of --decay-steps: give --schedule multistep")


@dataclass(frozen=True)
class Schedule:
    """The factor on the peak learning rates.

    Args:
        steps: The steps of the whole training.
        warmup: The steps in which it rises.
        shape: What it does after them.
        floor: The lowest factor after the warmup.
        start: The factor of the first step of the warmup; 0: 1 / warmup.
        power: The power of "polynomial" and "wsd".
        cycles: The falls of "cosine_with_restarts".
        cycle_mul: The length of each of them, relative to the one before.
        cycle_decay: The peak of each of them, relative to the one before.
        times: The steps of "step", "multistep" and "wsd".
        rate: The factor of each fall of "step", "multistep" and "plateau".
        noise: The fraction of the steps from which the factor is noisy, and that up to which it is.
        seed: The seed of the noise.
    """

    steps: int
    warmup: int = 0
    shape: Shape = "cosine"
    floor: float = 0.0
    start: float = 0.0
    power: float = 1.0
    cycles: int = 1
    cycle_mul: float = 1.0
    cycle_decay: float = 1.0
    times: tuple[int, ...] = ()
    rate: float = 0.1
    noise: tuple[float, ...] = ()
    seed: int = 0

    def factor(self, step: int, falls: int = 0) -> float:
        """Return the factor at `step`, counted from 0, after so many `falls` of "plateau"."""
        start, end = (*self.noise, 1.0, 1.0)[:2]
        noisy = start * self.steps <= step < end * self.steps
        return self._smooth(step, falls) * (1 + (_noise(self.seed + step) if noisy else 0.0))

    def _smooth(self, step: int, falls: int) -> float:
        """Return the factor without noise.

        It rises linearly over the warmup (starting above zero, so that step 0 learns too). What falls after it would
        reach the floor at the end of the training.
        """
        if step < self.warmup:
            return self.start + step * (1 - self.start) / self.warmup if self.start else (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.shape == "constant":
            return 1.0
        if self.shape == "step":
            return max(self.floor, self.rate ** (step // self.times[0]))
        if self.shape == "multistep":
            return max(self.floor, self.rate ** bisect_right(self.times, step))
        if self.shape == "plateau":
            return max(self.floor, self.rate**falls)
        peak = 1.0
        if self.shape == "cosine_with_restarts" and part < 1:
            cycle, part = self._cycle(part)
            peak = max(self.floor, self.cycle_decay**cycle)
        return self.floor + (peak - self.floor) * self._fallen(step, part)

    def _cycle(self, part: float) -> tuple[int, float]:
        """Return the number of a cycle, from 0, and the part of it that is over; its lengths are a geometric series."""
        mul = self.cycle_mul
        if mul == 1:
            return int(self.cycles * part), self.cycles * part % 1
        *starts, end = accumulate((mul**cycle for cycle in range(self.cycles)), initial=0.0)
        past = part * end  # in lengths of the first cycle
        cycle = bisect_right(starts, past * (1 + 1e-12)) - 1  # which is not rounded to below a start
        return cycle, max(0.0, past - starts[cycle]) / mul**cycle

    def _fallen(self, step: int, part: float) -> float:
        if self.shape == "linear":
            return 1 - part
        if self.shape == "polynomial":
            return (1 - part) ** self.power
        if self.shape == "tanh":
            return 0.5 * (1 - math.tanh(-7 * (1 - part) + 3 * part))  # timm's
        if self.shape == "wsd":
            return min(1.0, (self.steps - step) / self.times[0]) ** self.power
        return 0.5 * (1 + math.cos(math.pi * part))


def _noise(seed: int) -> float:
    """Return a number from a normal distribution without the tails."""
    generator = torch.Generator().manual_seed(seed)
    while abs(number := torch.randn(1, generator=generator).item()) >= _LOUDEST:
        pass
    return number


def warmup_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, done: int = 0, falls: int = 0) -> LambdaLR:
    """Return a scheduler that applies the factor; call its `step()` once per optimiser step.

    After `done` steps, the groups of the optimiser must hold their "initial_lr".
    """
    return LambdaLR(optimizer, lambda step: schedule.factor(step, falls), last_epoch=done - 1)


def warmup_steps(options: ScheduleOptions, steps: int) -> int:
    """Return the number of steps over which the learning rate warms up."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    return round((_WARMUP_FRACTION if options.warmup_fraction is None else options.warmup_fraction) * steps)
