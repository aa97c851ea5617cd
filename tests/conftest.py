"""Settings of the whole suite."""

import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from _pytest import logging as pytest_logging

from tests.kept_parsers import keep_parsers

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers with several threads each wait for one another. Read when torch is imported, which is later.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

FEW = 20  # modules
imported = 0
"""The number of modules at the last freeze."""


def pytest_collection_finish() -> None:
    """Collect garbage less often, and do not wait for the disk.

    The first saves a tenth of the time that is spent in Python, the second some milliseconds per file that is written.

    pytest adds its handlers to all loggers that do not propagate. With a handler, torch.compile writes its trace there:
    a twelfth of the time of a compilation.
    """
    freeze()
    gc.set_threshold(20_000, 20, 20)
    logging.getLogger("torch.__trace").propagate = True
    os.fsync = lambda descriptor: None  # type: ignore[misc]
    # Older versions attach to the root alone.
    if "attached_loggers" in getattr(pytest_logging.catching_logs, "__slots__", ()):
        pytest_logging.catching_logs.__enter__ = _attach  # type: ignore[method-assign]
    keep_parsers()


def _attach(catching: Any) -> Any:
    """Do what pytest does six times per test, without a walk through all of the thousands of loggers."""
    root = logging.getLogger()
    if catching.level is not None:
        catching.handler.setLevel(catching.level)
        catching.orig_level = root.level
        root.setLevel(min(root.level, catching.level))
    catching.attached_loggers[:] = [root, *_separate_loggers(len(root.manager.loggerDict))]
    for logger in catching.attached_loggers:
        logger.addHandler(catching.handler)
    return catching.handler


@functools.lru_cache(maxsize=1)
def _separate_loggers(known: int) -> list[logging.Logger]:
    """The loggers, of so many, that do not propagate to the root."""
    loggers = logging.getLogger().manager.loggerDict.values()
    return [logger for logger in loggers if isinstance(logger, logging.Logger) and not logger.propagate]


@pytest.fixture(autouse=True)
def frozen_imports() -> Iterator[None]:
    """Keep what imports make out of garbage collection: every run of a script collects, over a million objects."""
    yield
    if len(sys.modules) > imported + FEW:
        freeze()


def freeze() -> None:
    global imported
    gc.collect()
    gc.freeze()
    imported = len(sys.modules)


@pytest.fixture
def ending_signals() -> Iterator[None]:
    """Signals end a program, also where a shell started the suite in the background or nohup did, which ignore some."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
