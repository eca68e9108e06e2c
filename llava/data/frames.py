"""Which frames of a video are sampled, and their pixels. Takes no torch: the decoder process imports it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava.data.files import MediaError, check_file
from llava.data.limits import DEFAULT_LIMITS, MediaLimits
from llava.data.truncation import check_complete
from llava.data.video_backends import open_video


@dataclass(frozen=True)
class FrameRequest:
    """Which frames of a file are wanted.

    Attributes:
        path: the file; one with several video streams gives its main one.
        num_frames: how many frames, evenly spread from the first to the last.
        fps: above zero, so many a second instead, at most ``max_frames``.
        max_frames: see ``fps``.
        split: first and last frame of the part to sample from; by default the whole clip.
        limits: how large the file and its frames may be.
    """

    path: str
    num_frames: int
    fps: float = 0.0
    max_frames: int = 32
    split: tuple[int, int] | None = None
    limits: MediaLimits = DEFAULT_LIMITS


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
    path = request.path
    size = check_file(path)
    try:
        check_complete(path, size)
        with open_video(path, request.limits) as video:
            indices = choose_frames(
                len(video.times), video.fps, request.num_frames, request.fps, request.max_frames, request.split
            )
            return Frames(video.read(indices), tuple(indices), tuple(video.times[i] for i in indices), video.duration)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be decoded as a video: {error}") from error


def choose_frames(
    length: int, clip_fps: float, num_frames: int, fps: float, max_frames: int, split: tuple[int, int] | None
) -> list[int]:
    """Indices of the frames to sample, ascending; a clip shorter than asked for repeats frames.

    Args:
        length: frames of the clip.
        clip_fps: its frames a second.
        num_frames, fps, max_frames, split: as in ``FrameRequest``.
    """
    first, last = split or (0, length - 1)
    if not 0 <= first <= last < length:
        raise ValueError(f"its frames are 0 to {length - 1}, but meta.split asks for {first} to {last}")
    if fps > 0:
        num_frames = min(max(round((last - first + 1) / clip_fps * fps), 1), max_frames)
    return np.linspace(first, last, num_frames).round().astype(int).tolist()
