"""What all ranks of a run have noted, and what they tell each other when they no longer meet.

Ranks of one machine read each other's files; between machines the store is used that the ranks have met by. Neither is
an exchange in which all must take part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch

from llava import progress
from llava.io import write_beside
from llava.progress import Note
from llava.train.command_line import read_variables
from llava.train.run_lock import pid_namespace

logger = logging.getLogger(__name__)

STORE_TIMEOUT = 10.0
"""Seconds that the store may take to answer."""

FOLDER = "llava-run-"
"""What the name of a run's folder of notes begins with."""
_KEPT = 30 * 24 * 3600.0  # seconds that such a folder may lie without a note
_MOVED_BYTES = 1 << 16  # that a process reads and writes between two looks, where it saves


@dataclass(eq=False)
class RankNotes:
    """The notes of all ranks, as one of them sees them.

    Attributes:
        folder: of the files of this machine's ranks.
        rank: of this process.
        machines: the machine of each rank, see ``name_machine``.
        latest: the last note of each rank.
        workers: those of the processes that load its data.
    """

    folder: Path
    rank: int
    machines: Sequence[str]
    latest: dict[int, Note] = field(default_factory=dict)
    workers: dict[int, list[Note]] = field(default_factory=dict)
    _seen: dict[int, str] = field(default_factory=dict)
    _store: Any = None
    _bytes: int = 0

    def __post_init__(self) -> None:
        own = self.machines[self.rank]
        self.local = [rank for rank, machine in enumerate(self.machines) if machine == own]
        self._others = [rank for rank, machine in enumerate(self.machines) if machine != own]
        if self._others:
            self._store = open_store()

    @property
    def slowest(self) -> float:
        """Seconds that a look may take where the store does not answer."""
        return 3 * STORE_TIMEOUT if self._others else 0.0

    # Looking.

    def look(self) -> bool:
        """Read the notes of all ranks; whether any has moved since the last time."""
        moved = {rank: self._movement(rank) for rank in self.local}
        if self.latest[self.rank].phase == progress.SAVING and self._has_moved_bytes():
            with contextlib.suppress(OSError):
                (self.folder / f"rank-{self.rank}.bytes").write_text(str(self._bytes), encoding="utf-8")
        if self._store is not None:
            moved |= self._exchange(moved[self.rank])
        changed = any(self._seen.get(rank) != state for rank, state in moved.items())
        self._seen |= moved
        return changed

    def patience(self) -> float:
        """The most seconds that what a rank or a worker does may take."""
        workers = [worker for own in self.workers.values() for worker in own]
        return max((note.patience for note in (*self.latest.values(), *workers)), default=0.0)

    def _movement(self, rank: int) -> str:
        """What a rank of this machine and its workers have noted, as something that changes when they move."""
        path = self.folder / f"rank-{rank}"
        # Its own it has at hand, whatever became of the file.
        note = progress.own_note() if rank == self.rank else progress.read(path)
        if note is None:
            if rank not in self.latest:
                return ""
            self.latest[rank].patience = 0.0  # Nobody waits for a rank that has ended.
            return "ended"
        self.latest[rank] = note
        counts, workers = [str(note.count)], []
        for beside in sorted(self.folder.glob(f"{path.name}.*")):
            if ".worker-" in beside.name and (worker := progress.read(beside)) is not None:
                counts.append(f"{worker.pid} {worker.count}")
                if psutil.pid_exists(worker.pid):  # One that was ended in the midst of a sample hangs no more.
                    workers.append(worker)
            elif beside.suffix == ".bytes":
                with contextlib.suppress(OSError):
                    counts.append(beside.read_text(encoding="utf-8"))
        self.workers[rank] = workers
        return " ".join(counts)

    def _exchange(self, movement: str) -> dict[int, str]:
        """Tell the other machines' ranks of this one, and hear of them."""
        own = [vars(note) for note in (self.latest[self.rank], *self.workers[self.rank])]
        try:
            self._store.set(self._key(self.rank), json.dumps([movement, own]))
            # Not one by one those that have been heard of: with hundreds the store would do nothing else.
            there = [rank for rank in self._others if rank in self.latest or self._store.check([self._key(rank)])]
            told = self._store.multi_get([self._key(rank) for rank in there]) if there else []
            heard = {rank: json.loads(text) for rank, text in zip(there, told, strict=True)}
            for rank, (_, notes) in heard.items():
                self.latest[rank], *self.workers[rank] = [Note(**note) for note in notes]
        except (RuntimeError, ValueError) as error:  # The rank or the machine that keeps the store is gone or stopped.
            logger.debug("the ranks' store does not answer: %s", error)
            return {}
        return {rank: moved for rank, (moved, _) in heard.items()}

    def _has_moved_bytes(self) -> bool:
        """Whether this process reads or writes files, which is what saving shows of itself."""
        try:
            # Without what this thread has read itself: the notes of a machine's ranks and workers are more than that.
            moved = _count_bytes("self") - _count_bytes("thread-self")
        except (OSError, ValueError, KeyError):  # No Linux: a save has as long as anything else.
            return False
        before, self._bytes = self._bytes, moved
        return moved - before > _MOVED_BYTES

    # Telling each other.

    def read_declared(self) -> int | None:
        """The step in which another rank has found the run hanging; None while none has."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "hang").read_text(encoding="utf-8"))
        with contextlib.suppress(RuntimeError, ValueError):
            if self._store is not None and self._store.check([self._key("hang")]):
                return int(self._store.get(self._key("hang")))
        return None

    def declare(self, step: int) -> int:
        """Say that the run hangs; the step that the first rank to say so has named."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError, ValueError):
                step = int(self._store.compare_set(self._key("hang"), "", str(step)))
        with contextlib.suppress(OSError), (self.folder / "hang").open("x", encoding="utf-8") as file:
            file.write(str(step))
        declared = self.read_declared()
        return step if declared is None else declared

    def post(self, name: str, text: str) -> None:
        """Leave a text for the other ranks."""
        with contextlib.suppress(OSError), write_beside(self.folder / f"{name}-{self.rank}") as beside:
            beside.write_text(text, encoding="utf-8")
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(self._key(f"{name}-{self.rank}"), text)

    def read_post(self, name: str, rank: int) -> str | None:
        """What a rank has left; None where it has not."""
        if rank in self.local:
            with contextlib.suppress(OSError):
                return (self.folder / f"{name}-{rank}").read_text(encoding="utf-8")
            return None
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._store.check([self._key(f"{name}-{rank}")]):
                return str(self._store.get(self._key(f"{name}-{rank}")).decode())
        return None

    def meet(self, name: str, ranks: Iterable[int], seconds: float) -> None:
        """Wait so long for ranks to come here."""
        self.post(name, "")
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(self.read_post(name, rank) is None for rank in ranks):
            time.sleep(0.01)

    def _key(self, name: object) -> str:
        return f"{self.folder.name}/{name}"


