"""What operating systems differ in: locks on files, and how many cores a process may use.

Nothing that one of Linux, macOS and Windows lacks is imported or looked up when a module of this library is loaded.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import IO, Any

_FAR = 1 << 40
"""Where Windows locks a byte: behind all contents, which others could not read otherwise."""
_PAUSE = 0.1


def num_cores() -> int:
    """How many cores this process may use; where the system does not say, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lock_file(file: IO[Any], wait: bool) -> bool:
    """Take the lock of an open file for this process, which gives it back with the file or its own end.

    Args:
        file: open for writing.
        wait: whether to wait for one that another process has.

    Returns:
        Whether this process has it now; False where the system or its file system has no locks.

    Raises:
        BlockingIOError: another process has it, and nobody wants to wait.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file, wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _lock_on_windows(file: IO[Any], wait: bool) -> bool:
    try:
        windows: Any = import_module("msvcrt")
    except ImportError:
        return False
    place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    try:
        while True:
            os.lseek(file.fileno(), _FAR, os.SEEK_SET)
            try:
                windows.locking(file.fileno(), windows.LK_NBLCK, 1)
            except PermissionError as error:  # What Windows says of a lock that another has.
                if not wait:
                    raise BlockingIOError(*error.args) from error
                time.sleep(_PAUSE)
            else:
                return True
    finally:
        os.lseek(file.fileno(), place, os.SEEK_SET)


def apply_umask(folder: str | os.PathLike[str]) -> None:
    """Give the weights in a folder, and in those within, the permissions that other new files get.

    safetensors writes them for their owner alone.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        if path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)
