"""Settings of the whole suite."""

import gc
import logging
import sys
from collections.abc import Iterator

import pytest

FEW = 20  # modules
imported = 0
"""The number of modules at the last freeze."""


def pytest_collection_finish() -> None:
    """Collect garbage less often: it saves a tenth of the time that is spent in Python.

    pytest adds its handlers to all loggers that do not propagate. With a handler, torch.compile writes its trace there:
    a twelfth of the time of a compilation.
    """
    freeze()
    gc.set_threshold(20_000, 20, 20)
    logging.getLogger("torch.__trace").propagate = True


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
