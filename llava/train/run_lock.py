"""One run in a folder at a time: a lock file that says who holds it, and is recognised when its holder is gone."""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = "run.lock"
"""Lies in ``--output_dir`` while a run writes there."""

_TRIES = 40
_PAUSE = 0.05  # seconds between two looks at a lock that is just being written
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host, pid: where it runs.
        process_started: when it was started, as the system counts; tells it from a later process of the same number.
        boot, namespace: of the system, and of its process numbers (a container has its own); "" where unknown.
        job, restart: the scheduler's number of the job, and how often it was requeued; "" and 0 without one.
        since: when the lock was taken, as a time of day.
        token: of this lock alone.
        machine: the number of the system's installation; "" where unknown. Two machines may have one name.
    """

    host: str
    pid: int
    process_started: float | None
    boot: str
    namespace: str
    job: str
    restart: int
    since: str
    token: str
    machine: str = ""

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_gone(self, here: Holder) -> bool:
        """Whether the holder surely runs no more, as ``here`` can tell; False where it cannot."""
        if self.job and self.job == here.job and self.restart < here.restart:
            return True  # The scheduler starts a job again only when its processes are gone.
        # Of processes on other machines nothing is known.
        if self.host != here.host or (self.machine and here.machine and self.machine != here.machine):
            return False
        if self.boot and here.boot and self.boot != here.boot:
            return datetime.fromisoformat(self.since).timestamp() < _boot_time()
        # The same number means another process in another container.
        if self.namespace != here.namespace:
            return False
        return not _is_running(self.pid, self.process_started)


_held: dict[Path, Holder] = {}
"""The locks of this process, by folder."""


def take_lock(folder: Path, job: str = "", restart: int = 0) -> None:
    """Take the lock of a run's folder for this process; one that this process already has stays.

    Args:
        folder: exists.
        job, restart: the scheduler's number of this job, and how often it was requeued.

    Raises:
        ValueError: another run has it, or it cannot be written; names host, process and start of that run.
    """
    path, key, here = folder / LOCK, folder.resolve(), _describe_process(job, restart)
    # Each turn takes the lock, finds who has it, or clears a stale one away.
    for _ in range(_TRIES):
        if _create(path, here):
            break
        holder = _read(path)
        if holder is None:  # It went away, or is not written whole yet.
            time.sleep(_PAUSE)
            continue
        if (mine := _held.get(key)) is not None and mine.pid == here.pid and holder.token == mine.token:
            return
        if not holder.is_gone(here):
            raise ValueError(_say_in_use(folder, path, holder, here))
        if _set_aside(path, holder):
            logger.warning("%s: the run that had it is gone (%s); it is replaced", path, holder)
    else:
        raise ValueError(
            f"--output_dir {folder}: {path} is there and cannot be read, so nothing tells whose run it is; if none "
            "writes to this folder, remove that file"
        )
    time.sleep(_PAUSE)  # Whoever has taken a fresh lock for a stale one has put it back by now.
    holder = _read(path)
    if holder is None or holder.token != here.token:
        raise ValueError(_say_in_use(folder, path, holder or here, here))
    if not _held:
        atexit.register(release_all)
    _held[key] = here


def check_lock(folder: str | Path) -> None:
    """See that a folder is still this process's, before something of worth is written there; without a lock, nothing.

    A lock that somebody has removed is written again.

    Raises:
        ValueError: another run has the folder now; names it.
    """
    folder = Path(folder)
    mine = _held.get(folder.resolve())
    if mine is None or mine.pid != os.getpid():
        return
    path = folder / LOCK
    holder = _read(path)
    if holder is None and not path.exists() and _create(path, mine):
        logger.warning("%s was removed while this run writes to the folder; it is there again", path)
    elif holder is not None and holder.token != mine.token:
        raise ValueError(
            f"--output_dir {folder} was taken by another run ({holder}) while this one was training there: {LOCK} was "
            "removed, or taken for that of a run that is gone. This run ends, and leaves the folder to that one; give "
            "one of them another folder"
        )


def release_lock(folder: str | Path) -> None:
    """Give back this process's lock of a folder; without one, nothing happens."""
    folder = Path(folder)
    mine = _held.pop(folder.resolve(), None)
    if mine is None or mine.pid != os.getpid():  # A forked worker has a copy of what is not its own.
        return
    holder = _read(folder / LOCK)
    if holder is not None and holder.token == mine.token:
        (folder / LOCK).unlink(missing_ok=True)


def release_all() -> None:
    """Give back all locks of this process."""
    for folder in list(_held):
        with contextlib.suppress(OSError):
            release_lock(folder)


def _say_in_use(folder: Path, path: Path, holder: Holder, here: Holder) -> str:
    known = ("host", "namespace", "boot", "machine")
    if all(getattr(holder, name) == getattr(here, name) for name in known):
        remedy = "wait for it, end it, or give another folder"
    else:
        remedy = (
            "wait for it or give another folder; whether it still runs cannot be seen from here "
            f"({here.host}): if it does not, remove {path}"
        )
    return f"--output_dir {folder} is in use by another run ({holder}); {remedy}"


def _create(path: Path, here: Holder) -> bool:
    """Make the lock file, whole from its first moment; False if there is one."""
    text = json.dumps(asdict(here))
    beside = path.with_name(f"{path.name}.{here.token}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            # Unlike a rename it fails where the name is taken, so of two runs one has the lock.
            os.link(beside, path)
        except FileExistsError:
            # NFS may have done it, and have lost its answer.
            return beside.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(path, text)
        return True
    except OSError as error:
        raise ValueError(f"--output_dir {path.parent} cannot be written to: {error}; give another folder") from error
    finally:
        beside.unlink(missing_ok=True)


def _create_without_links(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {"machine": "", **content}  # Earlier releases did not write it.
        return Holder(**{field.name: entries[field.name] for field in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _set_aside(path: Path, stale: Holder) -> bool:
    """Remove a stale lock; of several processes that try, one does."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except OSError:  # Another was first.
        return False
    taken = _read(aside)
    if taken is None or taken.token == stale.token:
        aside.unlink(missing_ok=True)
        return True
    # Another was first, and this is its own: it goes back.
    with contextlib.suppress(OSError):
        os.link(aside, path)
    aside.unlink(missing_ok=True)
    return False


# Processes: this one, and whether another still runs.


def _describe_process(job: str, restart: int) -> Holder:
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        pid=pid,
        process_started=_process_start(pid),
        boot=_read_line(Path("/proc/sys/kernel/random/boot_id")),
        namespace=pid_namespace(),
        job=job,
        restart=restart,
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
        machine=_read_line(Path("/etc/machine-id")),
    )


def _is_running(pid: int, started: float | None) -> bool:
    """Whether the process of that number is the one that was started then; yes where that cannot be told."""
    import psutil

    if not psutil.pid_exists(pid):
        return False
    now = _process_start(pid)
    if now is None:
        return psutil.pid_exists(pid)
    if started is None:
        return True
    return abs(now - started) < 2  # In seconds; in ticks no process is so near another of its number.


def _process_start(pid: int) -> float | None:
    """When a process was started: on Linux in the kernel's ticks, else a time; None for one that has ended."""
    import psutil

    if stat := _read_line(Path(f"/proc/{pid}/stat")):
        state, *rest = stat.rpartition(")")[2].split()
        return -1.0 if state in "ZX" else float(rest[18])  # Ended, and only not yet collected.
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _boot_time() -> float:
    import psutil

    return psutil.boot_time()


def pid_namespace() -> str:
    """Which processes this one sees: a container has its own; "" where unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - it is no path
    except OSError:
        return ""


def _read_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
