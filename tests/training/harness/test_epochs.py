from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from randlora_vision.training.clip.options import ClipOptions, ClipSettings
from randlora_vision.training.harness.epochs import in_steps
from randlora_vision.training.harness.options import CheckpointOptions, TrainingOptions
from tests.training_helpers import clip_settings


def settings(checkpoints: CheckpointOptions | None = None, **training: Any) -> ClipSettings:
    options = ClipOptions(training=TrainingOptions(batch_size=4, **training))
    return replace(clip_settings(options), checkpoints=checkpoints or CheckpointOptions())


@pytest.mark.parametrize(
    ("epochs", "accumulation", "processes", "images", "steps"),
    [
        (3, 1, 1, 40, 30),  # 10 steps an epoch
        (3, 1, 1, 41, 31),  # passes follow each other without a break: 123 images are 30.75 steps
        (3, 2, 1, 40, 15),
        (3, 2, 3, 40, 5),
        (0.5, 1, 1, 40, 5),
        (1, 1, 1, 1, 1),
        (0.1, 1, 1, 120, 3),  # no 3.0000000000000004 steps
    ],
)
def test_epochs_are_steps_of_the_global_batch(
    epochs: float, accumulation: int, processes: int, images: int, steps: int
) -> None:
    training = in_steps(settings(epochs=epochs, gradient_accumulation_steps=accumulation), images, processes).training
    assert (training.steps, training.epochs) == (steps, None)


def test_warmup_evaluation_and_checkpoints_in_epochs() -> None:
    given = settings(CheckpointOptions(checkpoint_epochs=2), epochs=8, warmup_epochs=1.5, eval_epochs=0.5)
    resolved = in_steps(given, 40, 1)
    assert (resolved.training.steps, resolved.training.warmup, resolved.training.eval_every) == (80, 15, 5)
    assert resolved.checkpoints == CheckpointOptions(checkpoint_every=20)
    assert in_steps(resolved, 7, 2) == resolved


@pytest.mark.parametrize(
    ("optimizer", "scaling", "expected"),
    [("sgd", None, 0.3), ("adamw", None, 0.1 * 3**0.5), ("lamb", None, 0.1 * 3**0.5), ("adamw", "linear", 0.3)],
)
def test_a_rate_for_steps_of_other_sizes_is_scaled(optimizer: str, scaling: Any, expected: float) -> None:
    given = settings(lr=0.1, lr_images=8, lr_scaling=scaling, optimizer=optimizer, gradient_accumulation_steps=2)
    training = in_steps(given, 40, processes=3).training  # 24 images in a step
    assert training.lr == pytest.approx(expected) and (training.lr_images, training.lr_scaling) == (None, None)
    assert in_steps(replace(given, training=training), 40, 1).training.lr == training.lr


def test_an_epoch_can_have_a_given_number_of_images() -> None:
    assert in_steps(settings(epochs=2, epoch_images=8), 1000, 1).training.steps == 4


def test_the_warmup_is_a_fraction_or_a_number_of_steps() -> None:
    assert in_steps(settings(steps=50), 40, 1).training.warmup == 5
    assert in_steps(settings(steps=50, warmup_fraction=0.5), 40, 1).training.warmup == 25
    assert in_steps(settings(steps=50, warmup_steps=0), 40, 1).training.warmup == 0
    assert in_steps(settings(steps=50, warmup_steps=200), 40, 1).training.warmup == 200
