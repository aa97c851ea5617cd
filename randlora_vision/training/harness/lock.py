"""The lock of a run folder, which keeps a second run out.

It is a lock of the operating system on a file, so that it dies with its process. POSIX locks, not flock's: NFS has
them, and the workers of a loader do not inherit them. They do not keep the process itself out.
"""

import atexit
import contextlib
import errno
import os
import platform
import warnings
from pathlib import Path
from typing import IO

from randlora_vision.files.atomic import write_errors

NAME = ".lock"
_held: dict[tuple[int, Path], IO[str]] = {}


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process; raise ValueError if another has it. Warns where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    path = folder.resolve() / NAME
    while (os.getpid(), path) not in _held:
        with write_errors(path):
            file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{folder} is in use by {holder}: wait until that run has ended, or choose another --output-dir"
                ) from None
            path.unlink(missing_ok=True)
            warnings.warn(f"{folder} cannot be locked ({error}): make sure that no other run uses it", stacklevel=2)
            return
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            with contextlib.suppress(OSError):  # a full disk; the name is for messages alone
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
            _held[os.getpid(), path] = file
        else:  # the run that had it has just ended and removed it
            file.close()


def unlock_folder(folder: Path) -> None:
    """Release the lock of this folder, if this process holds it."""
    path = folder.resolve() / NAME
    file = _held.pop((os.getpid(), path), None)
    if file is not None:
        path.unlink(missing_ok=True)
        file.close()


@atexit.register
def _unlock_all() -> None:
    for process, path in list(_held):
        if process == os.getpid():
            unlock_folder(path.parent)
