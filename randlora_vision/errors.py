"""How user errors and requests to stop are reported, in one printable line, and what other libraries say instead."""

import contextlib
import functools
import io
import json
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ParamSpec, TextIO, TypeVar

from randlora_vision.names import printable

DEBUG_VARIABLE = "RANDLORA_DEBUG"
_SIGPIPE = 13  # Windows has no such signal
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Stopped(Exception):
    """A program that was asked to stop has done so; it ends with this message, if any, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(KeyboardInterrupt):
    """A signal has asked the program to end; like Ctrl-C, it passes through code that handles errors."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def one_line(text: str) -> str:
    """Return `text` with every run of white space, including line breaks, replaced by one space."""
    return " ".join(text.split())


def reason_of(error: BaseException) -> str:
    """Return what an exception of another library says, in one line of 300 characters, or its type for nothing."""
    text = one_line(str(error)) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:296]} ..."


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Turn any exception, whatever other libraries raise, into a ValueError of `what` and the reason."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {reason_of(error)}") from error


@contextlib.contextmanager
def without_logs(level: int = logging.WARNING) -> Iterator[None]:
    """Leave out what is logged up to `level`, such as notes of other libraries while they are imported."""
    before = logging.root.manager.disable
    logging.disable(max(before, level))
    try:
        yield
    finally:
        logging.disable(before)


def printable_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make every ValueError of a function printable (`names.printable`): its message may quote a file."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            message = str(error)
            if printable(message) == message:
                raise
            raise ValueError(printable(message)) from None

    return wrapper


def user_errors(main: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `main` report a ValueError or an OSError as one line `error: ...` and exit with code 2.

    The library raises these two for wrong input, including missing files; any other exception is a
    bug in the library and keeps its traceback. If the environment variable RANDLORA_DEBUG is set,
    these exceptions keep their tracebacks too. `Stopped` ends with its message and code; Ctrl-C, SIGTERM, SIGHUP and
    SIGUSR1 with one line and the usual code, after what was opened has been closed; so does output that nothing reads
    any more, as under `| head`. What the encoding of the terminal lacks, such as the bytes of a file name, is printed
    escaped.
    """

    @functools.wraps(main)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr
        try:
            with _interruptible():
                result = main(*args, **kwargs)
            sys.stdout.flush()  # here, because Python reports an error of its own flush in words of its own
            return result
        except Stopped as stopped:
            if str(stopped):
                print(stopped, file=sys.stderr)
            raise SystemExit(stopped.code) from None
        except KeyboardInterrupt as interrupt:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
            if os.environ.get("RANK", "0") == "0":  # once for all processes
                print(f"stopped by {signal_name(number)}", file=sys.stderr)
            raise SystemExit(128 + number) from None
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _unread_streams():
                raise SystemExit(128 + _SIGPIPE) from None
            if os.environ.get(DEBUG_VARIABLE):
                raise
            words = one_line(_own_words(str(error)))
            line = f"error: {printable(re.sub(r'^.Errno [0-9]+. ', '', words))}"
            print(line, file=sys.stderr)
            _tell_torchrun(line)
            raise SystemExit(2) from None

    return wrapper


def _unread_streams() -> bool:
    """Return whether nothing reads the output any more, and say so; what is printed after that goes nowhere."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if unread:
        print("stopped by SIGPIPE: nothing reads the output any more", file=sys.stderr)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        try:
            stream.flush()
        except BrokenPipeError:
            return True
        if hasattr(select, "poll"):  # an unbuffered stream has forgotten what it could not write
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def signal_name(number: int) -> str:
    """Return the name of a signal for messages."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the signals by which a program is ended into `Interrupted`, unless they are ignored or handled already.

    They keep their usual effect, which is at once, in one of several processes: it may be waiting for one that has
    failed, in a call that Python cannot interrupt.
    """
    owner, changed = os.getpid(), []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Interrupted(number)
        signal.signal(number, signal.SIG_DFL)  # a fork, such as a worker
        os.kill(os.getpid(), number)

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and threading.current_thread() is threading.main_thread():  # the only one that may set handlers
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
        changed = [number for number in known if signal.getsignal(number) == signal.SIG_DFL]
    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _tell_torchrun(line: str) -> None:
    """Write the line where torchrun reads the cause of a failure for its summary, which otherwise has only a link."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)


def _own_words(message: str) -> str:
    """Return the message of an exception from a data loader worker, without the traceback that PyTorch adds."""
    if "Original Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]
