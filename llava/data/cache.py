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
from llava.messages import shorten_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAGIC = b"LLAVARC2"
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4
_BYTES_AT_ONCE = 1 << 22


_MALFORMED = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, NotImplementedError, RecursionError,
)  # fmt: skip
"""What reading something else raises that has a checksum of its own: another version's form, or nobody's."""
_WRITABLE_BY_OTHERS = 0o022


class DamagedFileError(ValueError):
    """A file of the folder that is cut off, changed, of another version or of another user."""


def open_array(path: Path, length: int, dtype: type[np.generic], compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """A mapped array of ``length`` numbers, computed if it is not there: NumPy's file, and behind it its CRC-32."""
    import numpy as np

    # The name says what the numbers depend on: a file that was renamed is another's.
    start = zlib.crc32(os.fsencode(path.name))

    def read_array() -> NDArray[Any]:
        # All of it is read once, which also brings it into the system's cache for the map below.
        content = path.read_bytes()
        checksum = int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
        if zlib.crc32(memoryview(content)[:-_CHECKSUM_BYTES], start) != checksum:
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
        checksum = _compute_checksum(part, part.stat().st_size, start)
        with part.open("ab") as file:
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))

    return open_or_write(path, read_array, write_array)


def open_or_write(path: Path, open_file: Callable[[], T], write: Callable[[Path], None]) -> T:
    """What lies at ``path``; ``write`` makes it (at the path it is given) if it is not there or cannot be used."""

    def open_own() -> T:
        _check_own_file(path)
        try:
            return open_file()
        except DamagedFileError:
            raise
        except _MALFORMED as error:
            raise DamagedFileError(f"it cannot be read ({shorten_text(repr(error), 120)})") from error

    _check_own_folder(path.parent)
    # The usual case needs no lock: a file has its name only when it is complete.
    with suppress(DamagedFileError, OSError):
        return open_own()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_own_folder(path.parent)  # Somebody may have been faster.
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
        raise DamagedFileError(f"another version of llava wrote it (form {content['version']}, here {version})")
    if content["size"] != size - tail - length:
        raise DamagedFileError("its length is wrong")
    if _compute_checksum(path, content["size"]) != content["checksum"]:
        raise DamagedFileError("its checksum is wrong")
    if content["origin"] != origin:
        raise DamagedFileError(f"{origin['path']} has changed since it was written")
    return content


def _compute_checksum(path: Path, size: int, checksum: int = 0) -> int:
    """CRC-32 of the first bytes of a file, behind those that ``checksum`` is of."""
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(size, _BYTES_AT_ONCE))):
            size -= len(piece)
            checksum = zlib.crc32(piece, checksum)
    return checksum


def own_folder(folder: Path) -> Path:
    """A folder that nobody else can write to: ``folder``, or one of this user's in it where it is shared.

    Raises:
        ValueError: it belongs to another user, who could put anything into it.
    """
    try:
        status = folder.stat()
    except OSError:
        _check_own_folder(folder)  # A link of somebody else's, that leads nowhere yet.
        return folder  # It is made, or making it says what is wrong.
    if not hasattr(os, "geteuid") or (_is_own(status.st_uid) and not status.st_mode & _WRITABLE_BY_OTHERS):
        _check_own_folder(folder)
        return folder
    # As /tmp: whoever writes to it, none can rename what is others'. And one of this user's, open to a group.
    if _is_own(status.st_uid) or (status.st_uid == 0 and status.st_mode & stat.S_ISVTX):
        own = folder / f"of-user-{os.geteuid()}"
        with suppress(OSError):  # What is wrong is said when it is written to.
            own.mkdir(mode=0o700, exist_ok=True)
        _check_own_folder(own)
        return own
    raise _not_ours(folder, status.st_uid)


def _check_own_folder(folder: Path) -> None:
    """A ValueError for a folder of another user, who could put anything into it, or a link of one."""
    # In /tmp anybody can make a folder, or a link, of the name that we would take.
    for look in (Path.lstat, Path.stat):
        try:
            owner = look(folder).st_uid
        except OSError:
            continue  # It is made, or making it says what is wrong.
        if not _is_own(owner):
            raise _not_ours(folder, owner)


def _not_ours(folder: Path, owner: int) -> ValueError:
    return ValueError(
        f"{folder}: the folder of indexes belongs to another user (number {owner}); give one of your own with "
        "--data_cache_dir"
    )


def find_stranger(path: Path, folder: Path) -> str | None:
    """What keeps a file of a folder that users may share from being believed; None if nothing does.

    Whoever gives a folder trusts its owner: a file of theirs is believed, and one of this user's own, not that of a
    third who could write there as well. Links lead where those who made them want, and are asked about likewise.
    """
    try:
        looked = (path.lstat(), path.stat())
        trusted = {folder.stat().st_uid, 0}
    except OSError:
        return None  # Reading it says what is wrong.
    if not stat.S_ISREG(looked[1].st_mode):
        return "is no file"
    for status in looked:
        if status.st_uid not in trusted and not _is_own(status.st_uid):
            return f"belongs to a user (number {status.st_uid}) who is neither you nor the owner of its folder"
    return None


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
        try:
            alone = lock_file(file, wait=False)
        except BlockingIOError:
            logger.info("waiting for another process, which is writing %s", path)
            alone = lock_file(file, wait=True)
        yield alone
