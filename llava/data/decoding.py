"""From a request for frames of a clip to their pixels, in this process or, with a time limit, in one that can be ended.

A decoder that hangs, hangs in C: neither a thread nor a signal handler of Python's ends it, and a crash of it
takes its process along. So each process that decodes keeps a second one that does it on its behalf, starts it
when it is first needed, kills it when a file takes too long, and starts another for the next file.
Takes no torch, which the second process would load for nothing.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from llava.data.containers import check_complete
from llava.data.images import AnimatedPicture, FrameFiles, is_picture_file, list_frames, open_picture
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits, check_file
from llava.data.video import Video, frame_rate, is_constant, last_frame_seconds, open_video
from llava.data.worker_pool import READY, start_python, take_standard_output
from llava.storage import find_cause, says_io_error


@dataclass(frozen=True)
class FrameRequest:
    """Which frames of a file are wanted.

    Attributes:
        path: the file; one with several video streams gives its main one.
        num_frames: how many frames, evenly spread from the first to the last.
        fps: above zero, so many a second instead, at most ``max_frames``.
        max_frames: see ``fps``; 0 sets no bound but the frames that there are.
        split: first and last frame of the part to sample from; by default the whole clip.
        limits: how large the file and its frames may be.
        frame_files: the frames of a clip that is given as them; ``path`` is the first.
        frame_rate: frames a second of such a clip, or of a folder of frames; 0 where it is not known.
    """

    path: str
    num_frames: int
    fps: float = 0.0
    max_frames: int = 32
    split: tuple[int, int] | None = None
    limits: MediaLimits = DEFAULT_LIMITS
    frame_files: tuple[str, ...] = ()
    frame_rate: float = 0.0


@dataclass(frozen=True)
class Frames:
    """Frames of a clip, as ``SampledVideo`` of ``media.py`` has them, with ``pixels`` for its ``frames``."""

    pixels: NDArray[np.uint8]
    indices: tuple[int, ...]
    times: tuple[float, ...]
    duration: float


def decode_frames(request: FrameRequest) -> Frames:
    """Decode the frames that a request asks for.

    Raises:
        MediaError: the file is missing, broken, cut off, too large or no video, or ends before ``split`` does.
    """
    try:
        return _decode(request)
    except MediaError as error:
        if not says_io_error(error):
            raise
        # The disk may do better, and this file, which may as well be damaged, be read now.
        return _decode(request)


def _decode(request: FrameRequest) -> Frames:
    with _open_clip(request) as clip:
        while True:
            times = clip.times
            indices = choose_frames(times, clip.fps, request)
            pixels = clip.read(indices)
            if pixels is not None:
                return Frames(pixels, tuple(indices), tuple(times[i] for i in indices), clip.duration)


def read_times(path: str) -> tuple[Sequence[float], float]:
    """Seconds of each frame of a clip from its first one, and the seconds that it lasts; a MediaError as above."""
    with _open_clip(FrameRequest(path, num_frames=1)) as clip:
        return clip.times, clip.duration


@contextlib.contextmanager
def _open_clip(request: FrameRequest) -> Iterator[Video | FrameFiles | AnimatedPicture]:
    """Open a clip of any kind; what goes wrong within the ``with`` becomes a MediaError that names the file."""
    path, files = request.path, list(request.frame_files)
    try:
        if not files and os.path.isdir(path):
            files = list_frames(path)
        if files:
            if request.fps > 0 and not request.frame_rate:
                raise ValueError("it is given as frames without their rate, and --video_fps is set; give meta.fps")
            yield FrameFiles(files, request.frame_rate, request.limits)
        elif is_picture_file(path):
            with open_picture(path, request.limits) as (image, animation):
                yield AnimatedPicture(image, animation, request.limits)
        else:
            check_complete(*check_file(path))
            with open_video(path, request.limits) as video:
                yield video
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be decoded as a video: {error}") from error


def choose_frames(times: Sequence[float], clip_fps: float, request: FrameRequest) -> list[int]:
    """Indices of the frames to sample, ascending; a clip shorter than asked for repeats frames.

    Where the frame rate varies, frames are chosen by their times: those nearest to times that lie evenly.

    Args:
        times: seconds of each frame of the clip.
        clip_fps: its frames a second.
        request: how many are wanted, and from which part.
    """
    first, last = request.split or (0, len(times) - 1)
    if not 0 <= first <= last < len(times):
        raise ValueError(f"its frames are 0 to {len(times) - 1}, but meta.split asks for {first} to {last}")
    shown, fps = times[first : last + 1], request.fps
    constant = is_constant(shown)
    wanted = num_frames = request.num_frames
    if fps > 0:
        if constant:
            seconds = len(shown) / frame_rate(shown, clip_fps)
        else:
            seconds = shown[-1] - shown[0] + last_frame_seconds(shown, clip_fps)
        wanted = max(round(seconds * fps), 1)
        num_frames = min(wanted, request.max_frames or len(shown))
    if constant:
        # LLaVA's sampling: evenly from the first frame to the last, both included.
        return np.linspace(first, last, num_frames).round().astype(int).tolist()
    even = np.linspace(shown[0], shown[-1], num_frames)
    if fps > 0 and num_frames == wanted:  # no bound was met: one frame every 1 / fps seconds
        even = (shown[0] + np.arange(wanted) / fps).clip(max=shown[-1])
    return [first + place for place in nearest(shown, even.tolist())]


def nearest(times: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """For each wanted time the position of the nearest one; of two that are as near, the earlier."""
    known = np.asarray(times)
    after = np.searchsorted(known, wanted).clip(0, len(known) - 1)
    before = (after - 1).clip(0)
    is_before = np.asarray(wanted) - known[before] <= known[after] - np.asarray(wanted)
    return np.where(is_before, before, after).tolist()  # type: ignore[no-any-return]


# The process that decodes for this one.

_START_LIMIT = 300.0
_GRACE = 5.0
_PIPE_BYTES = 1 << 20


class DecoderProcess:
    """A process that decodes, one file at a time, and ends with the process that made it.

    A request is a line of JSON on its standard input. The reply is a line of JSON on its standard output, behind which
    come the bytes of the frames.
    """

    def __init__(self) -> None:
        self._process = start_python(main, pipesize=_PIPE_BYTES)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        line = self._read_line(_START_LIMIT)
        while line and not line.endswith(READY):
            line = self._replies.readline()
        if not line:
            raise RuntimeError(f"the decoder process did not start: it ended with status {self.end(_GRACE)}")

    def decode(self, request: FrameRequest, timeout: float) -> Frames:
        """As ``decode_frames``, within ``timeout`` seconds.

        Raises:
            MediaError: also where decoding took too long or brought the process down, which is then no more.
        """
        # The child ends itself a little later, should nobody be there any more to kill it.
        also = {"limit": timeout + _GRACE, "folder": _current_folder()}
        line = json.dumps(asdict(request) | also).encode() + b"\n"
        try:
            self._requests.write(line)
            self._requests.flush()
            header = self._read_line(timeout)
        except BrokenPipeError:
            header = b""
        except TimeoutError as error:
            cause: OSError = error
            if _waits_for_a_disk(self._process.pid):  # The file is not to blame, and nor is the decoder.
                cause = OSError(errno.ETIMEDOUT, f"its disk gave nothing within {timeout:g} s", request.path)
            self._process.kill()  # First: whoever still waits for its reply then has it.
            self.end()
            raise MediaError(f"{request.path}: decoding it takes longer than --decode_timeout {timeout:g} s") from cause
        if not header.endswith(b"\n"):
            raise self._crashed(request)
        reply = json.loads(header)
        if "error" in reply:
            raise MediaError(reply["error"]) from (OSError(*reply["cause"]) if reply["cause"] else None)
        # Read straight into the array: frames of gigabytes are not held twice.
        pixels = np.empty(reply.pop("pixels"), np.uint8)
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
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(patience)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_GRACE)
        # It waits for a disk, which no signal ends, and will go when that answers.
        return -getattr(signal, "SIGKILL", signal.SIGTERM)

    def forget(self) -> None:
        """Close this process's ends of the pipes."""
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(BrokenPipeError):  # a request that was never read
                pipe.close()


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # It was removed: no relative path means anything.
        return os.sep


