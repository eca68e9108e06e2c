"""Files: atomic and durable writes, lines of JSON, hashes, locks, and YAML that people write."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from llava.messages import shorten, shorten_text
from llava.storage import naming

if TYPE_CHECKING:
    import yaml

_BLOCK = 1 << 20


# Atomic and durable writes: a file has its old content or the new one, whatever happens.


@contextmanager
def write_beside(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A path to write a file at, which takes the name ``path`` when the block ends, and is removed if it fails.

    Args:
        path: of the file; one that exists is replaced as a whole.
        durable: whether the new content is on the disk before the file takes its name. Needless where a damaged
            file is noticed and made again.
        shared: whether other processes may write the same file at the same time, so that each needs a path of its own.
    """
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part" if shared else f"{path.name}.part")
    try:
        with naming(path):  # What is written to a file that is open fails without a name.
            yield beside
        if durable:
            sync(beside)
        beside.replace(path)
        if durable:
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as it is, atomically and durably."""
    with write_beside(path) as beside:
        # Names of files and ids may hold halves of characters.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(path: Path, value: object, *, sort_keys: bool = False) -> None:
    """Write a value as indented JSON, atomically and durably."""
    with write_beside(path) as beside:
        beside.write_bytes(_encode(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=sort_keys)))


def _encode(value: str) -> bytes:
    # Names of files may hold halves of characters, which are no UTF-8; escaped so, JSON is still JSON.
    return f"{value}\n".encode("utf-8", "backslashreplace")


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; a name that is too long, or that none can have, is the name of none."""
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises over such names)


def is_there(path: str | Path) -> bool:
    """Whether there is such a file or folder, as ``is_file``."""
    return os.path.exists(path)  # noqa: PTH110


def sync(path: Path) -> None:
    """Wait until a file, or the list of the files in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network disks cannot, and need not.
            raise
    finally:
        os.close(descriptor)


# Files to which a line of JSON is appended at a time. A process that is killed leaves half a line at most.


def append_json_lines(file: BinaryIO, rows: Iterable[Mapping[str, object]], *, durable: bool = True) -> None:
    """Append one line for each row to an open file; if ``durable``, they are on the disk when this returns."""
    file.write(b"".join(_encode(json.dumps(row, ensure_ascii=False)) for row in rows))
    if durable:
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A file that lines are appended to, made with its folder where it is missing; errors of writing name it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("ab") as file:
        yield file


def read_json_lines(path: Path) -> list[Any]:
    """The value of each line; half a line at the end is left out, and without the file there are none.

    Raises:
        ValueError: a line is no JSON; names file and line.
    """
    values = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return values


def cut_unfinished_line(path: Path) -> None:
    """Drop what a file has behind its last newline, so that lines can be appended again."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


# Hashes.


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: object, num_digits: int = 64) -> str:
    """SHA-256 of a value as JSON with sorted keys; what JSON does not know counts as its ``str``."""
    # Sorted keys: equal values have equal hashes, in whatever order they were put together.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:num_digits]


# YAML.


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
        with path.open("rb") as file:
            content = file.read(_LARGEST_YAML + 1)
        if len(content) > _LARGEST_YAML:
            raise YamlSizeError(f"{name}: has more than {_LARGEST_YAML:,} bytes, which no settings have; is it data?")
        loader = UniqueKeyLoader(content.decode("utf-8-sig"))
        try:
            if (node := loader.get_single_node()) is None:
                return None
            if _count_nodes(node, {}) > _MOST_NODES:
                raise YamlSizeError(
                    f"{name}: its aliases (*name) stand for more than {_MOST_NODES:,} values; write less"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (DuplicateKeyError, YamlSizeError):
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: not YAML that can be read: brackets within brackets") from error
    except (yaml.YAMLError, ValueError) as error:  # A number of 5,000 digits, or the 31st of April.
        raise ValueError(f"{name}: not YAML: {shorten_text(str(error), 300)}") from error


_LARGEST_YAML = 1 << 22
_MOST_NODES = 200_000


class YamlSizeError(ValueError):
    """A YAML file that is too large, or becomes so with its aliases."""


def _count_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node is, each alias counted as all that it stands for; infinite where it stands in itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # Until it is known: whoever meets it within itself meets this.
        parts = node.value if isinstance(node.value, list) else []
        pairs = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count_nodes(part, known) for part in pairs)
    return known[id(node)]


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


def user_folder(name: str) -> str:
    """A folder below this user's home; for one that has none (in a container, say), one for temporary files."""
    path = os.path.expanduser(os.path.join("~", name))  # noqa: PTH111 (Path's raises where there is no home)
    if not path.startswith("~"):
        return path
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"llava-user-{os.getuid() if hasattr(os, 'getuid') else 0}")


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
        windows = import_module("msvcrt")
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
    # It can only be asked for by setting it.
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).rglob("*.safetensors"):
        if path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)
