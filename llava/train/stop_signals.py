"""The signals that ask a run to stop, from a program's first line to its last.

Between these, ``llava.train.preemption`` finishes the step and saves. Before the first step nothing is lost by
leaving at once, and after the last one nothing is to be gone on with. Only the standard library is imported here:
a program can listen before it imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

PREEMPTED = 85
"""Exit status of a run that was asked to stop and can be resumed (ERESTART's number on Linux)."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""SIGTERM and, where the system has it, SIGUSR1."""


class _Early:
    """What a program that listens knows of signals before it trains."""

    listening = False
    received: int | None = None
    leave: Callable[[], None] | None = None


def listen() -> None:
    """For a program, as the first thing: note a signal instead of dying of it."""
    if threading.current_thread() is threading.main_thread():
        _Early.listening = True
        for number in SIGNALS:
            signal.signal(number, _note)


def may_leave(clean_up: Callable[[], None]) -> None:
    """From here to the first step a signal ends the program at once, with the status of a run that can be resumed.

    One that came before counts. Without ``listen`` nothing changes.

    Args:
        clean_up: is called before.
    """
    if _Early.listening:
        _Early.leave = clean_up
        if _Early.received is not None:
            _leave(_Early.received)


def must_stay() -> int | None:
    """From here on a signal is only noted again; the one that has come already, if any."""
    _Early.leave = None
    return _Early.received


def forget() -> None:
    """For a program, as the last thing: a signal changes nothing any more, to the end of the process."""
    if _Early.listening and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def restore(before: dict[int, Any]) -> None:
    """Put back handlers; those of a program that listens give way to none, for what it did is done."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler is _note else handler)


def _note(number: int, frame: FrameType | None) -> None:
    _Early.received = number
    if _Early.leave is not None:
        _leave(number)


def _leave(number: int) -> None:
    assert _Early.leave is not None
    name = signal.Signals(number).name
    said = f"{name} received before the first step: nothing is lost; start again the same way\n"
    try:
        with contextlib.suppress(OSError):
            _Early.leave()
        # Not through sys.stderr, in the midst of which the signal may have come.
        with contextlib.suppress(OSError):
            os.write(2, said.encode())
    finally:
        os._exit(PREEMPTED)  # Ranks and threads need no parting: none has begun anything.
