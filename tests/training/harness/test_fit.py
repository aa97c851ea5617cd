"""How a run ends, and where it cannot begin."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from randlora_vision.errors import Stopped
from randlora_vision.training.harness import fit
from randlora_vision.training.harness.options import RunOptions
from randlora_vision.training.harness.run_folder import open_run_folder


@pytest.mark.parametrize("how", ["finished", "stopped"])
def test_deepspeeds_engine_is_let_go_while_the_processes_are_together(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the engine: the real one waits for the other processes when it is destroyed."""
    calls: list[str] = []
    accelerator: Any = Accelerator(cpu=True)
    accelerator.deepspeed_engine_wrapped = SimpleNamespace(
        engine=SimpleNamespace(destroy=lambda: calls.append("engine"))
    )
    accelerator.trackers = [SimpleNamespace(name="a", finish=lambda: calls.append("tracker"))]
    monkeypatch.setattr(AcceleratorState, "destroy_process_group", lambda *_: calls.append("processes"))
    run = open_run_folder(RunOptions(output_dir=str(tmp_path / "run")), "test")
    if how == "finished":
        fit.finish(run, accelerator, 1)
    else:
        with pytest.raises(Stopped), fit._unlocked_on_failure(run, accelerator):
            raise Stopped("", 143)
    assert calls == ["tracker", "engine", "processes"]
    assert not (run.path / ".lock").exists()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_place_of_the_run_folder_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"{place} cannot be made: .*/file is a file; choose another --output-dir"):
        open_run_folder(RunOptions(output_dir=str(tmp_path / place)), "test")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("there", [False, True])
def test_a_file_system_that_cannot_be_written_is_one_line(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    run = tmp_path / "run"
    if there:
        run.mkdir()
    monkeypatch.setattr(Path, "open" if there else "mkdir", read_only)
    with pytest.raises(OSError, match=f"cannot write {run}{'/.lock' if there else ''}: Read-only file system$"):
        open_run_folder(RunOptions(output_dir=str(run)), "test")
