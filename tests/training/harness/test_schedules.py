"""Learning-rate schedules, against those of PyTorch, timm, transformers and open_clip."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from open_clip_train.scheduler import const_lr_cooldown
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup

from randlora_vision.training.harness.options import Training, TrainingOptions
from randlora_vision.training.harness.schedules import Schedule

STEPS, WARMUP = 60, 6


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def factors(shape: Any, steps: int = STEPS, **options: Any) -> list[float]:
    schedule = Schedule(steps, shape=shape, **options)
    return [schedule.factor(step) for step in range(steps)]


def torchs(scheduler: Any) -> list[float]:
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def timms(**options: Any) -> list[float]:
    own = optimizer()
    scheduler, _ = create_scheduler_v2(own, num_epochs=STEPS, step_on_epochs=False, updates_per_epoch=1, **options)
    rates = []
    for step in range(STEPS):
        scheduler.step_update(step)
        rates.append(own.param_groups[0]["lr"])
    return rates


def test_the_default_warms_up_and_falls_along_a_cosine() -> None:
    found = factors("cosine", 100, warmup=10)
    assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert found[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 90)) for step in range(90)])
    assert Schedule(1).factor(0) == 1.0


def test_schedules_share_their_warmup_and_end_differently() -> None:
    linear, constant = factors("linear", 100, warmup=10), factors("constant", 100, warmup=10)
    floor = [Schedule(100, 10, "linear", 0.25).factor(step) for step in (9, 10, 55, 100)]
    assert floor == pytest.approx([1, 1, 0.625, 0.25])
    assert linear[:10] == constant[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert linear[55] == pytest.approx(0.5) and linear[99] == pytest.approx(1 / 90)
    assert set(constant[10:]) == {1.0}


@pytest.mark.parametrize(
    ("shape", "own", "timm"),
    [
        ("step", {"times": (7,), "rate": 0.97}, {"decay_epochs": 7, "decay_rate": 0.97}),
        ("tanh", {"floor": 0.01}, {"min_lr": 0.01}),
        ("polynomial", {"power": 0.5, "floor": 0.1}, {"sched": "poly", "decay_rate": 0.5, "min_lr": 0.1}),
        ("cosine", {"floor": 0.1}, {"min_lr": 0.1}),
        ("step", {"times": (7,), "warmup": 6, "start": 0.1}, {"decay_epochs": 7, "warmup_epochs": 6, "warmup_lr": 0.1}),
        ("cosine", {"noise": (0.4, 0.9), "seed": 5}, {"noise": [0.4, 0.9], "noise_seed": 5}),
        ("tanh", {"noise": (0.4,), "seed": 6}, {"noise": [0.4], "noise_seed": 6}),
    ],
)
def test_the_factors_are_timms(shape: str, own: dict[str, Any], timm: dict[str, Any]) -> None:
    assert factors(shape, **own) == pytest.approx(timms(**{"sched": shape, **timm}))


@pytest.mark.parametrize(
    ("cycles", "mul", "decay", "steps"), [(3, 2.0, 0.5, 140), (2, 1.0, 0.8, 40), (3, 0.5, 0.4, 35)]
)
def test_cycles_of_several_lengths_and_peaks_are_timms(cycles: int, mul: float, decay: float, steps: int) -> None:
    own = optimizer()
    given = {"cycle_limit": cycles, "cycle_mul": mul, "cycle_decay": decay}
    scheduler, _ = create_scheduler_v2(
        own, num_epochs=20, step_on_epochs=False, updates_per_epoch=1, min_lr=0.1, **given
    )
    expected = [(scheduler.step_update(step), own.param_groups[0]["lr"])[1] for step in range(steps)]
    found = factors("cosine_with_restarts", steps, floor=0.1, cycles=cycles, cycle_mul=mul, cycle_decay=decay)
    assert found == pytest.approx(expected)


def test_the_factors_are_pytorchs_and_transformers() -> None:
    assert factors("multistep", times=(10, 25, 26), rate=0.3) == pytest.approx(
        torchs(MultiStepLR(optimizer(), [10, 25, 26], 0.3))
    )
    restarts = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer(), WARMUP, STEPS, num_cycles=3)
    power = get_polynomial_decay_schedule_with_warmup(optimizer(), WARMUP, STEPS, lr_end=0.1, power=2.0)
    for shape, other, options in (
        ("cosine_with_restarts", restarts, {"cycles": 3}),
        ("polynomial", power, {"power": 2.0, "floor": 0.1}),
    ):
        assert factors(shape, warmup=WARMUP, **options)[WARMUP:] == pytest.approx(torchs(other)[WARMUP:])


def test_the_cooldown_is_open_clips() -> None:
    own = optimizer()
    adjust = const_lr_cooldown(own, 1.0, WARMUP, STEPS, 20, 2.0, 0.1)
    assert factors("wsd", warmup=WARMUP, times=(20,), power=2.0, floor=0.1) == pytest.approx(
        [float(adjust(step)) for step in range(STEPS)]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "step"}, "--schedule step needs --decay-steps or --decay-epochs"),
        ({"schedule": "step", "decay_steps": (3, 5)}, "takes one number of --decay-steps: give --schedule multistep"),
        ({"schedule": "multistep", "decay_steps": (5, 3)}, "--decay-steps must be above 0 and rise, got 5 3"),
        ({"decay_epochs": (2.0,)}, "--decay-epochs is for --schedule step or multistep or wsd, not for cosine"),
        ({"lr_power": 2.0}, "--lr-power is for --schedule polynomial or wsd, not for cosine"),
        ({"lr_num_cycles": 2}, "--lr-num-cycles is for --schedule cosine_with_restarts"),
        ({"warmup_lr": 0.2, "lr": 0.1}, "--warmup-lr must be at most --lr 0.1, got 0.2"),
        ({"lr_noise": (0.9, 0.4)}, "--lr-noise must be one or two rising numbers"),
        ({"lr_cycle_mul": 2.0}, "--lr-cycle-mul is for --schedule cosine_with_restarts"),
        ({"lr_images": 1}, "--lr-images \\(--scale-lr, --lr-base-size\\) needs a number for --lr"),
        ({"optimizer_kwargs": ("lr=1",)}, "--optimizer-kwargs lr=1: expected NAME=VALUE with a name other than lr"),
        ({"optimizer": "prodigy", "lr": "auto"}, "--lr auto is for AdamW"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TrainingOptions(**options)


def test_the_options_reach_the_schedule() -> None:
    options = Training(
        steps=9, lr=0.5, min_lr=0.25, warmup_lr=0.0625, schedule="step", decay_steps=(4,), decay_rate=0.7
    )
    assert options.rates == Schedule(9, 1, "step", 0.5, 0.125, times=(4,), rate=0.7)
