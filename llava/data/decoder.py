"""The decoder process: reads requests from its standard input and writes frames to its standard output.

A request is a line of JSON with the fields of ``FrameRequest`` and ``limit``, in seconds. The reply is a line
of JSON, {"error": message}, or {"shape", "indices", "times", "duration"} followed by the bytes of the pixels.
Before the first request the process says ``READY``. It ends with its input, which ends with the process that asks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, BinaryIO

from llava.data.files import MediaError
from llava.data.frames import FrameRequest, decode_frames
from llava.data.limits import MediaLimits
from llava.data.video_backends import import_decoders

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
