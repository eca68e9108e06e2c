"""Ends a run in which no rank moves any more, and says which rank never came, what it was doing and with which samples.

Each rank notes what it does (``llava/progress.py``). A thread of each looks at the notes of all ranks: in files where
they run on one machine, and through the store that the ranks have met by where they do not; no exchange between ranks
is needed, as these are what hangs. When no note has changed for ``--hang_timeout``, every rank writes its Python stacks
to ``OUTPUT_DIR/hang-STEP``, the first one that can speaks for all, and all leave with status 110.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava import progress
from llava.train.checkpoint import list_checkpoints
from llava.train.distributed import broadcast_from_rank0, gather_from_ranks
from llava.train.hang_report import Place, RankState, describe_hang, describe_rank, find_place, say_note
from llava.train.preemption import HUNG
from llava.train.rank_notes import FOLDER, RankNotes, clear_old, name_machine
from llava.train.run_lock import release_all

if TYPE_CHECKING:
    from llava.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

OPAQUE = 4
"""What shows no progress while it lasts (compiling, a program's own metrics) has so many times --hang_timeout."""

_SLOWEST_TICK = 5.0  # seconds between two looks
_GRACE = 10.0  # seconds that ranks have to answer, and that a file may take to be written, once a run has hung
_COMPILED_STEPS = 3  # steps of a start that may compile

UNLIMITED = 1e18
"""Patience without an end."""


class NoteCallback(TrainerCallback):
    """Notes the events of a step that the trainer has callbacks for."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        progress.note(progress.BETWEEN, ())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        progress.note(progress.OPTIMIZING, event=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        progress.note(progress.BETWEEN, event=True)


def note_backward(model: torch.nn.Module, inputs: object, outputs: object) -> None:
    """A hook behind the forward pass of the whole model."""
    if model.training:
        progress.note(progress.BACKWARD, event=True)


@contextlib.contextmanager
def watching(trainer: LlavaTrainer) -> Iterator[None]:
    """Around the training of a run: end it, with status 110, when no rank moves for ``--hang_timeout``."""
    args = trainer.args
    if not args.hang_timeout:
        yield
        return
    token = broadcast_from_rank0(lambda: uuid.uuid4().hex)
    folder = Path(tempfile.gettempdir(), f"{FOLDER}{token}")
    own, machine = folder / f"rank-{args.process_index}", ""
    try:
        clear_old(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        progress.begin(own)
        machine = name_machine(folder)
    except OSError as error:
        logger.warning("--hang_timeout: nothing is watched, as this rank cannot note what it does: %s", error)
    # A long start (lengths of all texts, weights) has no limit here: the exchanges between ranks have their own.
    progress.note("preparing", (), patience=UNLIMITED)
    machines = gather_from_ranks(machine)
    if "" in machines:
        progress.end()
        yield
        return
    watchdog = Watchdog(trainer, RankNotes(folder, args.process_index, machines))
    hook = trainer.model.register_forward_hook(note_backward)
    trainer.add_callback(NoteCallback())
    own_metrics = trainer.compute_metrics
    if own_metrics is not None:
        trainer.compute_metrics = _noting(own_metrics, OPAQUE * args.hang_timeout)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()
        hook.remove()
        trainer.pop_callback(NoteCallback)
        trainer.compute_metrics = own_metrics
        progress.end()
        for path in (own, *folder.glob(f"{own.name}.*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # The last rank of the machine.
            folder.rmdir()


def _noting(compute: Callable[..., Any], patience: float) -> Callable[..., Any]:
    def noted(*words: Any, **named: Any) -> Any:
        progress.note("computing metrics", (), patience=patience)
        return compute(*words, **named)

    return noted


@dataclass(eq=False)
class Watchdog:
    """Looks at the notes of all ranks, in a thread, and ends this one with the others.

    Attributes:
        trainer: of the run.
        notes: of all ranks.
    """

    trainer: LlavaTrainer
    notes: RankNotes
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _ending: threading.Lock = field(default_factory=threading.Lock)
    _leaving: bool = False
    _first_step: int = -1

    def start(self) -> None:
        self.rank, self.timeout = self.notes.rank, float(self.trainer.args.hang_timeout)
        self.tick = min(_SLOWEST_TICK, self.timeout / 10)
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._ending:
            self._stop.set()
        if self._leaving:
            threading.Event().wait()  # The other thread is about to end the process.
        faulthandler.cancel_dump_traceback_later()
        if self._thread is not None:
            self._thread.join(_GRACE)

    # Looking.

    def _watch(self) -> None:
        idle, last = 0.0, time.monotonic()
        longest = 2 * self.tick + self.notes.slowest
        while not self._stop.wait(self.tick):
            now = time.monotonic()
            # What was longer than it should be, this process was stopped for, as the whole job may have been.
            idle, last = idle + min(now - last, longest), now
            if self._look():
                idle = 0.0
            declared = self.notes.read_declared()
            if declared is not None or idle >= self._limit():
                self._leave(declared, max(idle, self.timeout))
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # Standard error is closed.
                # Where something holds the interpreter's lock this thread cannot speak, but this can.
                faulthandler.dump_traceback_later(1.5 * self.timeout + 60, file=2)

    def _look(self) -> bool:
        """Whether any rank has moved; also where that cannot be told, as nothing is to be ended for it."""
        try:
            return self.notes.look()
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.debug("--hang_timeout: the notes of the ranks cannot be read: %s", error)
            return True

    def _limit(self) -> float:
        """Seconds without a move that are too many now."""
        step = self.trainer.state.global_step
        self._first_step = step if self._first_step < 0 else self._first_step
        compiles = self.trainer.args.torch_compile and step < self._first_step + _COMPILED_STEPS
        return max(self.timeout * (OPAQUE if compiles else 1), self.notes.patience())

    # Leaving.

    def _leave(self, declared: int | None, idle: float) -> None:
        """Write what this rank does, wait until the others have done so, let one speak, and end the process."""
        with self._ending:
            if self._stop.is_set():  # It has come to its end after all.
                return
            self._leaving = True
        try:
            step = (
                self.notes.declare(max(note.step for note in self.notes.latest.values()))
                if declared is None
                else declared
            )
            hang = Path(str(self.trainer.args.output_dir), f"hang-{step}")
            place = find_place(self._main)
            if not within(lambda: self._write_own(hang, place)):
                within(lambda: faulthandler.dump_traceback(2, all_threads=True))
            states = self._gather(place)
            answered = [rank for rank, state in states.items() if state.place is not None]
            checkpoints: list[str] = []
            within(lambda: checkpoints.append(self._say_checkpoint()))
            said = [*checkpoints, "The output folder does not answer"][0]
            if self.rank == min(answered):
                text = f"{describe_hang(states, hang, said, idle)}. Exit status {HUNG}"
            else:
                text = f"error: rank {self.rank}: this run hangs, {say_note(states[self.rank])}; see {hang}"
            within(lambda: _say(text))
            if self.rank == min(set(answered) & set(self.notes.local)):
                within(lambda: self._end_silent(states, hang))
            self.notes.meet("told", answered, _GRACE)
            within(release_all)
            time.sleep(0.2)  # All have read by then that they may go; the first to do so ends the others' exchanges.
            if self.rank == min(set(answered) & set(self.notes.local)):
                shutil.rmtree(self.notes.folder, ignore_errors=True)
            else:
                time.sleep(0.1)
            # One that hangs would stay. Last of all: where several end, torch raises in the thread that trains, behind
            # which this process would leave with another status.
            for child in multiprocessing.active_children():
                child.kill()
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, psutil.Error) as error:
            said = f"{type(error).__name__}: {error}"
            within(
                lambda: _say(f"error: this run hangs (--hang_timeout), and what is known of it cannot be told: {said}")
            )
        finally:
            os._exit(HUNG)  # The thread that trains waits for something that never comes.

    def _write_own(self, hang: Path, place: Place) -> None:
        """Write what this rank does and its stacks, and those of its workers, to its file."""
        hang.mkdir(parents=True, exist_ok=True)
        with (hang / f"rank-{self.rank}.txt").open("wb") as file:
            state = RankState(self.notes.latest[self.rank], self.notes.workers.get(self.rank, []), place)
            file.write(describe_rank(self.rank, state, socket.gethostname()).encode("utf-8", "backslashreplace"))
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            for child in multiprocessing.active_children():
                if hasattr(signal, "SIGUSR2") and child.pid in {worker.pid for worker in state.workers}:
                    os.kill(child.pid, signal.SIGUSR2)  # See progress.begin_worker.
            time.sleep(0.3)
            for path in sorted(self.notes.folder.glob(f"rank-{self.rank}.stack-*")):
                if text := path.read_bytes():
                    file.write(f"\nworker of {path.suffix.partition('-')[2]}\n".encode() + text)

    def _gather(self, place: Place) -> dict[int, RankState]:
        """What all ranks say of themselves, once they have, or time is up."""
        own = json.dumps([place.text, place.waits])
        self.notes.post("place", own)
        end = time.monotonic() + _GRACE
        while True:
            told = {
                rank: text for rank in self.notes.latest if (text := self.notes.read_post("place", rank)) is not None
            }
            told[self.rank] = own  # Also where no file can be written any more.
            silent = {rank: self._find_silence(rank) for rank in self.notes.latest if rank not in told}
            if time.monotonic() > end or all(silent.values()):
                break
            time.sleep(0.02)
        self._look()
        return {
            rank: RankState(
                note,
                self.notes.workers.get(rank, []),
                Place(*json.loads(told[rank])) if rank in told else None,
                silent.get(rank) or "it does not answer",
            )
            for rank, note in sorted(self.notes.latest.items())
        }

    def _find_silence(self, rank: int) -> str | None:
        """Why a rank of this machine cannot answer; None where nothing is known of it."""
        if rank not in self.notes.local:
            return None
        process = self._find_process(rank)
        try:
            status = psutil.STATUS_DEAD if process is None else process.status()
        except psutil.Error:
            status = psutil.STATUS_DEAD
        if status == psutil.STATUS_DEAD:
            return "its process has ended"
        stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return "its process is stopped (SIGSTOP, a debugger, or a suspended job)" if stopped else None

    def _find_process(self, rank: int) -> psutil.Process | None:
        """The process of a rank of this machine; None where it is none any more."""
        note = self.notes.latest[rank]
        try:
            process = psutil.Process(note.pid)
            # A process that began after the last note is another one of the same number.
            is_other = process.create_time() > note.since + 1 or process.status() == psutil.STATUS_ZOMBIE
            return None if is_other else process
        except psutil.Error:
            return None

    def _end_silent(self, states: dict[int, RankState], hang: Path) -> None:
        """End the ranks of this machine that did not answer, which would keep their GPU, and say in their files why."""
        for rank in self.notes.local:
            if rank in states and states[rank].place is None and (process := self._find_process(rank)) is not None:
                with contextlib.suppress(psutil.Error):
                    process.kill()
                about = describe_rank(rank, states[rank], socket.gethostname())
                (hang / f"rank-{rank}.txt").write_text(about, encoding="utf-8")

    def _say_checkpoint(self) -> str:
        last = next(reversed(list_checkpoints(Path(str(self.trainer.args.output_dir)))), None)
        if last is None:
            return "There is no checkpoint to go on from yet"
        return f"The last whole checkpoint is {last}; --resume_from_checkpoint auto goes on from it"


def within(act: Callable[[], object], seconds: float = _GRACE) -> bool:
    """Do what may itself hang (a network disk, a pipe that nobody reads) in a thread, and wait so long for it.

    Returns:
        Whether it was done.
    """
    done: list[bool] = []

    def run() -> None:
        with contextlib.suppress(OSError):
            act()
            done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


def _say(text: str) -> None:
    """Write a line where errors go; not through ``sys.stderr``, whose lock the thread that hangs may hold."""
    os.write(2, f"{text}\n".encode(errors="backslashreplace"))
