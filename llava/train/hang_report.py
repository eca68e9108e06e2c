"""What is said of a run that hangs: which rank never came, what it was doing, and where the others wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from llava import progress
from llava.progress import Note

_EXCHANGE = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py", "deepspeed/comm/comm.py")
"""Files of which a frame is there only while a rank takes part in an exchange."""
_WAITING_INSIDE = ("torch/nn/parallel/distributed.py", "torch/autograd/graph.py")
"""Files whose frame, where it is the innermost one, may wait in C++ for other ranks."""
_WORKING = (progress.DECODING, progress.READING)
_MOST_SAMPLES = 8


@dataclass(frozen=True)
class Place:
    """Where the thread that trains is: for a reader, and whether it takes part in an exchange between ranks."""

    text: str = ""
    waits: bool = False


@dataclass(frozen=True)
class RankState:
    """What is known of a rank when the run is found to hang.

    Attributes:
        note: its last one.
        workers: the last notes of the processes that load its data.
        place: what it says itself; None where it does not answer.
        silence: why it does not, as far as that can be told.
    """

    note: Note
    workers: Sequence[Note] = ()
    place: Place | None = None
    silence: str = field(default="it does not answer")

    @property
    def position(self) -> tuple[int, int]:
        return self.note.step, self.note.place

    @property
    def waits(self) -> bool:
        return self.place is not None and self.place.waits


def find_place(thread: int) -> Place:
    """Where a thread of this process is."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if not frames:
        return Place()
    files = [one.f_code.co_filename.replace("\\", "/") for one in frames]
    waits = any(file.endswith(_EXCHANGE) for file in files) or files[0].endswith(_WAITING_INSIDE)
    inner = frames[0].f_code.co_name
    for one, file in zip(frames, files, strict=True):
        _, found, within = file.rpartition("/llava/")
        if found:
            name = one.f_code.co_name
            called = "" if one is frames[0] else f"{inner} called by "
            return Place(f"{called}{name} (llava/{within}:{one.f_lineno})", waits)
    return Place(inner, waits)


def say_note(state: RankState) -> str:
    """What a rank does: "in the forward pass (step 3, samples 'a', 'b')"."""
    note = state.note
    # Of a step that has its samples, a worker that is busy works on later ones: it hangs beside.
    about = f", {_say_samples(note.samples)}" if note.samples else ""
    if busy := [worker for worker in state.workers if worker.phase in _WORKING]:
        oldest = min(busy, key=lambda worker: worker.since)
        age = max(time.time() - oldest.since, 0)
        about += f", for {age:.0f} s a worker has been {oldest.phase} {_say_samples(oldest.samples)}"
    return f"{note.phase} (step {note.step}{about})"


def _say_samples(samples: Sequence[str]) -> str:
    shown = ", ".join(map(repr, samples[:_MOST_SAMPLES]))
    more = f" and {len(samples) - _MOST_SAMPLES} more" if len(samples) > _MOST_SAMPLES else ""
    return f"sample{'s' if len(samples) > 1 else ''} {shown}{more}"


def describe_hang(states: Mapping[int, RankState], hang: Path, checkpoint: str, seconds: float) -> str:
    """The message of a run that hangs, in one line.

    Args:
        states: of all ranks that are known.
        hang: the folder of stacks.
        checkpoint: what is said of the last whole one.
        seconds: for which no rank has moved.
    """
    return (
        f"error: no rank has moved for {seconds:.0f} s (--hang_timeout). {blame(states)}. The Python stacks of every "
        f"rank that answers, its phase and its samples are in {hang}. {checkpoint}"
    )


def blame(states: Mapping[int, RankState]) -> str:
    """Which ranks never came, what they do, and where the others wait for them."""
    silent = {rank for rank, state in states.items() if state.place is None}
    if len(states) == 1:
        [state] = states.values()
        return f"The only rank is {say_note(state)}{_say_place(state)}"
    if silent:
        return _say_missing(states, silent)
    first = min(state.position for state in states.values())
    behind = {rank for rank, state in states.items() if state.position == first}
    if len(behind) < len(states):
        if all(state.waits for state in states.values()):
            return _say_skipped(states, set(states) - behind)
        return _say_missing(states, behind)
    working = {rank for rank, state in states.items() if not state.waits}
    if 0 < len(working) < len(states):
        return _say_missing(states, working)
    state = states[min(states)]
    return f"All ranks are at the same place, {_say_step(state)}{_say_place(state)}; their stacks say where each waits"


def _say_missing(states: Mapping[int, RankState], missing: set[int]) -> str:
    said = "; ".join(
        f"Rank {rank} (process {state.note.pid}) never came: "
        + (f"{state.silence}, its last note is: " if state.place is None else "it is ")
        + say_note(state)
        + _say_place(state)
        for rank, state in sorted(states.items())
        if rank in missing
    )
    others = sorted(set(states) - missing)
    if not others:
        return said
    state = states[others[0]]
    verb = "waits" if len(others) == 1 else "wait"
    return f"{said}. {_name(others)} {verb} for it, {_say_step(state)}{_say_place(state)}"


def _say_skipped(states: Mapping[int, RankState], ahead: set[int]) -> str:
    behind = sorted(set(states) - ahead)
    one, other = states[min(ahead)], states[behind[0]]
    return (
        f"{_name(sorted(ahead))} left out an exchange in which {_name(behind).lower()} still wait"
        f"{'s' if len(behind) == 1 else ''}: ahead is {say_note(one)}{_say_place(one)}, behind is {say_note(other)}"
        f"{_say_place(other)}"
    )


def _say_step(state: RankState) -> str:
    return f"{state.note.phase} (step {state.note.step})"


def _say_place(state: RankState) -> str:
    return f" [{state.place.text}]" if state.place is not None and state.place.text else ""


def _name(ranks: Iterable[int]) -> str:
    """Ranks in a text: "Ranks 0, 2-5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"Rank{'s' if len(names) > 1 or '-' in names[0] else ''} {', '.join(names)}"


def describe_rank(rank: int, state: RankState, host: str) -> str:
    """What stands above the stacks in a rank's file."""
    note = state.note
    lines = [
        f"rank {rank}, process {note.pid} on {host}",
        f"{say_note(state)}{_say_place(state)}",
        f"for {max(time.time() - note.since, 0):.0f} s",
        *([f"samples: {', '.join(note.samples)}"] if note.samples else []),
        *(
            f"worker process {worker.pid}: {worker.phase} {', '.join(worker.samples)}, "
            f"for {max(time.time() - worker.since, 0):.0f} s"
            for worker in state.workers
        ),
    ]
    if state.place is None:
        lines.append(f"{state.silence}: there is no stack of it")
    return "\n".join(lines) + "\n\n"
