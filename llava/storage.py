"""Storage that fails: which errors are a disk's and no file's, reads that are tried again, and names in such errors."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from llava.types import BadSampleError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_NAMES = (
    "EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
    "ENETRESET", "ECONNRESET", "ECONNABORTED", "ENOLINK", "ENODEV", "ENXIO", "EBADFD", "EUCLEAN",
)  # fmt: skip
STORAGE_ERRORS = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
"""Numbers of errors that a file system gives for a disk or a server that does not answer: not for a file's content."""

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between two tries of a read: a server that is started anew, or another that takes its place, has these."""


class StorageError(BadSampleError):
    """What a disk or a server did not give, however often it was asked. No sample is to blame, so none is left out."""


def find_cause(error: BaseException | None) -> OSError | None:
    """The storage's error behind an error; None where it has another cause."""
    while error is not None:
        # Decoders use the same numbers for files that are damaged.
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS and not _is_decoders(error):
            return error
        error = error.__cause__
    return None


def says_io_error(error: BaseException | None) -> bool:
    """Whether a decoder says that its input could not be read, which it also says of files that are damaged."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS and _is_decoders(error):
            return True
        error = error.__cause__
    return False


def _is_decoders(error: OSError) -> bool:
    return type(error).__module__.partition(".")[0] == "av"


def read_again(read: Callable[[], Result], name: str | os.PathLike[str]) -> Result:
    """What ``read`` gives; where storage fails, it is tried again after pauses.

    Args:
        read: may be called several times.
        name: of the file, for what is said.

    Raises:
        StorageError: it failed each time.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except (OSError, ValueError) as error:
            cause = find_cause(error)
            if cause is None or isinstance(error, StorageError):
                raise
            said = f"{cause.filename or os.fspath(name)}: {cause.strerror}"
            if pause is None:
                raise StorageError(
                    f"{said} (tried {len(PAUSES) + 1} times in {sum(PAUSES):.0f} s). Its disk or server fails: see "
                    "that it answers, or put this file there again if it alone cannot be read; then start again (a run "
                    "goes on with --resume_from_checkpoint auto)"
                ) from error
            logger.warning("%s; tried again in %g s", said, pause)
            time.sleep(pause)
    raise AssertionError


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give a file's name to errors of the system that have none, as those of reading, writing and fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise
