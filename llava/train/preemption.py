"""A run that is asked to stop by a signal, from its program's first line to its last.

SIGTERM or SIGUSR1 ends a run after the step that it is in, with a checkpoint to go on from and exit status 85. Before
the first step nothing is lost by leaving at once, and after the last one there is nothing to go on with. Only the
standard library is imported here, so that a program can listen before it imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PREEMPTED = 85
"""Exit status of a run that was asked to stop and can be resumed (ERESTART's number on Linux)."""

HUNG = 110
"""Exit status of a run that the watchdog has ended, because no rank moved any more (ETIMEDOUT's number on Linux)."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""SIGTERM and, where the system has it, SIGUSR1."""


class Preempted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop; its last checkpoint has everything."""


class EvaluationStopped(Exception):  # noqa: N818
    """An evaluation was given up, because the run was asked to stop."""


class ScoringStopped(Exception):  # noqa: N818
    """Scores of tasks were given up, because the run was asked to stop."""


class _Program:
    """What a program that listens knows of signals outside of training."""

    # Of the class, not of an object: a handler gets a number and a frame, and must find these.
    listening = False
    received: int | None = None
    leave: Callable[[], None] | None = None


def listen() -> None:
    """For a program, as the first thing: note a signal instead of dying of it."""
    if threading.current_thread() is threading.main_thread():
        _Program.listening = True
        for number in SIGNALS:
            signal.signal(number, _note)


def may_leave(clean_up: Callable[[], None]) -> None:
    """From here to the first step a signal ends the program at once, with the status of a run that can be resumed.

    One that came before counts. Without ``listen`` nothing changes.

    Args:
        clean_up: is called before.
    """
    if _Program.listening:
        _Program.leave = clean_up
        if _Program.received is not None:
            _leave(_Program.received)


def forget() -> None:
    """For a program, as the last thing: a signal changes nothing any more, to the end of the process."""
    if _Program.listening and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    _Program.received = number
    if _Program.leave is not None:
        _leave(number)


def _leave(number: int) -> None:
    assert _Program.leave is not None
    name = signal.Signals(number).name
    said = f"{name} received before the first step: nothing is lost; start again the same way\n"
    try:
        with contextlib.suppress(OSError):
            _Program.leave()
        # Not through sys.stderr, in the midst of which the signal may have come.
        with contextlib.suppress(OSError):
            os.write(2, said.encode())
    finally:
        os._exit(PREEMPTED)  # Ranks and threads are not ended in order: none has begun anything.


@dataclass(eq=False, repr=False)  # signal.signal takes the repr of a handler's object, which here holds the one before.
class StopRequest(AbstractContextManager):
    """Listens, while it is entered, for the signals that ask a run to stop.

    A signal only leaves a note: whatever the process is doing, a save included, goes on; so a second one
    changes nothing.

    Attributes:
        agreed: whether all ranks know that one of them was asked.
        evaluation_due: whether an evaluation was left out or given up for it; the checkpoint says so, and a resumed
            run makes up for it.
    """

    agreed: bool = False
    evaluation_due: bool = False
    _received: int | None = None
    _listening: bool = False
    _before: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> StopRequest:
        self._listening = True
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other.
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            # No more leaving at once: from now on there are steps to lose.
            _Program.leave = None
            # A signal that was only noted so far counts too: the run stops after its first step.
            self._received = _Program.received
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening = False
        if self.agreed:  # A process that is about to end for a signal is in no need of another.
            return
        for number, handler in self._before.items():
            # The handler of a program that listens has nothing left to do.
            signal.signal(number, signal.SIG_IGN if handler is _note else handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    @property
    def is_asked(self) -> bool:
        """Whether this rank was asked to stop; the others may not know yet."""
        return self._listening and self._received is not None

    def agree(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank must call it at the same place."""
        from llava.train.distributed import is_any_rank

        # A signal may reach one rank alone: an all-reduce of one number a step tells the others, and all save.
        if self._listening and not self.agreed and is_any_rank(self._received is not None, device):
            self.agreed = True
            if self._received is not None:
                name = signal.Signals(self._received).name
                logger.warning("%s received: saving a checkpoint, then stopping", name)
        return self.agreed
