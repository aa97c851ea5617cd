"""Processes that are killed at one of their file operations, as by `kill -9` or a power cut."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def killed_at(number: int, act: Callable[[], Any]) -> bool:
    """Run `act` in a fork that is killed before its file operation of this number; return whether it has fewer."""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def watch(event: str, _: Any) -> None:
            if event in _OPERATIONS and next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)
