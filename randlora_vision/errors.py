"""How user errors and requests to stop are reported: one line on stderr and an exit code."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

DEBUG_VARIABLE = "RANDLORA_DEBUG"
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Stopped(Exception):
    """A program that was asked to stop has done so; it ends with this message, if any, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def one_line(text: str) -> str:
    """Return `text` with every run of white space, including line breaks, replaced by one space."""
    return " ".join(text.split())


def user_errors(main: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `main` report a ValueError or an OSError as one line `error: ...` and exit with code 2.

    The library raises these two for wrong input, including missing files; any other exception is a
    bug in the library and keeps its traceback. If the environment variable RANDLORA_DEBUG is set,
    these exceptions keep their tracebacks too. `Stopped` ends with its message and code, Ctrl-C with one
    line and code 130.
    """

    @functools.wraps(main)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return main(*args, **kwargs)
        except Stopped as stopped:
            if str(stopped):
                print(stopped, file=sys.stderr)
            raise SystemExit(stopped.code) from None
        except KeyboardInterrupt:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            print("stopped by Ctrl-C", file=sys.stderr)
            raise SystemExit(130) from None
        except (ValueError, OSError) as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            print(f"error: {one_line(_own_words(str(error)))}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapper


def _own_words(message: str) -> str:
    """Return the message of an exception from a data loader worker, without the traceback that PyTorch adds."""
    if "Original Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]
