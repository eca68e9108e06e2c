"""Two decoders behind one function: decord where it is exact, PyAV for the rest.

decord reads random frames of an ordinary H.264 file exactly and fast. It is off by frames, without a
word, where key frames are not what they are marked as, where groups of frames are open, in MPEG-2, MPEG-4 and WMV,
in AVI and transport streams and in some HEVC; it cannot open AV1 and changes the values of 10-bit video. So the
packets are looked at first, and whatever is not plain (or fails in decord) goes to PyAV.
Files are opened, used and closed in one place: a reader carried across a fork hangs the worker.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.data.images import AnimatedPicture, FrameFiles, is_picture_file, list_frames, open_animation
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits, check_file
from llava.data.packets import check_packet, open_container
from llava.data.truncation import check_complete
from llava.data.video_index import (
    Display,
    VideoIndex,
    decode_start,
    frame_rate,
    index_packets,
    is_constant,
    last_frame_seconds,
    nearest,
    seconds_of,
)

logger = logging.getLogger(__name__)

# Cut at the right place they look whole; only their last pictures show it.
_WITHOUT_LENGTH = ("mpegts", "mpeg", "mpegvideo", "nut", "mxf")
_MOV, _MATROSKA = "mov", "matroska"
# By name decord guesses as libav does: others may stand for several files.
_DECORD_NAMES = (".mp4", ".m4v", ".mov", ".mkv")


_LEAST_DECODED = 0.9
"""Share of the frames of a whole clip that can be decoded; a few may be hidden by means that packets do not show."""


class MissingFrameError(ValueError):
    """A frame that is not there."""


class Video:
    """An open video file and its main stream.

    Attributes:
        fps: average frames a second.
        times: seconds of each frame from the first one; their number is the number of frames.
    """

    def __init__(self, path: str, container: Any, limits: MediaLimits = DEFAULT_LIMITS) -> None:
        stream = _main_stream(container)
        self._path, self._container, self._stream, self._limits = path, container, stream, limits
        self._prepare(stream)
        self._index, first = index_packets(container, stream, limits)
        if first is None:
            raise ValueError("it has no frames that can be decoded")
        self._display = Display(first, stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio)
        limits.check_picture(*self._display.size)
        rate = stream.average_rate or stream.guessed_rate
        self._declared_rate = float(rate) if rate else 0.0
        self.times = self._seconds()
        if container.format.name == "mxf" and len(self.times) + 2 < (stream.duration or 0):
            raise ValueError(f"it is cut off: it speaks of {stream.duration} frames and has {len(self.times)}")
        self.fps = frame_rate(self.times, self._declared_rate)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last.

        It is shown as long as an average one; where the frame rate varies, as long as the one before it.
        """
        return self.times[-1] + last_frame_seconds(self.times, self.fps)

    def _prepare(self, stream: Any) -> None:
        """Set up the decoder of a stream; a ValueError if its frames are too large."""
        stream.thread_type = "NONE"
        context = stream.codec_context
        self._limits.check_picture(context.width or 0, context.height or 0)
        # The frames may be of another size than the container declares. The decoder counts its margins too.
        context.options = {"max_pixels": str(2 * self._limits.max_image_pixels)}

    def _seconds(self) -> list[float]:
        if self._index is not None:
            times: list[int | None] = list(self._index.times)
        else:
            times = []
            for frame in self._decode_all():
                times.append(frame.pts)
                self._limits.check_length(len(times))
        context = self._stream.codec_context
        if self._container.format.name == "avi" and context.has_b_frames and self._declared_rate:
            # It has no times, and libav's guesses do not know in which order frames are shown.
            return [i / self._declared_rate for i in range(len(times))]
        return seconds_of(times, float(self._stream.time_base or 0), self._declared_rate)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Decode frames: those that a decode of all the file shows at these places.

        What the packets said may prove wrong; then ``times`` are made anew.

        Args:
            indices: ascending; one that repeats gives its frame again.

        Returns:
            (frames, height, width, 3), upright, with square pixels.
        """
        self._limits.check_frames(len(indices), *self._display.size)
        if self._index is not None and self._decord_is_exact(self._index):
            frames = self._read_with_decord(self._index, indices)
            if frames is not None:
                return frames
            logger.debug("decord cannot read %s, PyAV takes over", self._path)
        if self._index is not None:
            try:
                return np.stack(list(self._seek_frames(self._index, indices)))
            except _SeekError as error:
                logger.debug("%s: %s; decoding from the beginning", self._path, error)
            self._count_again()
        return np.stack(self._pick_frames(indices))

    def _count_again(self) -> None:
        """Decode all frames to see which there are: what the packets said of them is wrong."""
        promised, self._index = len(self.times), None
        times = self._seconds()
        if len(times) < _LEAST_DECODED * promised:
            raise ValueError(f"it is damaged: it has {promised} frames, of which {len(times)} can be decoded")
        if times != self.times:
            self.times, self.fps = times, frame_rate(times, self._declared_rate)

    def _decord_is_exact(self, index: VideoIndex) -> bool:
        context = self._stream.codec_context
        container = self._container.format.name.split(",")[0]
        turned = container == _MOV and self._display.is_turned  # which decord turns upright itself
        return (
            index.plain
            and container in (_MOV, _MATROSKA)
            and self._path.lower().endswith(_DECORD_NAMES)
            and len(self._container.streams.video) == 1
            and context.name == "h264"
            and context.pix_fmt is not None
            and not context.pix_fmt.endswith(("le", "be"))  # more than 8 bits
            and (self._display.is_plain or turned)
            and importlib.util.find_spec("decord") is not None
        )

    def _read_with_decord(self, index: VideoIndex, indices: Sequence[int]) -> NDArray[np.uint8] | None:
        """Frames as ``read`` gives them, or None where decord fails, counts other frames or takes others for keys."""
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        try:
            # An absolute path names a file in any case, never a protocol.
            reader = decord.VideoReader(os.path.abspath(self._path), num_threads=1)
            keys = [index.times[i] for i in reader.get_key_indices() if i < len(index.times)]
            if len(reader) != len(index.times) or not set(keys) <= set(index.keys):
                return None
            frames: NDArray[np.uint8] = reader.get_batch(list(indices)).asnumpy()
        except (decord.DECORDError, RuntimeError):
            return None
        return frames if frames.shape[2:0:-1] == self._display.size else None

    def _seek_frames(self, index: VideoIndex, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at ascending indices; decoding goes on, or begins anew at a nearer key frame."""
        frame: Any = None
        decoded: Iterator[Any] = iter(())
        group, place = -1, -1
        for i in indices:
            if (key := index.key_before(index.times[i])) > group:
                decoded, group = self._decode_from(index, key), key
                place = bisect_left(index.times, index.keys[key]) - 1
                self._display.begin(place + 1)
            while place < i:
                frame, place = next(decoded, None), place + 1
                # All frames on the way are looked at: one that was left out or out of turn would shift the others.
                if frame is None or frame.pts != index.times[place]:
                    raise _SeekError(f"frame {place} does not turn up")
                self._display.follow(frame, place)
            yield self._display.show(frame)
        if self._container.format.name in _WITHOUT_LENGTH and indices and index.times[indices[-1]] >= index.keys[-1]:
            self._check_last_group(index)

    def _check_last_group(self, index: VideoIndex) -> None:
        """A ValueError if the last pictures of the file are damaged, which were decoded before the last one shown."""
        key = max(len(index.keys) - 2, 0)
        place = bisect_left(index.times, index.keys[key])
        self._display.begin(place)
        for i, frame in enumerate(self._decode_from(index, key), start=place):
            self._display.follow(frame, i)

    def _decode_from(self, index: VideoIndex, key: int) -> Iterator[Any]:
        """The frames from a place on at which decoding may begin."""
        packets = self._packets_from(index, key)
        for packet in packets:
            for frame in packet.decode():
                if frame.pts is None or frame.pts >= max(index.keys[key], index.times[0]):
                    yield frame

    def _packets_from(self, index: VideoIndex, key: int) -> Iterator[Any]:
        # Containers look for either of a packet's two times. Some are sought by bytes and land anywhere; some know
        # no key frames; the beginning of the file is found always.
        wanted = index.keys[key], index.key_sizes[key]
        for target, any_frame in (
            (index.keys[key], False), (index.key_targets[key], False), (index.key_targets[key], True),
            (index.key_targets[0], False), (index.key_targets[0], True),
        ):  # fmt: skip
            if not self._seek(target, any_frame):
                continue
            packets = self._container.demux(self._stream)
            for packet in packets:
                if (packet.pts, packet.size) == wanted:
                    yield packet
                    yield from packets
                    return
                if index.order.get((packet.pts, packet.size), -1) > index.order[wanted]:
                    break
        raise _SeekError(f"seeking key frame {key} leads to another place")

    def _seek(self, target: int, any_frame: bool) -> bool:
        import av

        try:
            self._container.seek(target, stream=self._stream, any_frame=any_frame)
        except (av.error.PermissionError, av.error.InvalidDataError, av.error.OSError, av.error.EOFError):
            return False
        return True

    def _decode_all(self) -> Iterator[Any]:
        codec = self._stream.codec_context.codec.canonical_name
        with open_container(self._path) as container:
            stream = _main_stream(container)
            self._prepare(stream)
            packets = container.demux(stream)
            count = 0
            self._display.begin(0)
            for packet in packets:
                if packet.size:
                    check_packet(packet, codec, container.format.name)
                frames = packet.decode() if count else decode_start(packet)
                for frame in frames:
                    self._display.follow(frame, count)
                    count += 1
                    yield frame

    def _pick_frames(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        wanted = set(indices)
        found: dict[int, NDArray[np.uint8]] = {}
        for i, frame in enumerate(self._decode_all()):
            if i in wanted:
                found[i] = self._display.show(frame)
            if len(found) == len(wanted):
                return [found[index] for index in indices]
        raise MissingFrameError(f"frame {min(wanted - set(found))} is asked for, but {i + 1} can be decoded")


class _SeekError(Exception):
    """A file in which seeking does not lead to the frame; decoding it from the beginning may."""


def _main_stream(container: Any) -> Any:
    """The video stream that players show; a ValueError if there is none."""
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        raise ValueError(
            "it has no video stream, only a cover picture" if container.streams.video else "it has no video stream"
        )
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise ValueError("its video stream is of an unknown kind")
    return stream


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the picture of a record's or film's cover."""
    disposition = stream.disposition
    return bool(disposition & type(disposition).attached_pic)


@contextmanager
def open_video(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[Video]:
    """Open a video.

    Raises:
        ValueError: it is not one, is broken, or exceeds the limits; the message is one line without the path.
        OSError: it cannot be read.
    """
    import av

    try:
        with open_container(path) as container:
            yield Video(path, container, limits)
    except av.FFmpegError as error:
        raise ValueError(str(error.strerror)) from error


def import_decoders() -> None:
    """Import what decoding the first file would import otherwise."""
    import av  # noqa: F401

    if importlib.util.find_spec("decord") is not None:
        import decord  # noqa: F401


# Which frames of a video are sampled, and their pixels. Takes no torch: the decoder process imports it.


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
