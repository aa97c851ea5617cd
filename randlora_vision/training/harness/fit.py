"""Connects a task to the training loop: run folder, checkpoints and trackers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from randlora_vision.errors import Stopped
from randlora_vision.files.atomic import fingerprint
from randlora_vision.training.harness.checkpoints import Checkpoint, Checkpoints, find_checkpoint
from randlora_vision.training.harness.lock import lock_folder, unlock_folder
from randlora_vision.training.harness.loop import Trainer
from randlora_vision.training.harness.options import CheckpointOptions, RunOptions, Training
from randlora_vision.training.harness.preprocessing import check_preprocessing
from randlora_vision.training.harness.run_folder import RunFolder, open_run_folder, plain_settings
from randlora_vision.training.harness.stopping import StopRequests, seconds_of
from randlora_vision.training.harness.task import HELD_OUT, OwnBatches, Speed, Task
from randlora_vision.training.harness.trackers import end_trackers, report_pictures, start_trackers
from randlora_vision.training.option_fields import default_settings, marked_settings

EVALUATED = "eval"
"""The split, in metrics and trackers, of what is measured during training, but not on held-out images ("val")."""


class RunSettings(Protocol):
    """The options of a run."""

    @property
    def checkpoints(self) -> CheckpointOptions:
        """How checkpoints are written and resumed."""

    @property
    def run(self) -> RunOptions:
        """Where the results go."""


class Settings(RunSettings, Protocol):
    """The options of a script with the defaults filled in."""

    @property
    def training(self) -> Training:
        """How it is trained."""


_Options = TypeVar("_Options", bound=RunSettings)


class Data(Protocol):
    """The training data."""

    def record(self) -> dict[str, Any]:
        """Return a description for the run folder, as plain JSON."""


def open_run(options: _Options, script: str, accelerator: Accelerator) -> tuple[_Options, RunFolder, Checkpoint | None]:
    """Open the run folder, resuming from the checkpoint that `--resume` names, if given.

    Returns the options with the folder set and with `resume` cleared, so that config.yaml can be used again
    to start a new run. Raises ValueError as `find_checkpoint` and `open_run_folder` do.
    """
    folder = Path(options.run.output_dir or "")
    if options.checkpoints.resume == "latest" and options.run.output_dir and folder.is_dir():
        if accelerator.is_main_process:
            lock_folder(folder)  # before the newest is looked for, because the run that writes them may not have ended
    resume, run_options = find_checkpoint(options.checkpoints, options.run, accelerator.print)
    anew = options.checkpoints.resume is not None and resume is None
    checkpoints = replace(options.checkpoints, resume=None)
    options = replace(options, run=run_options, checkpoints=checkpoints)  # type: ignore[type-var]  # a dataclass
    run = open_run_folder(options.run, script, accelerator.is_main_process, resume is not None, anew)
    (path,) = broadcast_object_list([str(run.path)])  # the default name contains the first process's time
    if not run.writing:
        run = RunFolder(Path(path), writing=False)
    return options, run, resume


def fit(
    task: Task,
    options: Settings,
    data: Data,
    run: RunFolder,
    accelerator: Accelerator,
    resume: Checkpoint | None,
    preprocessing: Mapping[str, Mapping[str, Any]] | None = None,
    after_save: Callable[[int], None] | None = None,
) -> Speed:
    """Write the settings to the run folder and train, starting from a checkpoint if one is given.

    `preprocessing` says how images are prepared for "evaluation" and "training".

    Raises ValueError when the checkpoint was written with other settings or images, or images that were prepared in
    another way, and as `Trainer.run` does. Raises
    Stopped after a checkpoint when a signal or --time-limit asks for it. In both cases, the folder is unlocked.
    """
    with _unlocked_on_failure(run, accelerator):
        record = data.record()
        processes = accelerator.num_processes
        layout = task.batches.layout if isinstance(task.batches, OwnBatches) else {}
        settings = {
            **plain_settings(options),
            "images and split": fingerprint(record),
            "images": fingerprint(_without_place(record)),
            "processes": processes,
            **layout,
        }
        if resume:
            free, places = (marked_settings(options, mark) for mark in ("free", "place"))
            for note in resume.check(settings, free, _indivisible(task), places, default_settings(options)):
                accelerator.print(f"note: {note}")
            if preprocessing:
                check_preprocessing(run.preprocessing, preprocessing, "resume with the versions in environment.json")
            run.keep_metrics(resume.state.step)
            accelerator.print(f"resumed from {resume.path}")
        step = resume.state.step if resume else 0
        where = options.run.report_to, run.logs
        run.listeners.append(start_trackers(accelerator, *where, settings, step, options.run.tracker_project))
        run.write_config(options)
        run.write(run.split, record)
        if preprocessing:
            run.write(run.preprocessing, preprocessing)
        checkpoints = Checkpoints(run.path, options.checkpoints, settings, run.writing)
        limit = options.checkpoints.time_limit
        with StopRequests(seconds_of(limit) if limit else None, run.opened) as stop:
            trainer = Trainer(
                task,
                options.training,
                accelerator,
                run.log,
                checkpoints,
                resume,
                keep_best=run.keep_best,
                after_save=after_save,
                stop=stop,
                evaluated="val" if task.measured == HELD_OUT else EVALUATED,
            )
            speed = trainer.run()
        if trainer.best:
            metric, best = options.training.best_metric, trainer.best
            found = f"best {task.measured} {metric}: {best.value:.4g} after step {best.step}"
            accelerator.print(f"{found}, kept in {run.best}")
        return speed


def _without_place(value: Any) -> Any:
    """Return the record of images without where they are: of every path, its last two parts."""
    if isinstance(value, dict):
        return {name: _without_place(part) for name, part in value.items() if name not in ("name", "origin")}
    if isinstance(value, list):
        return [_without_place(part) for part in value]
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) else value


def _indivisible(task: Task) -> str:
    """Return why other batches than these have other images, if they have, even if a step has as many."""
    if isinstance(task.batches, OwnBatches):
        return "every process reads its own shards"
    same = getattr(task.batches.batch_sampler, "divisible", True)
    return "" if same else "the images have several sizes, each batch one of them"


@contextlib.contextmanager
def _unlocked_on_failure(run: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Unlock the folder of a run that fails or is stopped, and end the trackers of the latter."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Stopped):
            _close(accelerator)
        unlock_folder(run.path)
        raise


def finish(run: RunFolder, accelerator: Accelerator, step: int) -> None:
    """Report the run's pictures to the trackers at `step`, close what accelerate has opened, and unlock the folder."""
    if run.writing:
        report_pictures(accelerator, step, run.pictures())
    _close(accelerator)
    unlock_folder(run.path)


def _close(accelerator: Accelerator) -> None:
    end_trackers(accelerator)
    accelerator.free_memory()  # while all processes are still there: DeepSpeed's engine talks to them when it is freed
    accelerator.end_training()
