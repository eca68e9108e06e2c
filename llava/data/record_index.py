"""The folder of indexes: what was parsed or counted once is mapped the next time.

Whatever is kept here is written beside its place and renamed into it. Of several processes that want the same
thing one makes it while the others wait for its lock; where the file system has no locks each makes its own
copy and the last one stays. A process that is killed leaves a file ``*.part``, which the next to hold the
lock takes away. Nothing is read that another user put here, and no link is followed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.data.record_store import DamagedStoreError, RecordStore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BYTES_AT_ONCE = 1 << 22
_CHECKSUM_BYTES = 4


def digest(*things: Any) -> str:
    """32 hexadecimal digits for plain values."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:32]


def open_store(
    folder: Path, file: Path, settings: dict[str, Any], write: Callable[[Path, dict[str, Any]], RecordStore]
) -> RecordStore:
    """The records of a data file, from its index if that is there and still true.

    Args:
        folder: of the indexes.
        file: the data file.
        settings: what else its records depend on; each combination has an index of its own.
        write: makes the store from the data file, at a path and with the origin that its footer must have.

    Raises:
        ValueError: the file changed while it was read, or what ``write`` raises.
    """
    path = folder / f"{file.stem[:40]}-{digest(os.path.realpath(file), settings)[:16]}.arrow"
    origin = _describe(file)

    def read() -> RecordStore:
        store = RecordStore.open(path)
        if store.footer.origin != origin:
            raise DamagedStoreError(f"{file} has changed since it was written")
        return store

    def make(part: Path) -> None:
        write(part, origin)
        if _describe(file) != origin:
            raise ValueError(f"{file}: it changed while it was read; start again when it is complete")

    return _read_or_make(path, read, make)


def open_array(path: Path, length: int, dtype: type[np.generic], compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """A mapped array of ``length`` numbers, computed if it is not there.

    The file is NumPy's, with the CRC-32 of its bytes behind it.
    """
    import numpy as np

    def read() -> NDArray[Any]:
        content = path.read_bytes()
        checksum = int.from_bytes(content[-_CHECKSUM_BYTES:], "little")
        if zlib.crc32(memoryview(content)[:-_CHECKSUM_BYTES]) != checksum:
            raise DamagedStoreError("it is damaged")
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DamagedStoreError("it is damaged") from error
        if found.shape != (length,) or found.dtype != dtype:
            raise DamagedStoreError("it holds something else")
        return found

    def make(part: Path) -> None:
        with part.open("wb") as file:
            np.save(file, compute().astype(dtype), allow_pickle=False)
        checksum = zlib.crc32(part.read_bytes())
        with part.open("ab") as file:
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))

    return _read_or_make(path, read, make)


def _describe(file: Path) -> dict[str, Any]:
    """What tells whether a data file is still the same: a hash of all of its bytes, some 5 GB a second from memory.

    Size and time do not tell: an editor or ``rsync`` may keep both.
    """
    import xxhash

    hasher = xxhash.xxh3_128()
    # A folder of ``datasets`` is all the files in it.
    for part in [file] if file.is_file() else sorted(path for path in file.rglob("*") if path.is_file()):
        hasher.update(f"{part.relative_to(file)}\0{part.stat().st_size}\0".encode(errors="surrogateescape"))
        with part.open("rb", buffering=0) as stream:
            while piece := stream.read(_BYTES_AT_ONCE):
                hasher.update(piece)
    return {"path": os.path.realpath(file), "hash": hasher.hexdigest()}


def _read_or_make(path: Path, read: Callable[[], T], make: Callable[[Path], None]) -> T:
    """``read()`` what lies at ``path``, and let ``make`` write it (to the path it is given) if it cannot be read."""

    def read_own() -> T:
        _check_own_file(path)
        return read()

    _check_own_folder(path.parent)
    with suppress(DamagedStoreError, OSError):
        return read_own()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path) as alone:
            try:
                return read_own()
            except FileNotFoundError:
                pass
            except (DamagedStoreError, PermissionError) as error:
                logger.warning("%s is made anew: %s", path, error)
            if alone:
                for part in path.parent.glob(f"{path.name}.*.part"):
                    part.unlink(missing_ok=True)
            _make(path, make)
    except OSError as error:
        raise ValueError(
            f"{path}: the index cannot be written: {error}; give another folder with --data_cache_dir"
        ) from error
    return read()


def _check_own_folder(folder: Path) -> None:
    """A ValueError for a folder of another user, who could put anything into it."""
    try:
        owner = folder.stat().st_uid
    except OSError:
        return  # It is made, or making it says what is wrong.
    if not _is_own(owner):
        raise ValueError(
            f"{folder}: the folder of indexes belongs to another user (number {owner}); give one of your own with "
            "--data_cache_dir"
        )


def _check_own_file(path: Path) -> None:
    """A DamagedStoreError for what is no file of this user's own; links are not followed."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedStoreError("it is a link" if stat.S_ISLNK(status.st_mode) else "it is no file")
    if not _is_own(status.st_uid):
        raise DamagedStoreError(f"it belongs to another user (number {status.st_uid})")


def _is_own(owner: int) -> bool:
    return not hasattr(os, "geteuid") or owner == os.geteuid()


def _make(path: Path, make: Callable[[Path], None]) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        make(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for the lock of a path; False where the system or its files have no locks.

    The lock is a file of its own, which is never written to. An OSError if a link lies in its place.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    name = path.with_name(path.name + ".lock")
    if name.is_symlink():
        raise OSError(f"its lock {name} is a link; remove it")
    lock = os.open(name, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise OSError(f"{name} is no file")
        try:
            _wait_for_lock(lock)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _wait_for_lock(lock: int) -> None:
    """Lock an open file, for as long as it is open; an OSError where there are no locks."""
    try:
        import fcntl
    except ImportError as error:  # Windows, where whoever comes first need not be waited for
        raise OSError("no locks on this system") from error
    fcntl.flock(lock, fcntl.LOCK_EX)
