"""An open video: its frames' times, how they are shown, and their pixels from one of two decoders.

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
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llava.data.containers import open_container
from llava.data.media_files import DEFAULT_LIMITS, MediaLimits
from llava.data.video_index import VideoIndex, check_packet, check_times, decode_start, index_packets

if TYPE_CHECKING:
    from fractions import Fraction

    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

# Cut at the right place they look whole; only their last pictures show it.
_WITHOUT_LENGTH = ("mpegts", "mpeg", "mpegvideo", "nut", "mxf")
# By name decord guesses as libav does: others may stand for several files.
_DECORD_NAMES = (".mp4", ".m4v", ".mov", ".mkv")
_LEAST_DECODED = 0.9
"""Share of the frames of a whole clip that can be decoded; a few may be hidden by means that packets do not show."""


class Video:
    """An open video file and its main stream.

    Attributes:
        fps: average frames a second.
        times: seconds of each frame from the first one; their number is the number of frames.
    """

    def __init__(self, path: str, container: InputContainer, limits: MediaLimits = DEFAULT_LIMITS) -> None:
        self._path, self._container, self._limits = path, container, limits
        self._stream = stream = self._open_stream(container)
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
        check_times(self.duration, container, stream)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last.

        It is shown as long as an average one; where the frame rate varies, as long as the one before it.
        """
        return self.times[-1] + last_frame_seconds(self.times, self.fps)

    def _open_stream(self, container: InputContainer) -> VideoStream:
        """The main stream, with its decoder set up; a ValueError if its frames are too large."""
        stream = _main_stream(container)
        stream.thread_type = "NONE"
        context = stream.codec_context
        self._limits.check_picture(context.width or 0, context.height or 0)
        # The frames may be of another size than the container declares. The decoder counts its margins too.
        context.options = {"max_pixels": str(2 * self._limits.max_image_pixels)}
        return stream

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

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8] | None:
        """Decode frames: those that a decode of all the file shows at these places.

        Args:
            indices: ascending; one that repeats gives its frame again.

        Returns:
            (frames, height, width, 3), upright, with square pixels; None where what the packets said of the frames has
            proved wrong: ``times`` are made anew then, for other indices to be chosen.
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
            if self._count_again():
                return None
        return np.stack(self._pick_frames(indices))

    def _count_again(self) -> bool:
        """Decode all frames to see which there are, and whether they are others than the packets have promised."""
        promised, self._index = len(self.times), None
        times = self._seconds()
        if len(times) < _LEAST_DECODED * promised:
            raise ValueError(f"it is damaged: it has {promised} frames, of which {len(times)} can be decoded")
        is_new = times != self.times
        if is_new:
            self.times, self.fps = times, frame_rate(times, self._declared_rate)
        return is_new

    def _decord_is_exact(self, index: VideoIndex) -> bool:
        context = self._stream.codec_context
        container = self._container.format.name.split(",")[0]
        turned = container == "mov" and self._display.is_turned  # which decord turns upright itself
        return (
            index.plain
            and container in ("mov", "matroska")
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
        frame: VideoFrame | None = None
        decoded: Iterator[VideoFrame] = iter(())
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
            assert frame is not None
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

    def _decode_from(self, index: VideoIndex, key: int) -> Iterator[VideoFrame]:
        """The frames from a place on at which decoding may begin."""
        for packet in self._packets_from(index, key):
            for frame in packet.decode():
                if frame.pts is None or frame.pts >= max(index.keys[key], index.times[0]):
                    yield frame

    def _packets_from(self, index: VideoIndex, key: int) -> Iterator[Packet[VideoStream]]:
        """The packets from a key frame on, wherever seeking leads; a _SeekError if it leads behind that frame."""
        import av

        # Containers look for either of a packet's two times. Some are sought by bytes and land anywhere; some know
        # no key frames; the beginning of the file is found always.
        wanted = index.keys[key], index.key_sizes[key]
        for target, any_frame in (
            (index.keys[key], False), (index.key_targets[key], False), (index.key_targets[key], True),
            (index.key_targets[0], False), (index.key_targets[0], True),
        ):  # fmt: skip
            try:
                self._container.seek(target, stream=self._stream, any_frame=any_frame)
            except (av.error.PermissionError, av.error.InvalidDataError, av.error.OSError, av.error.EOFError):
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

    def _decode_all(self) -> Iterator[VideoFrame]:
        codec = self._stream.codec_context.codec.canonical_name
        with open_container(self._path) as container:
            stream = self._open_stream(container)
            count = 0
            self._display.begin(0)
            for packet in container.demux(stream):
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
        raise ValueError(f"frame {min(wanted - set(found))} is asked for, but {i + 1} can be decoded")


class _SeekError(Exception):
    """A file in which seeking does not lead to the frame; decoding it from the beginning may."""


def _main_stream(container: InputContainer) -> VideoStream:
    """The video stream that players show; a ValueError if there is none."""
    # A record's or film's cover is a stream of one picture.
    streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
    if not streams:
        raise ValueError(
            "it has no video stream, only a cover picture" if container.streams.video else "it has no video stream"
        )
    best = container.streams.best("video")
    stream = next((s for s in streams if s == best), streams[0])
    if stream.codec_context is None:
        raise ValueError("its video stream is of an unknown kind")
    return stream


@contextmanager
def open_video(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[Video]:
    """Open a video; a ValueError, without the path, if it is none, is broken, or exceeds the limits."""
    import av

    try:
        with open_container(path) as container:
            yield Video(path, container, limits)
    except av.FFmpegError as error:
        raise ValueError(str(error.strerror)) from error


# When frames are shown, in seconds, and which of them lie nearest to given times.

_RESTART_SECONDS = 1.0
"""A time that is so much before the latest one begins another clip, which was joined to the one before it."""
_SAME_RATE, _ROUNDING = 0.01, 0.0011


def seconds_of(times: Sequence[int | None], unit: float, rate: float) -> list[float]:
    """Seconds of each frame from the first one, ascending.

    Frames without a time, or with one that was there already, lie evenly between their neighbours.

    Args:
        times: of frames in the order in which they are shown.
        unit: seconds that a time counts.
        rate: frames a second, for the frames before the first known time and behind the last; 0 where it is not known.
    """
    known = [time for time in times if time is not None]
    if len(known) == len(times) and all(a < b for a, b in pairwise(known)):
        return [float((time - known[0]) * unit) for time in known]
    gaps = np.diff(known)
    step = 1 / rate if rate else float(np.median(gaps[gaps > 0])) * unit if (gaps > 0).any() else 1.0
    places: list[int] = []
    seconds: list[float] = []
    shift = 0.0
    for place, time in enumerate(times):
        if time is None:
            continue
        second = time * unit + shift
        if seconds and second <= seconds[-1]:
            if seconds[-1] - second < _RESTART_SECONDS:
                continue
            shift += seconds[-1] + step * (place - places[-1]) - second
            second = time * unit + shift
        places.append(place)
        seconds.append(second)
    if not places:
        return [step * i for i in range(len(times))]
    before = [seconds[0] - step * (places[0] - i) for i in range(places[0])]
    after = [seconds[-1] + step * (i - places[-1]) for i in range(places[-1] + 1, len(times))]
    between = np.interp(range(places[0], places[-1] + 1), places, seconds).tolist()
    first, *others = [*before, *between, *after]
    return [0.0, *(second - first for second in others)]


def frame_rate(times: Sequence[float], declared: float) -> float:
    """Frames a second on average: what the container declares where the frames' times agree with it."""
    if len(times) < 2 or times[-1] <= times[0]:
        return declared or 1.0
    gaps, seconds = len(times) - 1, times[-1] - times[0]
    # Matroska rounds times to milliseconds.
    if declared and abs(gaps / declared - seconds) <= max(_SAME_RATE * seconds, _ROUNDING):
        return declared
    return gaps / seconds


