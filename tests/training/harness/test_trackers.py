from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from randlora_vision.training.harness import trackers
from randlora_vision.training.harness.options import RunOptions
from randlora_vision.training.harness.run_folder import open_run_folder
from randlora_vision.training.harness.trackers import chosen_trackers, end_trackers, report_pictures, start_trackers


def events(folder: Path) -> EventAccumulator:
    (place,) = folder.iterdir()
    read = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    return read


def test_values_and_pictures_reach_tensorboard(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    run = open_run_folder(RunOptions(output_dir=str(tmp_path / "run")), "test")
    run.listeners.append(start_trackers(accelerator, (), run.logs, {"lr": 0.1}, step=0))
    run.log(1, "train", {"loss": 2.5, "lr": 0.1})
    run.log(2, "val", {"top1": 0.25})
    picture = np.zeros((8, 6, 3), np.uint8)
    picture[:, :2] = (200, 10, 30)
    Image.fromarray(picture).save(run.curves)
    report_pictures(accelerator, 2, run.pictures())
    end_trackers(accelerator)

    read = events(run.logs)
    assert sorted(read.Tags()["scalars"]) == ["train/loss", "train/lr", "val/top1"]
    assert [(value.step, value.value) for value in read.Scalars("train/loss")] == [(1, 2.5)]
    (image,) = read.Images("curves/image") if "curves/image" in read.Tags()["images"] else read.Images("curves")
    assert (image.step, image.width, image.height) == (2, 6, 8)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]

    kept = run.logs / "mine.txt"
    kept.touch()
    open_run_folder(RunOptions(output_dir=str(run.path), overwrite=True), "test")
    assert [path.name for path in run.logs.rglob("*") if path.is_file()] == ["mine.txt"]


def test_a_resumed_run_hides_what_was_reported_after_its_checkpoint(tmp_path: Path) -> None:
    for resumed, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        accelerator = Accelerator(cpu=True)
        log = start_trackers(accelerator, ("tensorboard",), tmp_path / "logs", {}, step=resumed)
        for step in steps:
            log(step, "train", {"loss": step + 100.0 * resumed})
        accelerator.end_training()
    values = [(value.step, value.value) for value in events(tmp_path / "logs").Scalars("train/loss")]
    assert values == [(1, 1.0), (2, 2.0), (3, 203.0), (4, 204.0), (5, 205.0)]


def test_none_is_none(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, ("none",), tmp_path / "logs", {}, step=0)(1, "train", {"loss": 1.0})
    assert accelerator.trackers == [] and not (tmp_path / "logs").exists()


def test_the_default_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_trackers(()) == ["tensorboard"]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["wandb"])
    assert chosen_trackers(()) == [] and chosen_trackers(["wandb", "wandb"]) == ["wandb"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("tensorbord",), "--report-to tensorbord is not known; close matches: tensorboard"),
        (("comet_ml",), "--report-to comet_ml: the package is not installed .pip install comet-ml."),
        (("none", "wandb"), "none cannot be combined with other trackers"),
    ],
)
def test_mistakes_are_found_when_the_options_are_built(
    names: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=expected):
        RunOptions(report_to=names)


def test_the_project_of_wandb_is_that_of_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projects: list[str] = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, project, **_: projects.append(project))
    for _ in range(2):
        start_trackers(Accelerator(cpu=True), ("none",), tmp_path, {}, step=0)
        monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert projects == ["randlora_vision", "mine"]


class Failing(GeneralTracker):
    """A tracker whose disk is full, or whose server is away, from some step on."""

    name = "failing"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at
        self.steps: list[int] = []

    @property
    def tracker(self) -> None: ...

    def store_init_configuration(self, values: Any) -> None:
        self.fail("init")

    def log(self, values: Any, step: int, **_: Any) -> None:  # type: ignore[override]
        if step == 2:
            self.fail("log")
        self.steps.append(step)

    def log_images(self, values: Any, step: int, **_: Any) -> None:
        self.fail("log_images")

    def finish(self) -> None:
        self.fail("finish")

    def fail(self, at: str) -> None:
        if at == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", ["log", "log_images", "finish"])
def test_a_run_goes_on_without_a_tracker_that_fails(
    at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator = Accelerator(cpu=True)
    log = start_trackers(accelerator, ("tensorboard",), tmp_path / "logs", {}, step=0)
    failing = Failing(at)
    accelerator.trackers.insert(0, failing)
    for step in (1, 2, 3):
        log(step, "train", {"loss": 1.0 * step})
    Image.new("RGB", (3, 2)).save(tmp_path / "curves.png")
    report_pictures(accelerator, 3, [tmp_path / "curves.png"])
    end_trackers(accelerator)
    assert accelerator.trackers == [] and failing.steps == ([1] if at == "log" else [1, 2, 3])
    assert [value.step for value in events(tmp_path / "logs").Scalars("train/loss")] == [1, 2, 3]
    assert capsys.readouterr().out == (
        "note: failing failed and gets nothing more from this run: [Errno 28] No space left on device\n"
    )


def test_a_tracker_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(Accelerator, "init_trackers", init)
    with pytest.raises(ValueError, match=r"^--report-to tensorboard: api_key not configured \(no-tty\)$"):
        start_trackers(Accelerator(cpu=True), ("tensorboard",), tmp_path, {}, step=0)


def test_pictures_reach_a_tracker_through_its_interface(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.seen: list[tuple[dict[str, Any], int]] = []

        def log_images(self, values: dict[str, Any], step: int) -> None:
            self.seen.append((values, step))

    Image.new("RGB", (3, 2)).save(tmp_path / "curves.png")
    tracker = Tracker()
    accelerator: Any = SimpleNamespace(trackers=[tracker, object()])
    report_pictures(accelerator, 7, [tmp_path / "curves.png"])
    ((values, step),) = tracker.seen
    assert step == 7 and values["curves"][0].size == (3, 2)
