"""How a mistake of the user's reaches the user: one line on stderr and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

DEBUG_VARIABLE = "RANDLORA_DEBUG"
_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_line(text: str) -> str:
    """Return `text` with every run of white space, line ends included, made one space."""
    return " ".join(text.split())


def user_errors(main: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `main` answer a ValueError or an OSError with one line `error: ...` and exit code 2.

    These two are what the library raises for wrong input, missing files included; any other
    exception is a bug of ours and keeps its traceback. With the environment variable
    RANDLORA_DEBUG set, every exception keeps it.
    """

    @functools.wraps(main)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            print(f"error: {one_line(_own_words(str(error)))}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapper


def _own_words(message: str) -> str:
    """Return the message that a loader process raised, without the traceback that PyTorch adds to it."""
    if "Original Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]
