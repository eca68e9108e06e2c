"""Decoding with a time limit, in a process that can be ended.

A decoder that hangs, hangs in C: neither a thread nor a signal handler of Python's ends it, and a crash of it
takes its process along. So each process that decodes keeps a second one that does it on its behalf, starts it
when it is first needed, kills it when a file takes too long, and starts another for the next file.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from llava.data.media_files import MediaError, MediaLimits
from llava.data.video import FrameRequest, Frames, decode_frames, import_decoders

PROGRAM = "import sys; sys.path[:] = {path!r}; from llava.data.decoding import main; main()"
"""What the decoder process runs: the modules of this one, wherever they came from."""
_START_LIMIT = 300.0
_GRACE = 5.0
_PIPE_BYTES = 1 << 20


class DecoderProcess:
    """A process that decodes, one file at a time. It ends with the one that made it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=_PIPE_BYTES,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        if self._read_line(_START_LIMIT) != READY:
            raise RuntimeError(f"the decoder process did not start: it ended with status {self.end(_GRACE)}")

    def decode(self, request: FrameRequest, timeout: float) -> Frames:
        """As ``decode_frames``.

        Args:
            request: what to decode.
            timeout: seconds that it may take.

        Raises:
            MediaError: also where decoding took too long or brought the process down, which is then no more.
        """
        line = json.dumps(asdict(request) | {"limit": timeout + _GRACE}).encode() + b"\n"
        try:
            self._requests.write(line)
            self._requests.flush()
            header = self._read_line(timeout)
        except BrokenPipeError:
            header = b""
        except TimeoutError as error:
            self._process.kill()  # First: whoever still waits for its reply then has it.
            self.end()
            raise MediaError(f"{request.path}: decoding it takes longer than --decode_timeout {timeout:g} s") from error
        if not header.endswith(b"\n"):
            raise self._crashed(request)
        reply = json.loads(header)
        if "error" in reply:
            raise MediaError(reply["error"])
        pixels = np.empty(reply["shape"], np.uint8)
        if self._replies.readinto(pixels.data.cast("B")) < pixels.nbytes:  # type: ignore[attr-defined]
            raise self._crashed(request)
        return Frames(pixels, tuple(reply["indices"]), tuple(reply["times"]), reply["duration"])

    def _read_line(self, timeout: float) -> bytes:
        """The next line of the reply, less than a line at the end of the process; a TimeoutError where none comes."""
        if not hasattr(select, "poll"):
            return self._read_line_in_a_thread(timeout)
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError
        return self._replies.readline()

    def _read_line_in_a_thread(self, timeout: float) -> bytes:
        """The same on Windows, which cannot wait for a pipe; the thread ends with the process at the latest."""
        lines = queue.SimpleQueue[bytes]()
        threading.Thread(target=lambda: lines.put(self._replies.readline()), daemon=True).start()
        try:
            return lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None

    def _crashed(self, request: FrameRequest) -> MediaError:
        status = self.end(_GRACE)
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return MediaError(f"{request.path}: decoding it brought the decoder down ({how})")

    @property
    def alive(self) -> bool:
        """Whether it can be asked for more."""
        return not self._requests.closed and self._process.poll() is None

    def end(self, patience: float = 0.0) -> int:
        """End the process, by force after ``patience`` seconds, and give its exit status."""
        self.forget()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def forget(self) -> None:
        """Close this process's ends of the pipes."""
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(BrokenPipeError):  # a request that nobody took
                pipe.close()


_own: DecoderProcess | None = None


def decode_within(request: FrameRequest, timeout: float) -> Frames:
    """As ``decode_frames``, in this process's decoder process, within ``timeout`` seconds."""
    global _own
    if _own is None or not _own.alive:
        _own = DecoderProcess()
    return _own.decode(request, timeout)


def _forget_inherited() -> None:
    """In a forked process: the decoder is the parent's."""
    global _own
    if _own is not None:
        _own.forget()
    _own = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inherited)


# The decoder process: reads requests from its standard input and writes frames to its standard output.

READY = b"ready\n"
# Those that end a training run in good order, and Control-C: it is the asking process that decides.
_IGNORED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


def main() -> None:
    """Answer requests until there are no more."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # Without a handler of Python's, so that it ends even a decoder that never comes back from C, and though
    # the process that asked, which watches the clock itself, may be gone.
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Whatever a decoder prints must not come between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import_decoders()  # Not at the expense of the first file's time.
    replies.write(READY)
    replies.flush()
    for line in sys.stdin.buffer:
        request: dict[str, Any] = json.loads(line)
        _end_after(request.pop("limit"))
        try:
            _answer(FrameRequest(**request | {"limits": MediaLimits(**request["limits"])}), replies)
        except BrokenPipeError:
            return
        _end_after(0)


def _end_after(seconds: float) -> None:
    """Let the system end this process then, unless it is asked again; 0 calls it off. Windows knows no such thing."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(request: FrameRequest, replies: BinaryIO) -> None:
    pixels = None
    try:
        frames = decode_frames(request)
    except MediaError as error:
        header: dict[str, Any] = {"error": str(error)}
    except MemoryError:
        header = {"error": f"{request.path}: its frames do not fit into memory"}
    else:
        pixels = frames.pixels
        header = {
            "shape": pixels.shape,
            "indices": frames.indices,
            "times": frames.times,
            "duration": frames.duration,
        }
    replies.write(json.dumps(header).encode() + b"\n")
    if pixels is not None:
        replies.write(pixels.data if pixels.flags.c_contiguous else pixels.tobytes())
    replies.flush()


if __name__ == "__main__":
    main()
