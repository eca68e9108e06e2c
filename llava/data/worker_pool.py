"""Blocks of bytes through several processes, and their answers in the order of the blocks, whichever is ready first.

``multiprocessing`` would run a user's script once more in each process, and fork one that has threads. These are
processes of their own, which know the modules of this one and nothing else of it.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, BinaryIO

_PROGRAM = "import sys; sys.path[:] = {path!r}; from {module} import {function} as main; main()"
READY = b"ready\n"
"""What comes before the first reply. Before it comes what Python prints as it starts: a sitecustomize may."""
_AHEAD = 2
"""Blocks for each process that wait or are being worked on: no more of a file is in memory."""
_LENGTH_BYTES = 8
_DONE, _REFUSED, _NO_FILE, _BROKEN = b"dros"
_BUGS = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError)
"""Sent on with their traceback; anything else ends the process, which prints it, and the one that asks says so."""
_IGNORED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
"""Signals that end a run in good order: the process that asks decides, and closes the pipe."""


def map_blocks(
    program: Callable[[], None], job: bytes, blocks: Iterable[bytes], num_processes: int, where: str
) -> Iterator[bytes]:
    """The answers to blocks, in order; an error of ``blocks`` itself comes when those before it are answered.

    Args:
        program: a function of a module, which calls ``serve``.
        job: sent to each process once.
        blocks: taken as there is room for them.
        num_processes: that answer.
        where: begins the message about a process that ended.

    Raises:
        ValueError, OSError: as they were raised over the first block that is at fault; or a process was ended.
        RuntimeError: a process raised something else.
    """
    workers: list[_Worker] = []
    idle = queue.SimpleQueue[_Worker]()

    def ask(block: bytes) -> bytes:
        worker = idle.get()
        try:
            return worker.ask(block)
        finally:
            idle.put(worker)

    waiting: deque[Future[bytes]] = deque()
    failure: Exception | None = None
    source = iter(blocks)
    # A thread for each process: one writes to its own while others wait for theirs, so that no pipe is full on both
    # ends.
    pool = ThreadPoolExecutor(num_processes)
    try:
        for _ in range(num_processes):
            workers.append(_Worker(program, job, where))
            idle.put(workers[-1])
        while True:
            try:
                block = next(source, None)
            except (ValueError, OSError, *_BUGS) as error:
                failure, block = error, None
            if block is None:
                break
            waiting.append(pool.submit(ask, block))
            if len(waiting) > _AHEAD * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure
    finally:
        # Also where the caller has had enough, or Control-C came.
        for worker in workers:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.forget()


def start_python(program: Callable[[], None], **options: int) -> subprocess.Popen[bytes]:
    """A function of a module in a process of its own, which is asked and answers through pipes."""
    code = _PROGRAM.format(path=sys.path, module=program.__module__, function=program.__name__)
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload]


def take_standard_output() -> BinaryIO:
    """In such a process: what is written to this alone, and nothing that anybody prints, reaches the one that asks."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


class _Worker:
    """A process that answers blocks, one at a time."""

    def __init__(self, program: Callable[[], None], job: bytes, where: str) -> None:
        self._where, self._job = where, job
        self._process = start_python(program)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def ask(self, block: bytes) -> bytes:
        try:
            if self._job:
                _send(self._requests, self._job)
                self._job = b""
                while (line := self._replies.readline()) and not line.endswith(READY):
                    pass
            _send(self._requests, block)
            answer = _receive(self._replies)
        except BrokenPipeError:
            answer = b""
        if not answer:
            status = self._process.wait()
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise ValueError(
                f"{self._where}: one of the processes that read it was ended {how}; perhaps there was no memory left"
            )
        kind, content = answer[0], answer[1:]
        if kind == _DONE:
            return content
        error = {_REFUSED: ValueError, _NO_FILE: OSError}.get(kind, RuntimeError)
        raise error(content.decode("utf-8", "surrogatepass"))

    def kill(self) -> None:
        self._process.kill()

    def forget(self) -> None:
        for pipe in (self._requests, self._replies):
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(len(content).to_bytes(_LENGTH_BYTES, "little"))
    pipe.write(content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """The next content; b"" where the other end is gone."""
    length = int.from_bytes(pipe.read(_LENGTH_BYTES), "little")
    content = pipe.read(length)
    return content if len(content) == length else b""


def serve(prepare: Callable[[bytes], Callable[[bytes], bytes]]) -> None:
    """In a process of ``map_blocks``: answer blocks until there are no more.

    Args:
        prepare: makes of the job what answers its blocks.
    """
    replies = take_standard_output()
    with suppress(BrokenPipeError):  # The process that asked is gone.
        replies.write(READY)
        replies.flush()
        answer = prepare(_receive(sys.stdin.buffer))
        # Nothing of a block stays but its answer: to look for circles among its objects took a third of the time.
        gc.disable()
        while block := _receive(sys.stdin.buffer):
            _send(replies, _answer(answer, block))


def _answer(answer: Callable[[bytes], bytes], block: bytes) -> bytes:
    try:
        return bytes([_DONE]) + answer(block)
    except (ValueError, OSError) as error:
        kind, text = _REFUSED if isinstance(error, ValueError) else _NO_FILE, str(error)
    except _BUGS:
        kind, text = _BROKEN, traceback.format_exc()
    return bytes([kind]) + text.encode("utf-8", "surrogatepass")
