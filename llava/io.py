"""Reading files that people write."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llava.messages import shorten, shorten_text

if TYPE_CHECKING:
    import yaml


def read_yaml(path: Path, name: str) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        name: what an error calls it.

    Raises:
        ValueError: it cannot be read, is no YAML, or has a key twice in one place: names both lines.
    """
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """YAML's own loader takes the last of equal keys and says nothing."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            check_keys(node, name)
            return super().construct_mapping(node, deep)

    try:
        text = path.read_bytes().decode("utf-8-sig")
        loader = UniqueKeyLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except DuplicateKeyError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not YAML that can be read: brackets within brackets") from error
    except (yaml.YAMLError, ValueError) as error:  # A number of 5,000 digits, or the 31st of April.
        raise ValueError(f"{name}: not YAML: {shorten_text(str(error), 300)}") from error


class DuplicateKeyError(ValueError):
    """A key that a YAML file has twice in one place."""


def check_keys(node: yaml.MappingNode, name: str) -> None:
    """A ``DuplicateKeyError`` for a key that a mapping has twice; a merge (<<) may be overridden."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            continue
        if (key.tag, key.value) in lines:
            raise DuplicateKeyError(
                f"{name}: the key {shorten(key.value)} is there twice, in lines {lines[key.tag, key.value]} and "
                f"{line}; leave one out"
            )
        lines[key.tag, key.value] = line


# What operating systems differ in: locks on files, and how many cores a process may use.

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
