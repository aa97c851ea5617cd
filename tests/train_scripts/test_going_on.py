"""Runs that are stopped, killed, requeued, extended or started from an adapter, with train_classifier.py."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from randlora_vision.files import atomic
from randlora_vision.training.classifier.loss import ClassifierLoss
from randlora_vision.training.harness import fit
from randlora_vision.training.harness.run_folder import RunFolder
from randlora_vision.training.harness.stopping import StopRequests
from tests.training_helpers import Killed, draw_nothing, run_script, write_class_folders, write_tiny_vit

pytestmark = pytest.mark.usefixtures("ending_signals")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    write_tiny_vit(work / "vit", classes=3)
    write_class_folders(work / "images")
    return work


@pytest.fixture
def train(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return train_classifier.main with defaults; it returns the run folder."""
    draw_nothing(monkeypatch)

    def main(*argv: str) -> Path:
        defaults = {
            "--data": str(work / "images"),
            "--output-dir": str(tmp_path / "run"),
            "--report-to": "none",
            "--rank": "4",
        }
        run_script("train_classifier", ("--model", f"local-dir:{work / 'vit'}", "--pretrained", *argv), defaults)
        return Path(argv[argv.index("--output-dir") + 1]) if "--output-dir" in argv else tmp_path / "run"

    return main


def at_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Call `act` in the forward pass of this number, counted from 1."""
    calls, forward = iter(range(1, 1000)), ClassifierLoss.forward

    def watched(self: ClassifierLoss, batch: Any) -> Any:
        if next(calls) == number:
            act()
        return forward(self, batch)

    monkeypatch.setattr(ClassifierLoss, "forward", watched)


def kill() -> None:
    raise Killed


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def check_same(one: Path, other: Path) -> None:
    assert (one / "adapter.safetensors").read_bytes() == (other / "adapter.safetensors").read_bytes()
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_in_one_line_and_the_same_command_goes_on(
    name: str,
    code: int,
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--steps", "5", "--head-lr", "0.01", "--resume", "latest"]
    straight = train(*command, "--output-dir", str(tmp_path / "straight"))
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_call(patch, 3, lambda: os.kill(os.getpid(), getattr(signal, name)))
        train(*command)
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert "holds no checkpoint, so the run starts anew" in printed.out
    *_, last = printed.err.strip().splitlines()
    assert last.startswith(f"stopped by {'Ctrl-C' if code == 130 else name} after step 3 of 5: its checkpoint is in ")
    assert "Traceback" not in printed.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "run" / ".lock").exists()
    check_same(train(*command), straight)


def test_the_time_limit_ends_with_a_checkpoint(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[Any] = []

    class Noted(StopRequests):
        def __init__(self, limit: float | None, started: float) -> None:
            limits.append(limit)
            super().__init__(limit, started - 10_000)

    monkeypatch.setattr(fit, "StopRequests", Noted)
    with pytest.raises(SystemExit) as stopped:
        train("--time-limit", "2:00:00")
    assert stopped.value.code == 124 and limits == [7200]
    assert "stopped by --time-limit after step 1 of 3: " in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_a_signal_while_data_is_read_is_one_line(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("randlora_vision.training.data.read.read_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_run_goes_on_after_its_images_and_its_folder_were_moved(
    train: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint-every", "2", "--steps", "3"]
    straight = train(*command, "--output-dir", str(tmp_path / "first"))
    (moved := tmp_path / "moved").mkdir()
    shutil.copytree(work / "images", moved / "images elsewhere")
    shutil.copytree(straight, moved / "run")
    where = ["--data", str(moved / "images elsewhere"), "--output-dir", str(moved / "run")]
    check_same(train(*command, *where, "--resume", "latest"), straight)
    assert ": the same images in another place" in capsys.readouterr().out
    next(iter(sorted((moved / "images elsewhere").rglob("*.png")))).unlink()
    with pytest.raises(SystemExit):
        train(*command, *where, "--resume", "latest")
    assert "--data was " in capsys.readouterr().err


def test_a_run_folder_that_vanishes_is_one_line(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_call(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(SystemExit) as stopped:
        train("--log-every", "1")
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "cannot write" in last and "metrics.jsonl: No such file" in last


def test_a_requeued_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--resume", "latest", "--checkpoint-every", "3"]
    straight = train(*command, "--output-dir", str(tmp_path / "straight"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_call(patch, 2, kill)
        train(*command)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    check_same(train(*command), straight)
    assert "so the run starts anew" in capsys.readouterr().out


def test_a_finished_run_without_a_checkpoint_is_not_replaced(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train("--resume", "latest")
    assert stopped.value.code == 2 and "already holds a finished run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--steps", "5", "--checkpoint-every", "2", "--resume", "latest"]
    straight = train(*command, "--output-dir", str(tmp_path / "straight"))
    folder = train(*command)
    (folder / "checkpoints" / "step-000004" / "tensors.safetensors").unlink()
    check_same(train(*command), straight)
    printed = capsys.readouterr().out
    assert "step-000004 is damaged" in printed and "resumed from" in printed and "step-000002" in printed


@pytest.mark.parametrize("change", [["--steps", "6"], ["--batch-size", "4", "--gradient-accumulation-steps", "2"]])
def test_what_may_change_on_resuming(change: list[str], train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A constant rate and no random draws: the longer run, and the same steps in smaller parts."""
    fixed = ["--checkpoint-every", "2", "--schedule", "constant", "--warmup-fraction", "0", "--optimizer", "sgd"]
    folder = train(*fixed, "--steps", "4")
    first = load_file(folder / "adapter.safetensors")
    resume = ["--resume", str(folder / "checkpoints" / "step-000002")]
    train(*fixed, *(["--steps", "4"] if "--steps" not in change else []), *change, *resume)
    assert f"{change[0]} was " in capsys.readouterr().out
    after = load_file(folder / "adapter.safetensors")
    if "--steps" in change:
        assert max(line["step"] for line in numbers(folder)) == 6
        longer = load_file(train(*fixed, *change, "--overwrite") / "adapter.safetensors")
        assert all(torch.equal(longer[name], tensor) for name, tensor in after.items())
    else:
        for name, tensor in first.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6)


