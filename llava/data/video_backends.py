"""Two decoders behind one function: decord where it is exact, PyAV for the rest.

decord reads random frames of an ordinary H.264 file exactly and fast. It is off by frames, without a
word, where groups of frames are open, in MPEG-2, MPEG-4 and WMV, in AVI and transport streams and in
some HEVC; it cannot open AV1 and changes the values of 10-bit video. So the packets are looked at
first, and whatever is not plain (or fails in decord) goes to PyAV.
Files are opened, used and closed in one place: a reader carried across a fork hangs the worker.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava.data.limits import DEFAULT_LIMITS, MediaLimits
from llava.data.video_index import VideoIndex, index_packets

logger = logging.getLogger(__name__)

_DECORD_CODECS = ("h264", "libvpx", "vp8", "vp9")
# Files that name other files, which may lie anywhere.
_PLAYLISTS = {"hls", "applehttp", "concat", "dash", "imf"}
_DECORD_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


class Video:
    """An open video file and its main stream.

    Attributes:
        fps: average frames a second.
        times: seconds of each frame from the first one; their number is the number of frames.
    """

    def __init__(self, path: str, container: Any, limits: MediaLimits = DEFAULT_LIMITS) -> None:
        if _PLAYLISTS & set(container.format.name.split(",")):
            raise ValueError("it is a list of other files, not a video")
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("it has no video stream")
        if stream.codec_context is None:
            raise ValueError("its video stream is of an unknown kind")
        self._path, self._container, self._stream, self._limits = path, container, stream, limits
        self._prepare(stream)
        self._index = index_packets(container, stream, limits)
        self.fps = float(stream.average_rate or stream.guessed_rate or 1)
        self.times = self._seconds()
        if not self.times:
            raise ValueError("it has no frames")

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which is shown as long as an average one."""
        return self.times[-1] + 1 / self.fps

    def _prepare(self, stream: Any) -> None:
        """Set up the decoder of a stream; a ValueError if its frames are too large."""
        stream.thread_type = "NONE"
        self._limits.check_picture(*self._size)
        # The frames themselves may be of another size than the container declares.
        stream.codec_context.options = {"max_pixels": str(self._limits.max_image_pixels)}

    @property
    def _size(self) -> tuple[int, int]:
        """Width and height that the container declares, 0 where it does not say."""
        return self._stream.codec_context.width or 0, self._stream.codec_context.height or 0

    def _seconds(self) -> list[float]:
        if self._index is not None:
            times: list[int | None] = list(self._index.times)
        else:
            times = []
            for frame in self._decode_all():
                times.append(frame.pts)
                self._limits.check_length(len(times))
        known = [time for time in times if time is not None]
        if len(known) < len(times) or sorted(set(known)) != known:
            return [i / self.fps for i in range(len(times))]
        return [float((time - known[0]) * self._stream.time_base) for time in known]

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Decode frames.

        Args:
            indices: ascending; one that repeats gives its frame again.

        Returns:
            (frames, height, width, 3), upright.
        """
        self._limits.check_frames(len(indices), *self._size)
        if self._decord_is_exact():
            frames = _read_with_decord(self._path, indices, len(self.times))
            if frames is not None:
                return frames
            logger.debug("decord cannot read %s, PyAV takes over", self._path)
        try:
            return np.stack([_upright(frame) for frame in self._seek_frames(indices)])
        except _SeekError as error:
            logger.debug("%s: %s; decoding from the beginning", self._path, error)
        return np.stack([_upright(frame) for frame in self._pick_frames(indices)])

    def _decord_is_exact(self) -> bool:
        context = self._stream.codec_context
        return (
            self._index is not None
            and self._index.plain
            and self._container.format.name in _DECORD_FORMATS
            and len(self._container.streams.video) == 1
            and context.name in _DECORD_CODECS
            and context.pix_fmt is not None
            and not context.pix_fmt.endswith(("le", "be"))  # more than 8 bits
            and importlib.util.find_spec("decord") is not None
        )

    def _seek_frames(self, indices: Sequence[int]) -> Iterator[Any]:
        """The frames at ascending indices; decoding goes on, or begins anew at a nearer key frame."""
        if self._index is None:
            raise _SeekError("its packets do not say when they are shown")
        frame: Any = None
        decoded: Iterator[Any] = iter(())
        group = -1
        for index in indices:
            wanted = self._index.times[index]
            if (key := self._index.key_before(wanted)) > group:
                decoded, group, frame = self._decode_from(self._index, key), key, None
            if frame is None or frame.pts != wanted:
                frame = next((f for f in decoded if f.pts is not None and f.pts >= wanted), None)
            if frame is None or frame.pts != wanted:
                raise _SeekError(f"frame {index} does not turn up")
            yield frame

    def _decode_from(self, index: VideoIndex, key: int) -> Iterator[Any]:
        # Containers look for either of a packet's two times. Some are sought by bytes and land between
        # key frames.
        for target in (index.keys[key], index.key_targets[key]):
            self._container.seek(target, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
            if first.is_keyframe and first.pts is not None and first.pts <= index.keys[key]:
                yield from first.decode()
                for packet in packets:
                    yield from packet.decode()
                return
        raise _SeekError(f"seeking key frame {key} leads to another place")

    def _decode_all(self) -> Iterator[Any]:
        with _open(self._path) as container:
            stream = container.streams.best("video")
            self._prepare(stream)
            yield from container.decode(stream)

    def _pick_frames(self, indices: Sequence[int]) -> list[Any]:
        wanted = set(indices)
        found: dict[int, Any] = {}
        for i, frame in enumerate(self._decode_all()):
            if i in wanted:
                found[i] = frame
            if len(found) == len(wanted):
                return [found[index] for index in indices]
        missing = min(wanted - set(found))
        raise ValueError(f"frame {missing} of {len(self.times)} cannot be decoded")


class _SeekError(Exception):
    """A file in which seeking does not lead to the frame; decoding it from the beginning may."""


@contextmanager
def open_video(path: str, limits: MediaLimits = DEFAULT_LIMITS) -> Iterator[Video]:
    """Open a video.

    Raises:
        ValueError: it is not one, is broken, or exceeds the limits; the message is one line without the path.
        OSError: it cannot be read.
    """
    import av

    try:
        with _open(path) as container:
            yield Video(path, container, limits)
    except av.FFmpegError as error:
        raise ValueError(str(error.strerror)) from error


def _open(path: str) -> Any:
    import av

    return av.open(path, metadata_errors="ignore")


def import_decoders() -> None:
    """Import what decoding the first file would import otherwise."""
    import av  # noqa: F401

    if importlib.util.find_spec("decord") is not None:
        import decord  # noqa: F401


def _read_with_decord(path: str, indices: Sequence[int], num_frames: int) -> NDArray[np.uint8] | None:
    """Frames as ``Video.read`` gives them, or None where decord fails or counts other frames."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, num_threads=1)
        return reader.get_batch(list(indices)).asnumpy() if len(reader) == num_frames else None
    except (decord.DECORDError, RuntimeError):
        return None


def _upright(frame: Any) -> NDArray[np.uint8]:
    return np.rot90(frame.to_ndarray(format="rgb24"), k=(frame.rotation // 90) % 4)
