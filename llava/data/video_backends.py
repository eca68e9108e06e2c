"""Two decoders behind one interface: decord where it is exact, PyAV for the rest.

decord reads random frames of H.264 exactly and fast. It is off by a frame on some HEVC, cannot open
AV1 and changes the values of 10-bit video, so those (and whatever it fails to open) go to PyAV.
Readers are opened, used and closed in one place: one carried across a fork hangs the worker.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np

logger = logging.getLogger(__name__)

DECODE_ERRORS = (OSError, ValueError, RuntimeError, av.FFmpegError)
"""What the decoders raise; decord's own error is a RuntimeError."""

_DECORD_CODECS = ("h264", "mpeg4", "vp8", "vp9", "mpeg2video", "mjpeg")


class VideoReader(ABC):
    """An open video. ``len`` is its number of frames, ``fps`` its average frame rate."""

    fps: float

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: list[int]) -> np.ndarray:
        """Frames at ascending indices, upright, uint8 (frames, height, width, 3)."""


@contextmanager
def open_video(path: str) -> Iterator[VideoReader]:
    """Open a video with the decoder that reads it exactly."""
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        if not _decord_is_exact(container):
            yield AvReader(container)
            return
        try:
            reader: VideoReader = DecordReader(path)
        except RuntimeError as error:
            logger.debug("decord cannot open %s, PyAV takes over: %s", path, error)
            reader = AvReader(container)
        yield reader


def _decord_is_exact(container: Any) -> bool:
    codec = container.streams.best("video").codec_context
    eight_bits = codec.pix_fmt is not None and not codec.pix_fmt.endswith(("le", "be"))
    return codec.name in _DECORD_CODECS and eight_bits and importlib.util.find_spec("decord") is not None


class DecordReader(VideoReader):
    def __init__(self, path: str) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._reader = decord.VideoReader(path, num_threads=1)
        self.fps = float(self._reader.get_avg_fps()) or 1.0
        if len(self._reader) == 0:
            raise ValueError("it has no frames")

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, indices: list[int]) -> np.ndarray:
        return self._reader.get_batch(indices).asnumpy()


class AvReader(VideoReader):
    """Random access by timestamp: packets are listed without decoding, then frames sought.

    Args:
        container: an open PyAV container, which the caller closes.
    """

    def __init__(self, container: Any) -> None:
        self._container = container
        self._stream = container.streams.best("video")
        self._stream.thread_type = "NONE"
        self._times = sorted({p.pts for p in container.demux(self._stream) if p.pts is not None and not p.is_discard})
        if not self._times:
            raise ValueError("it has no frames")
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 1)

    def __len__(self) -> int:
        return len(self._times)

    def read(self, indices: list[int]) -> np.ndarray:
        return np.stack([self._upright(frame) for frame in self._frames(indices)])

    def _frames(self, indices: list[int]) -> Iterator[Any]:
        """The frames at ascending indices; seeks where the next one lies behind another key frame."""
        frame, decoded = None, iter(())
        for index in indices:
            wanted = self._times[index]
            if frame is None or frame.pts != wanted:
                self._container.seek(wanted, stream=self._stream)
                decoded = self._container.decode(self._stream)
                frame = next((f for f in decoded if f.pts is not None and f.pts >= wanted), None)
            if frame is None or frame.pts != wanted:
                raise ValueError(f"frame {index} of {len(self)} cannot be decoded")
            yield frame

    @staticmethod
    def _upright(frame: Any) -> np.ndarray:
        return np.rot90(frame.to_ndarray(format="rgb24"), k=(frame.rotation // 90) % 4)
