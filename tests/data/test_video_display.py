"""Frames come out upright, unmirrored and with square pixels, from every container and with either decoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import ONE, copy_packets, encode, filter_packets, stamp, with_matrix
from numpy.typing import NDArray

from llava.config import VisionConfig
from llava.data.media import MediaError, load_media, sample_video
from llava.data.media_files import MediaLimits
from llava.types import Media

UPRIGHT = stamp(5)
# What a matrix of a, b, c, d, and where the picture's corner then lies, makes of the stored picture.
MATRICES: dict[str, tuple[tuple[int, ...], NDArray[np.uint8]]] = {
    "upright": ((ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30), UPRIGHT),
    "mirrored": ((-ONE, 0, 0, 0, ONE, 0, 160 << 16, 0, 1 << 30), UPRIGHT[:, ::-1]),
    "upside down": ((ONE, 0, 0, 0, -ONE, 0, 0, 96 << 16, 1 << 30), UPRIGHT[::-1]),
    "half turn": ((-ONE, 0, 0, 0, -ONE, 0, 160 << 16, 96 << 16, 1 << 30), UPRIGHT[::-1, ::-1]),
    "clockwise": ((0, ONE, 0, -ONE, 0, 0, 96 << 16, 0, 1 << 30), np.rot90(UPRIGHT, 3)),
    "anticlockwise": ((0, -ONE, 0, ONE, 0, 0, 0, 160 << 16, 1 << 30), np.rot90(UPRIGHT)),
    "transposed": ((0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30), UPRIGHT.swapaxes(0, 1)),
    "transversed": ((0, -ONE, 0, -ONE, 0, 0, 96 << 16, 160 << 16, 1 << 30), UPRIGHT[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.fixture(params=["decord", "PyAV"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    find = importlib.util.find_spec
    if request.param == "PyAV":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "decord" else find(name))
    elif find("decord") is None:
        pytest.skip("decord is not installed")
    return str(request.param)


def check(path: Path, expected: NDArray[np.uint8]) -> None:
    """All frames are a picture, nearly."""
    for frame in sample_video(str(path), 4).frames.numpy():
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_the_whole_matrix_of_a_container_holds(tmp_path: Path, suffix: str, name: str) -> None:
    matrix, expected = MATRICES[name]
    container = ".mp4" if suffix == ".mkv" else suffix
    source = encode(tmp_path / f"a{container}", options={"g": "12"}, numbers=[5] * 30)
    path = with_matrix(source, tmp_path / f"b{container}", matrix)
    if suffix == ".mkv":
        path = copy_packets(path, tmp_path / "c.mkv")
        with av.open(str(path)) as reader:
            kept = next(reader.decode(video=0)).side_data.get("DISPLAYMATRIX")
        if name != "upright" and kept is None:
            pytest.skip("this FFmpeg does not write it into Matroska")
    check(path, expected)


def test_a_turned_webm(tmp_path: Path) -> None:
    vp9 = {"deadline": "realtime", "cpu-used": "8"}
    source = encode(tmp_path / "a.mp4", "libvpx-vp9", vp9, [5] * 12)
    turned = with_matrix(source, tmp_path / "b.mp4", MATRICES["clockwise"][0])
    check(copy_packets(turned, tmp_path / "c.webm"), MATRICES["clockwise"][1])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [("rotate=90", np.rot90(UPRIGHT)), ("rotate=180", UPRIGHT[::-1, ::-1]), ("flip=horizontal", UPRIGHT[:, ::-1])],
)
def test_h264_says_its_orientation(tmp_path: Path, suffix: str, change: str, expected: NDArray[np.uint8]) -> None:
    source = encode(tmp_path / f"a{suffix}", options={"g": "12"}, numbers=[5] * 30)
    path = tmp_path / f"b{suffix}"
    check(filter_packets(source, path, f"h264_metadata=display_orientation=insert:{change}"), expected)


@pytest.mark.parametrize(
    ("bits", "expected"), [("0000100000000000000001", np.rot90(UPRIGHT)), ("01000000000000000000001", UPRIGHT[:, ::-1])]
)
def test_hevc_says_its_orientation_once(tmp_path: Path, bits: str, expected: NDArray[np.uint8]) -> None:
    # Not cancelled, mirrored, upside down, anticlockwise turn of 16 bits, until further notice; then a stop bit.
    bits = f"0{bits[1:3]}{'0100000000000000' if bits[4] == '1' else '0' * 16}11"
    payload = int(bits.ljust(24, "0"), 2).to_bytes(3, "big")
    unit = bytes([39 << 1, 1, 47, len(payload)]) + payload.replace(b"\0\0", b"\0\0\3") + b"\x80"

    def add(packets: list[Any]) -> Iterable[Any]:
        first = av.Packet(len(unit).to_bytes(4, "big") + unit + bytes(packets[0]))
        first.pts, first.dts, first.time_base = packets[0].pts, packets[0].dts, packets[0].time_base
        first.is_keyframe = True
        return [first, *packets[1:]]

    source = encode(tmp_path / "a.mp4", "libx265", {"x265-params": "keyint=12:log-level=none"}, [5] * 30)
    check(copy_packets(source, tmp_path / "b.mp4", add), expected)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize(("ratio", "width"), [(Fraction(2), 320), (Fraction(8, 9), 142), (Fraction(1, 2), 80)])
def test_pixels_become_square(tmp_path: Path, suffix: str, ratio: Fraction, width: int) -> None:
    path = encode(tmp_path / f"a{suffix}", options={"g": "12"}, numbers=[5] * 5, pixel_ratio=ratio)
    check(path, np.asarray(stamp(5))[:, (np.arange(width) * 160 // width)])


def test_pixels_are_those_of_the_stored_picture(tmp_path: Path, tiny_vision: VisionConfig) -> None:
    source = encode(tmp_path / "a.mp4", options={"g": "12"}, numbers=[5] * 5, pixel_ratio=Fraction(2))
    path = with_matrix(source, tmp_path / "b.mp4", MATRICES["clockwise"][0])
    wide = UPRIGHT.repeat(2, axis=1)
    check(path, np.rot90(wide, 3))
    # Boxes of grounding are measured in this picture.
    assert load_media(Media("video", str(path)), tiny_vision).original_size == (320, 96)
    with pytest.raises(MediaError, match="it is 96 x 320 pixels"):
        sample_video(str(path), 1, limits=MediaLimits(max_image_pixels=160 * 96))


def test_an_absurd_pixel_ratio_is_named(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", options={"g": "12"}, numbers=[5] * 5, pixel_ratio=Fraction(20))
    with pytest.raises(MediaError, match="its pixels are said to be 20 times as wide as high"):
        sample_video(str(path), 1)


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "libvpx"])
def test_a_size_that_changes_on_the_way(tmp_path: Path, codec: str) -> None:
    first = encode(tmp_path / "a.ivf" if codec != "libx264" else tmp_path / "a.ts", codec, numbers=range(12))
    second = encode(tmp_path / f"b{first.suffix}", codec, numbers=range(12), size=(320, 192))
    target = tmp_path / ("c.ts" if codec == "libx264" else "c.webm")

    def add(packets: list[Any]) -> Iterable[Any]:
        yield from packets
        with av.open(str(second)) as container:
            for packet in container.demux(video=0):
                if packet.size:
                    packet.pts += 12 * packets[0].duration
                    packet.dts += 12 * packets[0].duration
                    yield packet

    path = copy_packets(first, target, add)
    with pytest.raises(MediaError, match="changes size on the way, from 160 x 96 to 320 x 192 at frame"):
        sample_video(str(path), 4)