def is_constant(times: Sequence[float]) -> bool:
    """Whether frames lie so evenly that counting them and looking at their times give the same frames."""
    if len(times) < 3:
        return True
    even = np.linspace(times[0], times[-1], len(times))
    step = (times[-1] - times[0]) / (len(times) - 1)
    return bool(np.abs(np.asarray(times) - even).max() <= step / 2)


def last_frame_seconds(times: Sequence[float], rate: float) -> float:
    """How long the last frame is shown: as an average one, or as the one before it where the frame rate varies."""
    return 1 / rate if is_constant(times) else times[-1] - times[-2]


# How the frames of a video are shown: upright, not mirrored, with square pixels, all of one size.

_MOST_STRETCH = 16
"""A pixel that is said to be so many times as wide as high, or more, is a damaged header."""
_AS_STORED = (1, 0, 0, 1)

Turn = tuple[int, int, int, int]
"""Where a stored pixel at (x, y) is shown: at (a x + c y, b x + d y), each of a, b, c, d being -1, 0 or 1."""


class Display:
    """How one clip is shown.

    Orientation comes with frames, from the container (MP4, MOV, Matroska) or from the stream (H.264 and HEVC, where
    only the first frame of a group may carry it, and it holds on). The shape of pixels is that of the stored picture.

    Attributes:
        size: width and height of a frame as it is shown.
        is_plain: whether frames are shown as they are stored.
        is_turned: whether they are turned, but neither mirrored nor stretched.
    """

    def __init__(self, first: VideoFrame, pixel_ratio: Fraction | None) -> None:
        self._stored = (first.width, first.height)
        self._width = first.width
        if pixel_ratio:
            if not 1 / _MOST_STRETCH <= pixel_ratio <= _MOST_STRETCH:
                raise ValueError(f"its pixels are said to be {float(pixel_ratio):g} times as wide as high")
            self._width = max(round(first.width * float(pixel_ratio)), 1)
        self._is_start = True
        self._first_turn = self._turn = _read_turn(first) or _AS_STORED
        a, b, c, d = self._turn
        self.size = (first.height, self._width) if a == 0 else (self._width, first.height)
        is_stretched = self._width != first.width
        self.is_plain = self._turn == _AS_STORED and not is_stretched
        self.is_turned = a * d - b * c == 1 and not is_stretched  # the determinant of a mirrored picture is -1

    def begin(self, place: int) -> None:
        """Say that frames follow from a place of the clip on, where decoding begins."""
        self._turn, self._is_start = self._first_turn, place == 0

    def follow(self, frame: VideoFrame, index: int) -> None:
        """Look at a frame, in the order in which they are decoded; a ValueError if it is damaged or of another size."""
        if frame.is_corrupt and not self._is_start:
            raise ValueError(f"frame {index} is damaged: the file was cut off there, or not copied as it was")
        # A recording that begins in the middle begins with pictures that lack what came before.
        self._is_start = self._is_start and frame.is_corrupt
        size = (frame.width, frame.height)
        if size != self._stored:
            raise ValueError(
                f"its picture changes size on the way, from {self._stored[0]} x {self._stored[1]} to {size[0]} x "
                f"{size[1]} at frame {index}; re-encode it to one size"
            )
        self._turn = _read_turn(frame) or self._turn
        if (self._turn[0] == 0) != (self._first_turn[0] == 0):
            raise ValueError(f"its picture is turned to its side on the way, at frame {index}; cut it into two clips")

    def show(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """The frame that was followed last, as (height, width, 3)."""
        if self._width != self._stored[0]:
            frame = frame.reformat(width=self._width, height=self._stored[1], format="rgb24", interpolation="BICUBIC")
        pixels: NDArray[np.uint8] = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        a, b, c, d = self._turn
        if a == 0:
            pixels = pixels.swapaxes(0, 1)
        # Rows run along y, columns along x; the sign that is not zero says which way.
        return pixels[:: b + d, :: a + c]


def _read_turn(frame: VideoFrame) -> Turn | None:
    """How a frame is to be shown, to the nearest quarter turn; None where it does not say."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    # The first two rows of a matrix of 3 x 3 (ISO/IEC 14496-12, 6.2.2), whose last column is not needed.
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (_sign(a), 0, 0, _sign(d)) if a and d else None
    return 0, _sign(b), _sign(c), 0


def _sign(number: int) -> int:
    return 1 if number >= 0 else -1
