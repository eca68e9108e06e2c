"""The folder of indexes: what was parsed or counted once is mapped the next time.

Whatever is kept here is written beside its place and renamed into it. Of several processes that want the same
thing one makes it while the others wait for its lock; where the file system has no locks each makes its own
copy and the last one stays. A process that is killed leaves a file ``*.part``, which the next to hold the
lock takes away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import uuid
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
    """A mapped array of ``length`` numbers, computed if it is not there."""
    import numpy as np

    def read() -> NDArray[Any]:
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

    return _read_or_make(path, read, make)


def _describe(file: Path) -> dict[str, Any]:
    """What tells whether a file is still the same."""
    status = file.stat()
    return {"path": os.path.realpath(file), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_or_make(path: Path, read: Callable[[], T], make: Callable[[Path], None]) -> T:
    """``read()`` what lies at ``path``, and let ``make`` write it (to the path it is given) if it cannot be read."""
    if path.is_file():
        with suppress(DamagedStoreError):
            return read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as alone:
            try:
                return read()
            except FileNotFoundError:
                pass
            except DamagedStoreError as error:
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


def _make(path: Path, make: Callable[[Path], None]) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        make(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for the lock of a path; False where the file system has no locks."""
    with path.with_name(path.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
