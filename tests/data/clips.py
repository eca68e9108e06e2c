"""Clips that tests write: every frame carries its number, so that a wrong one can be named."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from llava.data.video import open_video

ONE = 1 << 16
"""The 1 of a display matrix."""


def stamp(number: int, width: int = 160, height: int = 96) -> NDArray[np.uint8]:
    """A picture with a number in eight blocks along its top, and a red corner at the bottom left."""
    image = np.full((height, width, 3), 110, np.uint8)
    block = width // 8
    for k in range(8):
        image[: height // 3, k * block : (k + 1) * block] = 230 if number >> k & 1 else 20
    image[2 * height // 3 :, : width // 4] = (200, 30, 30)
    return image


def number_of(image: NDArray[np.uint8]) -> int:
    """The number that ``stamp`` wrote."""
    height, width = image.shape[:2]
    block, rows = width // 8, slice(height // 12, height // 4)
    means = (image[rows, k * block + block // 4 : (k + 1) * block - block // 4].mean() for k in range(8))
    return sum(int(mean > 125) << k for k, mean in enumerate(means))


def encode(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    numbers: Iterable[int] = range(60),
    *,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (160, 96),
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    pixel_ratio: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """A clip of stamped frames; a codec that this PyAV does not have skips the test."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w", options=container_options or {}, format=format) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if pixel_ratio is not None:
            stream.codec_context.sample_aspect_ratio = pixel_ratio
        if times is not None:
            stream.codec_context.time_base = time_base
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(stamp(number, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[place], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy_packets(
    source: Path, target: Path, change: Callable[[list[Any]], Iterable[Any]] | None = None, **options: Any
) -> Path:
    """The packets of a clip in another container, or others in their place."""
    with av.open(str(source)) as reader, av.open(str(target), "w", **options) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets: Iterable[Any] = [packet for packet in reader.demux(video=0) if packet.size]
        for packet in packets if change is None else change(list(packets)):
            packet.stream = stream
            writer.mux(packet)
    return target


def filter_packets(source: Path, target: Path, bitstream_filter: str) -> Path:
    """The packets of a clip behind a bitstream filter of FFmpeg's."""
    from av.bitstream import BitStreamFilterContext

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        filtered = BitStreamFilterContext(bitstream_filter, reader.streams.video[0], stream)
        for packet in [p for p in reader.demux(video=0) if p.size] + [None]:
            for changed in filtered.filter(packet):
                changed.stream = stream
                writer.mux(changed)
    return target


def replace_box(source: Path, target: Path, kind: bytes, other: bytes) -> Path:
    """An MP4 whose first box of a kind is called otherwise."""
    data = bytearray(source.read_bytes())
    place = data.index(kind)
    data[place : place + 4] = other
    target.write_bytes(data)
    return target


def with_matrix(source: Path, target: Path, matrix: Sequence[int]) -> Path:
    """An MP4 with another display matrix."""
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") - 4
    data[place + 48 : place + 84] = struct.pack(">9i", *matrix)
    target.write_bytes(data)
    return target


def decode_all(path: Path) -> list[int]:
    """The numbers of all frames, decoded from the first to the last by PyAV alone."""
    numbers = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                numbers += [number_of(frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
            except av.error.InvalidDataError:
                if numbers:
                    raise
    return numbers


def read_one(path: Path, index: int) -> int:
    """The number of a frame that is asked for alone, in a file that is opened for it."""
    with open_video(str(path)) as video:
        return number_of(video.read([index])[0])


def read_singly(path: Path, count: int) -> list[int]:
    """The numbers of all frames, each asked for alone."""
    return [read_one(path, i) for i in range(count)]