def clear_old(place: Path) -> None:
    """Remove what runs that were killed have left of their notes."""
    for folder in place.glob(f"{FOLDER}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _KEPT and os.access(folder, os.W_OK):
                shutil.rmtree(folder, ignore_errors=True)


def _count_bytes(whose: str) -> int:
    """Bytes that have been read and written by this process, or by this thread."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{whose}/io").read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def name_machine(folder: Path) -> str:
    """The same text for ranks that see the same files and processes, another one for all others."""
    with contextlib.suppress(OSError):
        found = folder.stat()
        return f"{socket.gethostname()} {pid_namespace()} {found.st_dev} {found.st_ino}"
    return f"{socket.gethostname()} {uuid.uuid4().hex}"


def open_store() -> Any:
    """The store that the ranks have met by, over a connection of one's own; None where it does not answer.

    A thread that shared that of the process group would wait behind whatever this waits for.
    """
    where = read_variables(("MASTER_ADDR", "MASTER_PORT"))
    limit = timedelta(seconds=STORE_TIMEOUT)
    try:
        return torch.distributed.TCPStore(where["MASTER_ADDR"], int(where["MASTER_PORT"]), timeout=limit)
    except (KeyError, ValueError, RuntimeError) as error:
        logger.warning(
            "--hang_timeout: ranks on other machines are not watched, their store does not answer: %s", error
        )
        return None