def test_what_may_not_change_is_refused_with_a_list_of_what_may(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train("--checkpoint-every", "2")
    with pytest.raises(SystemExit):
        train("--checkpoint-every", "2", "--resume", "latest", "--weight-decay", "0.5", "--batch-size", "4")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size was 8, is now 4; --weight-decay was 0.01, is now 0.5" in error
    allowed = error.partition("these may change: ")[2]
    assert all(flag in allowed for flag in ("--steps", "--workers", "--log-every", "--report-to", "--time-limit"))


@pytest.mark.parametrize("method", ["randlora", "lora", "vera", "full", "linear-probe"])
def test_a_run_starts_from_an_adapter(
    method: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of almost zero, the file stays as it was; resuming does not need it."""
    first = train("--method", method, "--lr", "0.01", "--output-dir", str(tmp_path / "first")) / "adapter.safetensors"
    start = ["--method", method, "--lr", "1e-30", "--weight-decay", "0", "--init-adapter", str(first)]
    start += ["--checkpoint-every", "2"]
    folder = train(*start)
    one, other = load_file(first), load_file(folder / "adapter.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-20)
    first.unlink()
    if method == "randlora":
        train(*start, "--resume", "latest")
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        train(*start, "--overwrite")
    assert refused.value.code == 2 and "error: --init-adapter: there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--rank", "8"], "does not fit the adapter"),
        (["--alpha", "3"], "does not fit the adapter"),
        (["--seed", "1"], "its bases are"),
        (["--target-modules", "qkv", "proj"], "does not fit the adapter"),
        (["--method", "full"], "does not hold what is trained here"),
        (["--method", "lora"], "does not hold this PEFT adapter"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    change: list[str], expected: str, train: Any, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = work / "first" / "adapter.safetensors"  # of the first of these tests
    if not first.exists():
        train("--steps", "1", "--output-dir", str(first.parent))
    with pytest.raises(SystemExit) as refused:
        train(*change, "--init-adapter", str(first))
    error = capsys.readouterr().err.splitlines()[-1]
    assert refused.value.code == 2 and error.startswith("error: --init-adapter: ") and expected in error


@pytest.mark.parametrize(
    ("name", "limit", "every"),
    [
        ("step-000004", 100, {"checkpoint": "2"}),
        ("adapter.safetensors", 2000, {"eval": "2"}),
        ("metrics.jsonl", 10, {"log": "1"}),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_earlier_files(
    name: str,
    limit: int,
    every: dict[str, str],
    train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From step 3 on, files cannot grow beyond `limit` bytes, which is an error of the system as a full disk is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = [word for what in ("checkpoint", "eval", "log") for word in (f"--{what}-every", every.get(what, "100"))]
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            at_call(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1])))
            train("--steps", "6", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    *_, last = error.strip().splitlines()
    assert last.startswith("error: ") and "cannot write" in last and name in last and "File too large" in last
    assert "Traceback" not in error
    load_file(tmp_path / "run" / "adapter.safetensors")
    if "checkpoint" in every:
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("name", ["preprocessing.json", "summary.json", "README.md"])
def test_a_disk_that_is_full_from_one_file_on_is_one_line(
    name: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new_file, written = tmp_path / "run", atomic._new_file, []

    def new(path: Path) -> int:
        written.append(path.name)
        if any(other.startswith(f".{Path(name).stem}.") for other in written):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return new_file(path)

    monkeypatch.setattr(atomic, "_new_file", new)
    with pytest.raises(SystemExit) as stopped:
        train("--steps", "2", "--checkpoint-every", "1")
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last == f"error: cannot write {run / name}: No space left on device"
    assert not (run / name).exists() and {path.name for path in run.glob(".*")} <= {".lock"}
    if name != "preprocessing.json":
        monkeypatch.undo()
        checkpoints = [path.name for path in (run / "checkpoints").iterdir()]
        assert sorted(checkpoints) == ["step-000001", "step-000002"] and load_file(run / "adapter.safetensors")


def test_the_rate_of_the_head_is_logged(train: Any) -> None:
    folder = train("--head-lr", "0.5", "--lr", "0.01", "--warmup-fraction", "0")
    line = next(line for line in numbers(folder) if line["split"] == "train")
    assert line["lr_head"] == pytest.approx(0.5) and line["lr"] == pytest.approx(0.01)


def test_the_folder_is_locked_during_a_run(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    log = RunFolder.log

    def noted(self: RunFolder, *arguments: Any) -> None:
        seen.append((self.path / ".lock").read_text().startswith(f"process {os.getpid()} on "))
        log(self, *arguments)

    monkeypatch.setattr(RunFolder, "log", noted)
    folder = train()
    assert seen and all(seen) and not (folder / ".lock").exists()