def _waits_for_a_disk(pid: int) -> bool:
    """Whether a thread of a process is in the system's hands, which a disk has not answered; False where not told."""
    # /proc/PID/task/THREAD/stat: number, (name), state, ...; D is an uninterruptible wait.
    for stat in glob.glob(f"/proc/{pid}/task/*/stat"):  # noqa: PTH207
        with contextlib.suppress(OSError), open(stat, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            if file.read().rpartition(")")[2].split()[:1] == ["D"]:
                return True
    return False


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


def main() -> None:
    """Answer requests until there are no more."""
    replies = take_standard_output()
    # Without a handler of Python's, so that it ends even a decoder that never comes back from C, and though
    # the process that asked, which watches the clock itself, may be gone.
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What the first file would import otherwise, at the expense of its time.
    import av  # noqa: F401

    if importlib.util.find_spec("decord") is not None:
        import decord  # noqa: F401
    with contextlib.suppress(BrokenPipeError):  # The process that asked is gone.
        replies.write(READY)
        replies.flush()
        for line in sys.stdin.buffer:
            request = json.loads(line)
            _end_after(request.pop("limit"))
            with contextlib.suppress(OSError):  # Paths may be relative, to where whoever asks is now.
                os.chdir(request.pop("folder"))
            _answer(FrameRequest(**request | {"limits": MediaLimits(**request["limits"])}), replies)
            _end_after(0)


def _end_after(seconds: float) -> None:
    """Let the system end this process then, unless it is asked again; 0 calls it off. Windows knows no such thing."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(request: FrameRequest, replies: BinaryIO) -> None:
    """Write a line of JSON and, behind it, the bytes of the pixels if there are any."""
    frames = None
    try:
        frames = decode_frames(request)
        header = vars(frames) | {"pixels": frames.pixels.shape}
    except MediaError as error:
        cause = find_cause(error)
        told = None if cause is None else (cause.errno, cause.strerror, cause.filename or request.path)
        header = {"error": str(error), "cause": told}
    except MemoryError:
        header = {"error": f"{request.path}: its frames do not fit into memory", "cause": None}
    replies.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        replies.write(np.ascontiguousarray(frames.pixels).data)
    replies.flush()
