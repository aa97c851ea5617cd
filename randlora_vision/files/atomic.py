"""Atomic writes: under a temporary name, then renamed, so that a reader never sees a part of a file or folder.

The temporary names are unique, so that threads and processes may write to one path: the last to finish wins. What is
written has the permissions that `open` gives: those of the file that is replaced, or else the usual ones (0o666 without
the umask), even if the library that wrote it chose others.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_HIDDEN = ".{}."  # what the name of an unfinished file or folder begins with


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block succeeds, the file is renamed to `path`.

    The suffix is kept because writers such as matplotlib choose the format by it. Missing folders are created.

    Raises:
        OSError: If the file cannot be written; the message names `path`.
    """
    temporary = _beside(path, path.suffix)
    with write_errors(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _new_file(temporary)
        try:
            yield temporary
            with contextlib.suppress(FileNotFoundError):
                mode = stat.S_IMODE(path.stat().st_mode)
            _finish(temporary, mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path`; when the block succeeds, it is renamed to `path`.

    Args:
        path: Must not exist at the end, or be an empty folder, unless `overwrite`.
        overwrite: Replace an existing folder.

    Raises:
        OSError: If the folder cannot be written; the message names `path`.
    """
    temporary, old = _beside(path), _beside(path)
    with write_errors(path, temporary):
        temporary.mkdir(parents=True)
        mode = _new_file(temporary / old.name)
        (temporary / old.name).unlink()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _finish(file, mode)
            while True:
                if overwrite:
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(path, old)
                try:
                    os.replace(temporary, path)
                    break
                except OSError as error:
                    # Another writer has put its own there since; it may already be gone again, for a third one.
                    occupied = error.errno in (errno.ENOTEMPTY, errno.EEXIST) or path.exists()
                    if not (overwrite and occupied):
                        raise
                finally:
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it; no other may write it now."""
    name = re.compile(rf"{re.escape(_HIDDEN.format(path.stem[:20]))}[0-9a-f]{{16}}({re.escape(path.suffix)})?")
    for left in path.parent.glob(".*"):
        if name.fullmatch(left.name) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif name.fullmatch(left.name):
            left.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; it is renamed first, so that no part of it stays behind under its name."""
    hidden = _beside(path)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def write_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn failures to write, such as a full disk, into an OSError whose message names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        inside = isinstance(error, OSError) and error.filename in (None, str(temporary), str(path))
        reason = inside and getattr(error, "strerror", None) or str(error).replace(str(temporary), str(path))
        number = getattr(error, "errno", None)
        message = f"cannot write {path}: {reason}"
        raise (OSError(message) if number is None else OSError(number, message)) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def fingerprint(value: Any, length: int = 12) -> str:
    """Return a short hash of a JSON-serialisable value; equal values give equal hashes everywhere."""
    canonical = json.dumps(value, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def _beside(path: Path, suffix: str = "") -> Path:
    """A hidden name in the same folder that nothing else uses."""
    return path.with_name(f"{_HIDDEN.format(path.stem[:20])}{secrets.token_hex(8)}{suffix}")


def _new_file(path: Path) -> int:
    """Create an empty file and return its permissions, which are those that the umask leaves."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _finish(path: Path, mode: int) -> None:
    """Give a file its permissions, and wait until it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(mode)
