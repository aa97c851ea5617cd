from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader, Dataset

from randlora_vision.errors import Stopped, user_errors
from randlora_vision.training.harness import checkpoints, stopping
from randlora_vision.training.harness.accelerators import make_accelerator
from randlora_vision.training.harness.checkpoints import Checkpoints, list_checkpoints, read_checkpoint
from randlora_vision.training.harness.loop import Trainer
from randlora_vision.training.harness.options import CheckpointOptions, Training
from randlora_vision.training.harness.stopping import TIMED_OUT, StopRequests, reason, seconds_of
from tests.training.harness.test_checkpoints import FitTask, train

pytestmark = pytest.mark.usefixtures("ending_signals")

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138, "SIGHUP": 129}


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("90", 5400),
        ("0:30", 30),
        ("90:15", 5415),
        ("1:30:00", 5400),
        ("001:00:01", 3601),
        ("2-12", 60 * 3600),
        ("1-02:03", 26 * 3600 + 180),
        ("1-02:03:04", 26 * 3600 + 184),
        (" 5 ", 300),
    ],
)
def test_times_are_slurms(limit: str, seconds: int) -> None:
    """The examples of `man sbatch`: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
    assert seconds_of(limit) == seconds
    assert CheckpointOptions(time_limit=limit).time_limit == limit


@pytest.mark.parametrize(
    "limit", ["", "0", "0:00", "-5", "1.5", "1:2:3:4", "1-", "-1:00", "1h", "infinite", "٣", "1-2-3"]
)
def test_other_times_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match="--time-limit must be"):
        CheckpointOptions(time_limit=limit)


@pytest.mark.parametrize("name", CODES)
def test_a_signal_is_noted_and_the_handlers_come_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert stop.poll() == 0
        os.kill(os.getpid(), number)
        assert stop.poll() == CODES[name]
        os.kill(os.getpid(), signal.SIGTERM)  # at the end of Slurm's warning: the first one counts
        assert stop.poll() == CODES[name]
    assert signal.getsignal(number) == before
    assert reason(CODES[name]) == ("Ctrl-C" if name == "SIGINT" else name)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # that of the launcher, at once
        assert stop.poll() == 130
        monkeypatch.setattr(stopping, "_PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_time_is_up_before_the_next_step_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopRequests(limit=600.0, started=900.0) as stop:
        codes = []
        for seconds in (10, 50, 10, 300, 10):  # until 1010, 1060, 1070, 1370, 1380; the limit is 1500
            now[0] += seconds
            codes.append(stop.poll())
    assert codes == [0, 0, 0, TIMED_OUT, TIMED_OUT]


class Slow(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.05)
        return index


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", CODES)
def test_the_workers_of_a_loader_survive_a_signal_to_all_processes(name: str) -> None:
    with StopRequests() as stop:
        items = iter(DataLoader(Slow(), batch_size=1, num_workers=1))
        seen = [next(items)]
        for worker in items._workers:  # type: ignore[attr-defined]
            os.kill(worker.pid, getattr(signal, name))
        seen += items
        assert len(seen) == 8 and stop.poll() == 0


def interrupted(task: FitTask, run: Path, stop: StopRequests, every: int = 0) -> str:
    """Train until the request to stop; return the message."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    settings = Training(lr=0.01, steps=12, batch_size=4, log_every=2, eval_every=4, seed=5)
    checkpoints = Checkpoints(run, CheckpointOptions(checkpoint_every=every), {})
    with stop, pytest.raises(Stopped) as stopped:
        Trainer(task, settings, make_accelerator(settings), lambda *_: None, checkpoints, stop=stop).run()
    assert stopped.value.code == 143
    return str(stopped.value)


@pytest.mark.parametrize(("during", "every"), [("step", 0), ("step", 5), ("evaluation", 0)])
def test_a_stopped_run_goes_on_bit_for_bit(during: str, every: int, tmp_path: Path) -> None:
    lines, parameters = train(FitTask(12))
    task = FitTask(12)
    calls, forward, evaluate = iter(range(100)), task.loss.forward, task.evaluate
    evaluations = iter(range(100))

    def forwarded(batch: Any) -> Any:
        if during == "step" and next(calls) == 4:  # the fifth step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(batch)

    def evaluated() -> dict[str, float]:
        if during == "evaluation" and next(evaluations) == 1:  # after step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate()

    task.loss.forward, task.evaluate = forwarded, evaluated  # type: ignore[method-assign,assignment]
    message = interrupted(task, tmp_path, StopRequests(), every)
    done = 5 if during == "step" else 4
    folder = tmp_path / "checkpoints"
    assert message == (
        f"stopped by SIGTERM after step {done} of 12: its checkpoint is in {folder}, --resume latest goes on from it"
    )
    assert [step for step, _ in list_checkpoints(folder)] == [done]
    again, resumed = train(FitTask(12), resume=read_checkpoint(list_checkpoints(folder)[-1][1]))
    assert again == [line for line in lines if line[0] > done]
    assert all(torch.equal(one, other) for one, other in zip(parameters, resumed, strict=True))


def test_a_second_signal_does_not_harm_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's SIGTERM and SIGHUP while the checkpoint is written that the first one asked for."""
    save, task, stop = checkpoints.save_file, FitTask(12), StopRequests()

    def saved(*given: Any) -> None:
        save(*given)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(checkpoints, "save_file", saved)
    forward = task.loss.forward
    task.loss.forward = lambda batch: (os.kill(os.getpid(), signal.SIGTERM), forward(batch))[1]  # type: ignore[method-assign]
    assert interrupted(task, tmp_path, stop).startswith("stopped by SIGTERM after step 1 of 12: its checkpoint is in ")
    assert read_checkpoint(tmp_path / "checkpoints" / "step-000001").state.step == 1


@pytest.mark.parametrize("during", ["a call", "the end", "an unbuffered call"])
def test_output_that_nothing_reads_ends_a_program_in_one_line(
    during: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under `| head`."""
    reading, writing = os.pipe()
    os.close(reading)

    @user_errors
    def main() -> None:
        print("a line", flush=during == "a call")

    raw = os.fdopen(writing, "wb", 0 if during == "an unbuffered call" else -1)
    through = during == "an unbuffered call"  # as with PYTHONUNBUFFERED
    with io.TextIOWrapper(raw, write_through=through) as stream, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr("sys.stdout", stream)
        main()
    assert ended.value.code == 141
    assert capsys.readouterr().err == "stopped by SIGPIPE: nothing reads the output any more\n"


def test_a_pipe_of_its_own_that_breaks_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    @user_errors
    def main() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and capsys.readouterr().err == "error: Broken pipe\n"


@pytest.mark.parametrize(
    ("error", "code", "line"), [(Stopped("a line", 143), 143, "a line\n"), (Stopped("", 9), 9, "")]
)
def test_a_request_to_stop_ends_with_one_line_and_its_code(
    error: Stopped, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @user_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code and capsys.readouterr().err == line


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_outside_training_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    before, closed = signal.getsignal(number), []

    @user_errors
    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except Exception:
            pytest.fail("an error handler sees a signal")
        finally:
            closed.append(True)

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 128 + number and closed
    assert capsys.readouterr().err == f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}\n"
    assert signal.getsignal(number) == before


def test_signals_that_are_ignored_or_handled_stay_so(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    old = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: seen.append(1))]

    @user_errors
    def main() -> None:
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)

    try:
        main()
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), old, strict=True):
            signal.signal(number, handler)
    assert seen == [1]
