from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from randlora_vision.training.harness import fit
from randlora_vision.training.harness.lock import NAME, lock_folder, unlock_folder
from randlora_vision.training.harness.options import CheckpointOptions, RunOptions
from randlora_vision.training.harness.run_folder import open_run_folder

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 123 on elsewhere"); file.flush()
print("locked", flush=True)
sys.stdin.read()
"""
TRY = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has locked the folder."""
    command = [sys.executable, "-S", "-c", HOLD, str(tmp_path / NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
@pytest.mark.parametrize("resuming", [False, True])
def test_a_second_run_is_refused_and_changes_nothing(
    options: Any, resuming: bool, tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="is in use by process 123 on elsewhere: wait until .* --output-dir"):
        open_run_folder(RunOptions(output_dir=str(tmp_path), **options), "test", resuming=resuming)
    assert {path.name for path in tmp_path.iterdir()} == {NAME, "metrics.jsonl"}


def test_the_checkpoints_of_a_run_that_has_not_ended_are_not_read(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "find_checkpoint", lambda *_: pytest.fail("it looks for a checkpoint"))
    options = SimpleNamespace(checkpoints=CheckpointOptions(resume="latest"), run=RunOptions(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="is in use by process 123"):
        fit.open_run(options, "test", SimpleNamespace(print=print, is_main_process=True))  # type: ignore[arg-type]


def test_the_lock_dies_with_its_process(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    lock_folder(tmp_path)  # over the file that it left behind
    assert (tmp_path / NAME).read_text().startswith("process ")
    unlock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lock_keeps_others_out_until_it_is_released(tmp_path: Path) -> None:
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # the process itself may come again
    attempt = [sys.executable, "-S", "-c", TRY, str(tmp_path / NAME)]
    assert subprocess.run(attempt, capture_output=True).returncode == 1
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert subprocess.run(attempt, capture_output=True).returncode == 0


def test_a_full_disk_does_not_hinder_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("randlora_vision.training.harness.lock.os.write", full)
        lock_folder(tmp_path)
    attempt = [sys.executable, "-S", "-c", TRY, str(tmp_path / NAME)]
    assert subprocess.run(attempt, capture_output=True).returncode == 1
    unlock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available.*make sure that no other run"):
        lock_folder(tmp_path)
    assert not list(tmp_path.iterdir())
