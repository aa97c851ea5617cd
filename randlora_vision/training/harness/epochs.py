"""Epochs converted to optimiser steps, once the size of the data is known."""

import math
from dataclasses import replace
from typing import TypeVar

from randlora_vision.training.harness.fit import Settings

_S = TypeVar("_S", bound=Settings)


def in_steps(settings: _S, images: int, processes: int) -> _S:
    """Return the settings with epochs as steps, so that config.yaml repeats the run on any data.

    An epoch is one pass over `images` training images, or, if it is 0 because they are not counted, over the number in
    the settings, which then stays there. Each step takes the batches of all processes and accumulation
    steps, and the passes follow each other without a break, so an epoch need not be a whole number of steps: the
    total is rounded up, and the intervals to the nearest step, but at least one.
    """
    training, checkpoints = settings.training, settings.checkpoints
    per_step = training.batch_size * training.gradient_accumulation_steps * processes
    per_epoch = (training.epoch_images or images) / per_step
    steps, warmup, eval_every = training.steps, training.warmup_steps, training.eval_every
    if training.epochs is not None:
        steps = max(1, math.ceil(round(training.epochs * per_epoch, 6)))
    if training.warmup_epochs is not None:
        warmup = round(training.warmup_epochs * per_epoch)
    if training.eval_epochs is not None:
        eval_every = max(1, round(training.eval_epochs * per_epoch))
    decay_steps = training.decay_steps
    if training.decay_epochs:
        decay_steps = tuple(max(1, round(epochs * per_epoch)) for epochs in training.decay_epochs)
    every = checkpoints.checkpoint_every
    if checkpoints.checkpoint_epochs is not None:
        every = max(1, round(checkpoints.checkpoint_epochs * per_epoch))
    return replace(  # type: ignore[type-var]  # a dataclass
        settings,
        training=replace(
            training,
            steps=steps,
            warmup_steps=warmup,
            eval_every=eval_every,
            decay_steps=decay_steps,
            lr=training.scaled_lr(per_step),
            epochs=None,
            epoch_images=None if images else training.epoch_images,
            warmup_epochs=None,
            eval_epochs=None,
            decay_epochs=(),
            lr_images=None,
            lr_scaling=None,
        ),
        checkpoints=replace(checkpoints, checkpoint_every=every, checkpoint_epochs=None),
    )
