"""Requests to stop a run after its current step: signals, and a limit on its time."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from randlora_vision.errors import signal_name

TIMED_OUT = 124  # the exit code of timeout(1)
_PATIENCE = 2.0  # seconds; a launcher forwards the Ctrl-C that the terminal has already sent
# Not all of them exist on Windows. Slurm sends SIGUSR1 if asked for a warning, and SIGTERM at the end.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def seconds_of(limit: str) -> int:
    """Return the seconds of a Slurm time, from M to D-H:M:S; raise ValueError for anything else, and for zero."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", limit.strip(), re.ASCII)
    if match is None:
        raise ValueError(f"--time-limit must be minutes, H:M:S or D-H:M:S, got {limit!r}")
    days, parts = match[1], [int(part) for part in match[2].split(":")]
    if days is None and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"--time-limit must be above 0, got {limit!r}")
    return total


class StopRequests:
    """Records requests to stop while it is used as a context; `poll` returns them.

    Signals that the process ignored before, such as SIGHUP under nohup, stay ignored. Processes that are forked in the
    context, such as the workers of a loader, are not ended by these signals, which a terminal or Slurm also sends to
    them: the step that needs their data would fail.

    Args:
        limit: Seconds after `started` by which the run must have stopped; None: no limit.
        started: The time on `time.monotonic`.
    """

    def __init__(self, limit: float | None = None, started: float = 0.0) -> None:
        self.limit = limit
        self.started = started
        self._code = 0
        self._at = 0.0
        self._longest = 0.0
        self._polled = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self._polled = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            usual = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {number: old for number, old in usual.items() if old not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._record)
        _listening.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _listening.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._code and now - self._at > _PATIENCE:
            raise KeyboardInterrupt  # a second Ctrl-C: do not wait for the step
        if not self._code:
            self._code, self._at = 128 + number, now

    def poll(self) -> int:
        """Return the exit code of a run that must stop now, or 0; to be called after every step.

        Time is up when the limit does not leave room for another step as long as the longest so far, evaluation
        included, and for writing a checkpoint.
        """
        now = time.monotonic()
        self._longest, self._polled = max(self._longest, now - self._polled), now
        if self.limit is not None and not self._code:
            reserve = self._longest + max(self._longest, min(30.0, self.limit / 20))
            if now - self.started + reserve >= self.limit:
                return TIMED_OUT
        return self._code


def reason(code: int) -> str:
    """Return what an exit code of `poll` stands for."""
    if code == TIMED_OUT:
        return "--time-limit"
    return signal_name(code - 128)


def stop_message(code: int, step: int, steps: int, checkpoints: Path | None, saved: str) -> str:
    """Return the line on a run that was asked to stop: which checkpoint continues it, or else what was `saved`."""
    where = f"its checkpoint is in {checkpoints}, --resume latest goes on from it" if checkpoints else saved
    return f"stopped by {reason(code)} after step {step} of {steps}: {where}"


def failure_message(what: str, step: int, saved: str) -> str:
    """Return the line on a run that cannot go on: what is not finite, what helps, and what was `saved`."""
    advice = "a lower --lr usually helps"
    if step == 0:
        advice = "nothing has been trained yet, so it is due to the data, the precision or the loss, and not to --lr"
    return f"training stopped after step {step}: {what}; {advice} ({saved})"


_listening: list[StopRequests] = []


def _block_in_child() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_block_in_child)
