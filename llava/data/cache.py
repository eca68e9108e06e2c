"""The folder of ``--data_cache_dir``: what was parsed or computed once is mapped the next time.

A file of it is written by one process while others wait, gets its name when it is complete, and is used only if it is
this user's own.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.io import lock_file, write_beside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAGIC = b"LLAVARC2"
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4
_BYTES_AT_ONCE = 1 << 22


class DamagedFileError(ValueError):
    """A file of the folder that is cut off, changed, of another version or of another user."""


def open_array(path: Path, length: int, dtype: type[np.generic], compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """A mapped array of ``length`` numbers, computed if it is not there: NumPy's file, and behind it its CRC-32."""
    import numpy as np

    def read_array() -> NDArray[Any]:
        # All of it is read once, which also brings it into the system's cache for the map below.
        content = path.read_bytes()
        checksum = int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
        if zlib.crc32(memoryview(content)[:-_CHECKSUM_BYTES]) != checksum:
            raise DamagedFileError("it is damaged")
        try:
            # NumPy reads no further than its header says: the checksum behind the numbers is none of them.
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DamagedFileError("it is damaged") from error
        if found.shape != (length,) or found.dtype != dtype:
            raise DamagedFileError("it holds something else")
        return found

    def write_array(part: Path) -> None:
        with part.open("wb") as file:
            np.save(file, compute().astype(dtype, copy=False), allow_pickle=False)
        checksum = _compute_checksum(part, part.stat().st_size)
        with part.open("ab") as file:
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))

    return open_or_write(path, read_array, write_array)


def open_or_write(path: Path, open_file: Callable[[], T], write: Callable[[Path], None]) -> T:
    """What lies at ``path``; ``write`` makes it (at the path it is given) if it is not there or cannot be used."""

    def open_own() -> T:
        _check_own_file(path)
        return open_file()

    _check_own_folder(path.parent)
    # The usual case needs no lock: a file has its name only when it is complete.
    with suppress(DamagedFileError, OSError):
        return open_own()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path) as alone:
            # Another process may have written it while this one waited for the lock.
            try:
                return open_own()
            except FileNotFoundError:
                pass
            except (DamagedFileError, PermissionError) as error:
                logger.warning("%s is made anew: %s", path, error)
            if alone:
                # What processes that were killed have left: with the lock, nobody is writing any of it now.
                for left in path.parent.glob(f"{path.name}.*.part"):
                    left.unlink(missing_ok=True)
            with write_beside(path, durable=False, shared=True) as part:
                write(part)
    except OSError as error:
        raise ValueError(
            f"{path}: the index cannot be written: {error}; give another folder with --data_cache_dir"
        ) from error
    return open_file()


def append_footer(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write behind a file what is known of it: JSON, its checksum, its length and a magic number, to be read backwards.

    Returns:
        The content with the ``size`` and ``checksum`` of the file before it.
    """
    size = path.stat().st_size
    content = {**content, "size": size, "checksum": _compute_checksum(path, size)}
    text = json.dumps(content).encode()
    checksum = zlib.crc32(text).to_bytes(_CHECKSUM_BYTES, "little")
    with path.open("ab") as file:
        file.write(text + checksum + len(text).to_bytes(_LENGTH_BYTES, "little") + _MAGIC)
    return content


def read_footer(path: Path, version: int, origin: Mapping[str, str]) -> dict[str, Any]:
    """What ``append_footer`` wrote; the file is compared with it.

    Raises:
        DamagedFileError: there is none, the file is not as it was, or it is of another version or origin.
    """
    tail = _CHECKSUM_BYTES + _LENGTH_BYTES + len(_MAGIC)
    with path.open("rb") as file:
        # From the end: magic number, length, checksum, JSON.
        size = file.seek(0, 2)
        file.seek(max(size - tail, 0))
        checksum = int.from_bytes(file.read(_CHECKSUM_BYTES), "little")
        length, magic = int.from_bytes(file.read(_LENGTH_BYTES), "little"), file.read()
        if magic != _MAGIC or length + tail > size:
            raise DamagedFileError("it is cut off")
        file.seek(size - tail - length)
        text = file.read(length)
    if zlib.crc32(text) != checksum:
        raise DamagedFileError("its end is damaged")
    content: dict[str, Any] = json.loads(text)
    if content["version"] != version:
        raise DamagedFileError("another version of llava wrote it")
    if content["size"] != size - tail - length:
        raise DamagedFileError("its length is wrong")
    if _compute_checksum(path, content["size"]) != content["checksum"]:
        raise DamagedFileError("its checksum is wrong")
    if content["origin"] != origin:
        raise DamagedFileError(f"{origin['path']} has changed since it was written")
    return content


def _compute_checksum(path: Path, size: int) -> int:
    """CRC-32 of the first bytes of a file."""
    checksum = 0
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(size, _BYTES_AT_ONCE))):
            size -= len(piece)
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _check_own_folder(folder: Path) -> None:
    """A ValueError for a folder of another user, who could put anything into it."""
    try:
        owner = folder.stat().st_uid
    except OSError:
        return  # It is made, or making it says what is wrong.
    # In /tmp anybody can make a folder of the name that we would take.
    if not _is_own(owner):
        raise ValueError(
            f"{folder}: the folder of indexes belongs to another user (number {owner}); give one of your own with "
            "--data_cache_dir"
        )


def _check_own_file(path: Path) -> None:
    """A DamagedFileError for what is no file of this user's own; links are not followed."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFileError("it is a link" if stat.S_ISLNK(status.st_mode) else "it is no file")
    if not _is_own(status.st_uid):
        raise DamagedFileError(f"it belongs to another user (number {status.st_uid})")


def _is_own(owner: int) -> bool:
    return not hasattr(os, "geteuid") or owner == os.geteuid()


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for the lock of a path; False where the system or its files have no locks.

    The lock is a file of its own, which is never written to. An OSError if a link lies in its place.
    """
    name = path.with_name(path.name + ".lock")
    if name.is_symlink():
        raise OSError(f"its lock {name} is a link; remove it")
    # A link that comes between the look and the opening is not followed, and a pipe not waited for.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    lock = os.open(name, flags, 0o600)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise OSError(f"{name} is no file")
    with os.fdopen(lock, "r+b") as file:
        yield lock_file(file, wait=True)
