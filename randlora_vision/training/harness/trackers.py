"""Trackers such as TensorBoard and Weights & Biases, through accelerate.

Names are checked here, because accelerate drops a tracker that is not installed without saying so.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from randlora_vision.errors import failures, reason_of
from randlora_vision.names import close_matches
from randlora_vision.training.harness.progress import Log

_PROJECT = "randlora_vision"
_DEFAULT = "tensorboard"


def chosen_trackers(names: Sequence[str]) -> list[str]:
    """Return the trackers of --report-to, by default TensorBoard; raise ValueError for one unknown or not installed."""
    installed = [str(name) for name in get_available_trackers()]
    if not names:
        return [_DEFAULT] if _DEFAULT in installed else []
    if "none" in names:
        if len(names) > 1:
            raise ValueError(f"--report-to {' '.join(names)}: none cannot be combined with other trackers")
        return []
    known = [name for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            hint = close_matches(name, known) or f"choose from none, {', '.join(known)}"
            raise ValueError(f"--report-to {name} is not known; {hint}")
        if name not in installed:
            raise ValueError(f"--report-to {name}: the package is not installed (pip install {name.replace('_', '-')})")
    return list(dict.fromkeys(names))


def start_trackers(
    accelerator: Accelerator,
    names: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    step: int,
    project: str | None = None,
) -> Log:
    """Start the trackers of a run and return a function that reports values to them as `split/name`.

    `folder` is for trackers that write files. `step` is the step from which a run resumes: TensorBoard hides
    later values. Only the first process reports values.
    """
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(chosen_trackers(names), folder)
    project = project or os.environ.get("WANDB_PROJECT", _PROJECT)  # wandb itself prefers the argument to its variable
    with failures(f"--report-to {' '.join(names) or _DEFAULT}"):  # without a login, for example
        accelerator.init_trackers(project, init_kwargs={"tensorboard": {"purge_step": step + 1}} if step else {})
        for tracker in accelerator.trackers:
            if not isinstance(tracker, TensorBoardTracker):  # which would write them as a separate run
                tracker.store_init_configuration(dict(settings))

    def log(step: int, split: str, values: Mapping[str, float]) -> None:
        named = {f"{split}/{name}": value for name, value in values.items()}
        for tracker in list(accelerator.trackers):
            with _dropped_on_failure(accelerator, tracker):
                tracker.log(named, step=step)

    return log


def report_pictures(accelerator: Accelerator, step: int, paths: Sequence[Path]) -> None:
    """Report PNG files, by their names, to the trackers that accept pictures."""
    for tracker in list(accelerator.trackers):
        with _dropped_on_failure(accelerator, tracker):
            for path in paths:
                with Image.open(path) as opened:
                    picture = opened.convert("RGB")
                if isinstance(tracker, TensorBoardTracker):
                    tracker.log_images({path.stem: np.asarray(picture)[None]}, step, dataformats="NHWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({path.stem: [picture]}, step)


def end_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they have not yet written."""
    for tracker in list(accelerator.trackers):
        with _dropped_on_failure(accelerator, tracker):
            tracker.finish()
    accelerator.trackers = []


@contextlib.contextmanager
def _dropped_on_failure(accelerator: Accelerator, tracker: GeneralTracker) -> Iterator[None]:
    """Go on without a tracker that fails, because the run folder has everything; a full disk fails there, too."""
    try:
        yield
    except Exception as error:  # of its library, its disk or its network
        accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]
        accelerator.print(f"note: {tracker.name} failed and gets nothing more from this run: {reason_of(error)}")
