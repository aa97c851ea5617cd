"""The folder of one run: refused when it holds another, filled file by file, each written whole."""

import json
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from randlora_vision.files.atomic import replacing, write_json, write_text
from randlora_vision.training.harness.checkpoints import FOLDER, list_checkpoints
from randlora_vision.training.harness.options import RunOptions
from randlora_vision.versions import versions


class RunFolder:
    """Paths and writers of one run's files.

    A process that must not write (any but the first of a distributed run) passes `writing=False`:
    it gets the same paths, and its calls do nothing.
    """

    def __init__(self, path: Path, writing: bool = True) -> None:
        self.path = path
        self.writing = writing
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.predictions = path / "predictions.png"
        self.confusion = path / "confusion.png"
        self.scales = path / "scales.png"
        self.adapter = path / "adapter.safetensors"
        self.best = path / "adapter_best.safetensors"
        self.samples = path / "samples.png"
        self.split = path / "split.json"
        self.skipped = path / "skipped.txt"
        self.summary = path / "summary.json"
        self.listeners: list[Callable[[int, str, Mapping[str, float]], None]] = []  # of what is logged

    @property
    def logs(self) -> Path:
        """The folder of trackers that write files."""
        return self.path / "logs"

    @property
    def sample_folder(self) -> Path:
        """The folder of pictures made during training."""
        return self.path / "samples"

    @property
    def class_images(self) -> Path:
        """The folder of images that the base pipeline made of the subject's class."""
        return self.path / "class_images"

    def files(self) -> list[Path]:
        """Return every path that a run may write."""
        return [value for value in vars(self).values() if isinstance(value, Path) and value != self.path]

    def pictures(self) -> list[Path]:
        """Return the pictures that were written."""
        return [path for path in self.files() if path.suffix == ".png" and path.exists()]

    def write_config(self, options: Any) -> None:
        """Write the resolved options (a dataclass) as YAML."""
        import yaml

        if self.writing:
            write_text(self.config, yaml.safe_dump(plain_settings(options), sort_keys=False))

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl: the step, the split and the values; tell the listeners."""
        if self.writing:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
            for listener in self.listeners:
                listener(step, split, values)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl written so far."""
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def keep_metrics(self, step: int) -> None:
        """Drop what was logged after training had reached `step`, half a line included."""
        if not self.writing:
            return
        kept: list[str] = []
        last = 0
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            # At its end a run goes back to step 0, to the tests of before: those lines come later too.
            if not line.endswith("\n") or not last <= (last := json.loads(line)["step"]) <= step:
                break
            kept.append(line)
        write_text(self.metrics, "".join(kept))

    def keep_best(self) -> None:
        """Copy the adapter as it is now to the file of the best one."""
        if self.writing:
            with replacing(self.best) as temporary:
                shutil.copyfile(self.adapter, temporary)

    def write(self, path: Path, value: Any) -> None:
        """Write a JSON file of the folder."""
        if self.writing:
            write_json(path, value)


def plain_settings(options: Any) -> dict[str, Any]:
    """Return options (a dataclass) as nested dictionaries of what JSON and YAML know: tuples become lists."""
    assert is_dataclass(options) and not isinstance(options, type)
    return json.loads(json.dumps(asdict(options)))


def open_run_folder(options: RunOptions, script: str, writing: bool = True, resuming: bool = False) -> RunFolder:
    """Make the run folder, or raise ValueError when it holds a run and `--overwrite` was not given.

    A run is there once it has metrics: one that stopped at wrong input before that is no obstacle.
    Overwriting removes the files that a run writes and nothing else; resuming leaves them.
    """
    default = Path("runs") / f"{script}-{datetime.now():%Y%m%d-%H%M%S}"
    run = RunFolder(Path(options.output_dir) if options.output_dir else default, writing)
    if not writing or resuming:
        return run
    if run.metrics.exists() and not options.overwrite:
        raise ValueError(
            f"{run.path} already holds a run ({run.metrics.name}): "
            "choose another --output-dir, or give --overwrite to replace it"
        )
    for path in run.files():
        path.unlink(missing_ok=True)
    for events in run.logs.rglob("events.out.tfevents.*"):
        events.unlink()
    for folder in (run.sample_folder, run.class_images):
        for picture in folder.rglob("*.png"):
            picture.unlink()
    for _, checkpoint in list_checkpoints(run.path / FOLDER):
        shutil.rmtree(checkpoint)
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.environment, environment())
    return run


def environment() -> dict[str, Any]:
    """Return the versions that a result depends on, and the command."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
    }
