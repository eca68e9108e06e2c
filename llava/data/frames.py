"""Which frames of a video are sampled, and their pixels. Takes no torch: the decoder process imports it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava.data.files import MediaError, check_file
from llava.data.image_clips import AnimatedPicture, FrameFiles, is_picture_file, list_frames, open_animation
from llava.data.limits import DEFAULT_LIMITS, MediaLimits
from llava.data.truncation import check_complete
from llava.data.video_backends import MissingFrameError, Video, open_video
from llava.data.video_times import frame_rate, is_constant, last_frame_seconds, nearest


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
        frame_rate: frames a second of such a clip, or of a folder of frames; 0 where nobody has said.
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
    path = request.path
    try:
        with _open_clip(request) as video:
            pixels = None
            while pixels is None:
                times = video.times
                indices = choose_frames(
                    len(times), video.fps, request.num_frames, request.fps, request.max_frames, request.split, times
                )
                try:
                    pixels = video.read(indices)
                except MissingFrameError:
                    if video.times is times:
                        raise
                if video.times is not times:  # decoding has shown other frames than the packets spoke of
                    pixels = None
            return Frames(pixels, tuple(indices), tuple(times[i] for i in indices), video.duration)
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be decoded as a video: {error}") from error


def read_times(path: str) -> tuple[Sequence[float], float]:
    """Seconds of each frame of a clip from its first one, and the seconds that all of it lasts.

    Raises:
        MediaError: the file is missing, or cannot be read as a clip.
    """
    try:
        with _open_clip(FrameRequest(path, num_frames=1)) as video:
            return video.times, video.duration
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be read as a video: {error}") from error


@contextmanager
def _open_clip(request: FrameRequest) -> Iterator[Video | FrameFiles | AnimatedPicture]:
    """Open a clip of any kind: a video, a folder or a list of frames, or an animated picture."""
    path, files = request.path, list(request.frame_files)
    if not files and os.path.isdir(path):
        files = list_frames(path)
    if files:
        if request.fps > 0 and not request.frame_rate:
            raise ValueError("it is given as frames without their rate, and --video_fps is set; give meta.fps")
        yield FrameFiles(files, request.frame_rate, request.limits)
    elif is_picture_file(path):
        with open_animation(path, request.limits) as animation:
            yield animation
    else:
        check_complete(path, check_file(path))
        with open_video(path, request.limits) as video:
            yield video


def choose_frames(
    length: int,
    clip_fps: float,
    num_frames: int,
    fps: float,
    max_frames: int,
    split: tuple[int, int] | None,
    times: Sequence[float] | None = None,
) -> list[int]:
    """Indices of the frames to sample, ascending; a clip shorter than asked for repeats frames.

    Where the frame rate varies, frames are chosen by their times: those nearest to times that lie evenly.

    Args:
        length: frames of the clip.
        clip_fps: its frames a second.
        num_frames, fps, max_frames, split: as in ``FrameRequest``.
        times: seconds of each frame; None for a clip of a constant frame rate.
    """
    first, last = split or (0, length - 1)
    if not 0 <= first <= last < length:
        raise ValueError(f"its frames are 0 to {length - 1}, but meta.split asks for {first} to {last}")
    shown = times[first : last + 1] if times is not None else []
    constant = is_constant(shown)
    wanted = num_frames
    if fps > 0:
        seconds = (last - first + 1) / (frame_rate(shown, clip_fps) if shown else clip_fps)
        if not constant:
            seconds = shown[-1] - shown[0] + last_frame_seconds(shown, clip_fps)
        wanted = max(round(seconds * fps), 1)
        num_frames = min(wanted, max_frames or last - first + 1)
    if constant:
        return np.linspace(first, last, num_frames).round().astype(int).tolist()
    even = np.linspace(shown[0], shown[-1], num_frames)
    if fps > 0 and num_frames == wanted:
        even = (shown[0] + np.arange(wanted) / fps).clip(max=shown[-1])
    return [first + place for place in nearest(shown, even.tolist())]
