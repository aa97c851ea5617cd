"""Between a task and the loop: what a run folder and checkpoints need around the training itself."""

from collections.abc import Mapping
from typing import Protocol

from accelerate import Accelerator
from torch import nn

from randlora_vision.training.checkpoints import Checkpoint, Checkpoints
from randlora_vision.training.files import fingerprint
from randlora_vision.training.images import ImageSplits
from randlora_vision.training.loop import Speed, Task, Trainer
from randlora_vision.training.options import FREE_SETTINGS, CheckpointOptions, TrainingOptions
from randlora_vision.training.run_folder import RunFolder, plain_settings


class FittingOptions(Protocol):
    """Any script's options."""

    @property
    def training(self) -> TrainingOptions:
        """How it is trained."""

    @property
    def checkpoints(self) -> CheckpointOptions:
        """How a run that was cut off goes on."""


def fit(
    task: Task,
    options: FittingOptions,
    splits: ImageSplits,
    run: RunFolder,
    accelerator: Accelerator,
    resume: Checkpoint | None,
    own_lr: Mapping[nn.Parameter, float],
) -> Speed:
    """Write the settings to the run folder and train, from a checkpoint where one is given.

    Raises ValueError when the checkpoint is of other settings or images, and as the loop does.
    """
    record = splits.record()
    processes = accelerator.num_processes
    settings = {**plain_settings(options), "images and split": fingerprint(record), "processes": processes}
    if resume:
        resume.check(settings, FREE_SETTINGS)
        run.keep_metrics(resume.state.step)
        accelerator.print(f"resumed from {resume.path}")
    run.write_config(options)
    run.write(run.split, record)
    checkpoints = Checkpoints(run.path, options.checkpoints, settings, run.writing)
    trainer = Trainer(
        task,
        options.training,
        accelerator,
        run.log,
        checkpoints,
        resume,
        own_lr=own_lr,
        keep_best=run.keep_best,
    )
    speed = trainer.run()
    if trainer.best:
        metric, best = options.training.best_metric, trainer.best
        accelerator.print(f"best validation {metric}: {best.value:.4g} after step {best.step}, kept in {run.best}")
    return speed
