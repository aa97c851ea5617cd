"""The folder in which the package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

_VARIABLE = "RANDLORA_CACHE"


def cache_root(cache_dir: str | None = None) -> Path:
    """Return the cache folder: the argument, else $RANDLORA_CACHE, else randlora_vision in the user's cache."""
    chosen = cache_dir or os.environ.get(_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "randlora_vision"
