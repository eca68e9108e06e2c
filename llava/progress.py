"""What a process of a run does just now: a phase, a step and samples, in a small file that others can read.

The file lies in memory or on a disk of the machine. What a process has noted there stays readable when that process is
stopped, or when the thread that does its work waits for something that never comes. Before ``begin`` nothing is noted.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LOADING = "waiting for its data"
READING = "reading"
DECODING = "decoding"
COUNTING = "counting the tokens of the step with the other ranks"
FORWARD = "in the forward pass"
BACKWARD = "in the backward pass"
OPTIMIZING = "in the optimizer's step"
BETWEEN = "between two steps"
EVALUATING = "evaluating"
SCORING = "scoring"
SAMPLING = "asking the model about samples"
SAVING = "saving"
"""What a process may be doing."""

GRACE = 10.0
"""Seconds beyond a time limit that what enforces it may take."""

_SIZE = 4096  # bytes of a file: a note is cut to them, and replaced as a whole
_MOST_IDS = 2400  # bytes of samples' ids in it
_LONGEST_ID = 120


@dataclass
class Note:
    """What a process does, as it has noted it last.

    Attributes:
        count: notes so far: it has moved since the last look if this has.
        phase, samples: what it does, and with which samples.
        step: of the run, the first being 1; 0 before it.
        place: of its last event within the step, so that ranks can be compared.
        patience: seconds that this may take without another note; 0 for as many as anything else.
        since: when it was noted, as a time of day.
        pid: of the process.
    """

    count: int = 0
    phase: str = ""
    step: int = 0
    place: int = 0
    samples: list[str] = field(default_factory=list)
    patience: float = 0.0
    since: float = 0.0
    pid: int = 0


class _Process:
    """The file of this process. Of the class, not of an object: what notes need not know who reads."""

    path: Path | None = None
    file: int | None = None
    note = Note()
    dump: IO[bytes] | None = None


def begin(path: Path) -> None:
    """Note from now on, in this file, which is made; an OSError where that is not possible."""
    end()
    _Process.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)
    _Process.path, _Process.note = path, Note(pid=os.getpid())


def begin_worker(path: Path | None, loader: str, number: int) -> None:
    """Note from now on as a worker process of a loader, beside the file of the process that has started it.

    Args:
        path: that file; None where that process notes nothing.
        loader: what the worker loads.
        number: of the worker.
    """
    if path is None:
        return
    with contextlib.suppress(OSError):  # Without notes its samples are not named, and it works all the same.
        begin(path.with_name(f"{path.name}.worker-{loader}-{number}"))
        if hasattr(signal, "SIGUSR2"):
            # Without Python's own machinery, so that it answers from wherever it is.
            _Process.dump = path.with_name(f"{path.name}.stack-{loader}-{number}").open("wb")
            faulthandler.register(signal.SIGUSR2, file=_Process.dump, all_threads=True)


def end() -> None:
    """Note no more; the file stays."""
    if _Process.file is not None:
        os.close(_Process.file)
    _Process.file = _Process.path = None


def own_path() -> Path | None:
    """Where this process notes; None where it does not."""
    return _Process.path


def own_note() -> Note | None:
    """What this process has noted last; None where it does not."""
    return None if _Process.file is None else _Process.note


def note(phase: str, samples: Sequence[str] | None = None, *, patience: float = 0.0, event: bool = False) -> None:
    """Note what this process does from here on.

    Args:
        phase: one of the above.
        samples: ids of those that it does it with; None leaves those that were noted last.
        patience: see ``Note``.
        event: whether every rank comes here alike, see ``Note.place``.
    """
    if _Process.file is None:
        return
    now = _Process.note
    now.count += 1
    now.phase, now.patience, now.since = phase, patience, time.time()
    now.place += event
    if samples is not None:
        now.samples = _cut(samples)
    _write(_Process.file, now)


def begin_step(step: int) -> None:
    """Note that this process asks for the samples of a step."""
    _Process.note.step, _Process.note.place = step, 0
    note(LOADING, (), event=True)


def note_batches(phase: str, batches: Sequence[Mapping[str, Any]]) -> None:
    """Note an event, with the samples of some batches."""
    note(phase, [sample for batch in batches for sample in batch.get("sample_ids", ())], event=True)


@contextlib.contextmanager
def doing(phase: str, *, patience: float = 0.0) -> Iterator[None]:
    """Note a phase, and when it is over the one before."""
    before = _Process.note.phase
    note(phase, (), patience=patience, event=True)  # Samples that were noted before have no part in it.
    yield
    note(before, event=True)


def read(path: Path) -> Note | None:
    """What a process has noted last; None where there is nothing that can be read."""
    for _ in range(3):  # It may just be replaced.
        try:
            return Note(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            time.sleep(0.001)
    return None


def _write(file: int, now: Note) -> None:
    data = json.dumps(vars(now)).encode()
    with contextlib.suppress(OSError):  # A full disk: the notes end, the run does not.
        if hasattr(os, "pwrite"):
            os.pwrite(file, data.ljust(_SIZE), 0)
        else:  # Windows
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, data.ljust(_SIZE))


def _cut(samples: Sequence[str]) -> list[str]:
    kept: list[str] = []
    room = _MOST_IDS
    for number, sample in enumerate(samples):
        name = sample if len(sample) <= _LONGEST_ID else sample[:_LONGEST_ID] + "..."
        room -= len(json.dumps(name)) + 2
        if room < 0:
            return [*kept, f"and {len(samples) - number} more"]
        kept.append(name)
    return kept


def _forget_inherited() -> None:
    """In a forked process: the notes are the parent's, which goes on with them."""
    _Process.file, _Process.note = None, Note()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inherited)
