"""Settings of the whole suite."""

import gc


def pytest_collection_finish() -> None:
    """Keep what the imports made out of garbage collection: every run of a script collects, over a million objects."""
    gc.collect()
    gc.freeze()
