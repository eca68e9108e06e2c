"""Several processes that share the samples of an evaluation."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava.eval.engine import Answerer, Asking, answer_batches
from llava.eval.samples import EvalSample
from llava.model.loading import choose_device

_PATIENCE = 0.5
"""Seconds between two looks at whether all processes are alive."""

AnswererSource = Callable[[str], Answerer]
"""Makes what is asked, on a device; it is pickled on its way to another process."""


@dataclass(frozen=True)
class Share:
    """What one process has to do: answer batches on a device and append to a file.

    ``num_threads`` are for arithmetic on the CPU; 0 leaves them as they are.
    """

    source: AnswererSource
    samples: Sequence[EvalSample]
    batches: Sequence[range]
    asking: Asking
    device: str
    path: Path
    plugins: Sequence[str] = ()
    num_threads: int = 0

    def answer(self, on_batch: Callable[[int], None]) -> None:
        answer_batches(self.source(self.device), self.samples, self.batches, self.asking, self.path, on_batch)


def choose_devices(device: str | None, num_processes: int) -> list[str]:
    """A device for each process: the CPU, or a GPU of its own.

    Raises:
        ValueError: there are fewer GPUs than processes, or one was named for several.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if num_processes == 1 or device == "cpu":
        choose_device(device)
        return [device] * num_processes
    if device != "cuda":
        raise ValueError(
            f"--device {device} with --num_processes {num_processes}: give --device cuda for a GPU each, or one process"
        )
    if num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num_processes is {num_processes}, but there are {torch.cuda.device_count()} GPUs; lower it"
        )
    return [f"cuda:{number}" for number in range(num_processes)]


def run_shares(shares: Sequence[Share], on_batch: Callable[[int], None]) -> None:
    """Do all shares: a single one here, several in processes of their own.

    Args:
        on_batch: is called, in this process, with the number of samples that were answered.

    Raises:
        ValueError: the first error of a share, or a process has died. The others are ended; what they wrote stays.
    """
    if len(shares) == 1:
        shares[0].answer(on_batch)
        return
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    processes = [context.Process(target=_work, args=(share, messages, os.getpid()), daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        _follow(processes, messages, on_batch)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


def _follow(processes: Sequence[Any], messages: Any, on_batch: Callable[[int], None]) -> None:
    """Hand on what the processes say until all have ended."""
    finished = 0
    while finished < len(processes):
        # Who died is looked up before the queue is: what a process said before its end is read first.
        dead = [process for process in processes if process.exitcode not in (None, 0)]
        try:
            message = messages.get(timeout=_PATIENCE)
        except queue.Empty:
            if dead:
                raise ValueError(_describe_end(dead[0])) from None
            continue
        if isinstance(message, str):
            raise ValueError(message)
        finished += message is None
        on_batch(message or 0)


def _describe_end(process: Any) -> str:
    code = process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}, see its traceback above"
    hint = " (for want of memory, it may be)" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"a process of --num_processes ended with {how}{hint}; the same command goes on where it stopped"


def _work(share: Share, messages: Any, parent: int) -> None:
    """A process of its own: sends numbers of samples, at last None, or the text of an error."""
    from llava.plugins import import_plugins

    # Control-C goes to all processes of a terminal: the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if share.num_threads:
        torch.set_num_threads(share.num_threads)

    def on_batch(count: int) -> None:
        messages.put(count)
        if os.getppid() != parent:  # Nobody follows any more, and another run may begin.
            os._exit(1)

    try:
        import_plugins(share.plugins)
        share.answer(on_batch)
        messages.put(None)
    except ValueError as error:
        messages.put(str(error))
