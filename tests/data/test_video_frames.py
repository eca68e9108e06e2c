"""``Video.read([i])`` is frame i of a decode of all the file, whatever the container says of key frames and times."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import copy_packets, decode_all, encode, number_of, read_one, read_singly, replace_box

from llava.data.video import Video, open_video


@pytest.fixture(params=["decord", "PyAV"], autouse=True)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    find = importlib.util.find_spec
    if request.param == "PyAV":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "decord" else find(name))
    elif find("decord") is None:
        pytest.skip("decord is not installed")
    return str(request.param)


FRAMES = 30
"""Key frames are 12 or 20 apart."""
X264, X265 = {"g": "12"}, {"x265-params": "open-gop=1:keyint=12:log-level=none"}
OPEN = {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}
HIDDEN = {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "8", "b": "200k"}
MPEG = {"g": "12", "bf": "2"}
# Name, codec, options, whether frames are sought (or decoding begins at the beginning), pixel format.
CLIPS: list[tuple[str, str, dict[str, str], bool, str]] = [
    *((f"h264{suffix}", "libx264", X264, True, "yuv420p") for suffix in (".mp4", ".mkv", ".flv", ".ts", ".mov")),
    *((f"h264{suffix}", "libx264", X264, False, "yuv420p") for suffix in (".avi", ".mpg", ".h264")),
    *((f"refresh{suffix}", "libx264", REFRESH, True, "yuv420p") for suffix in (".mp4", ".mkv", ".ts")),
    *((f"open{suffix}", "libx264", OPEN, True, "yuv420p") for suffix in (".mp4", ".ts")),
    ("interlaced.mp4", "libx264", {"x264-params": "interlaced=1:keyint=12"}, False, "yuv420p"),
    ("h264_10.mkv", "libx264", X264, True, "yuv420p10le"),
    *((f"hevc{suffix}", "libx265", X265, True, "yuv420p") for suffix in (".mp4", ".mkv", ".ts")),
    ("hevc_refresh.mp4", "libx265", {"x265-params": "intra-refresh=1:keyint=20:log-level=none"}, True, "yuv420p"),
    *((f"mpeg2{suffix}", "mpeg2video", MPEG, True, "yuv420p") for suffix in (".ts", ".mpg", ".mkv", ".mxf")),
    ("interlaced.mpg", "mpeg2video", MPEG | {"flags": "+ildct+ilme"}, True, "yuv420p"),
    ("mpeg1.mpg", "mpeg1video", MPEG, True, "yuv420p"),
    *((f"mpeg4{suffix}", "mpeg4", MPEG, suffix != ".avi", "yuv420p") for suffix in (".avi", ".mkv", ".mp4")),
    ("vp8.webm", "libvpx", HIDDEN, True, "yuv420p"),
    ("vp8.ogv", "libvpx", {"g": "15", "deadline": "realtime"}, True, "yuv420p"),
    *((f"vp9{suffix}", "libvpx-vp9", HIDDEN, True, "yuv420p") for suffix in (".webm", ".mp4")),
    *((f"av1{suffix}", "libsvtav1", {"g": "20", "preset": "12"}, True, "yuv420p") for suffix in (".mkv", ".mp4")),
    ("wmv2.wmv", "wmv2", X264, False, "yuv420p"),
    ("h263.flv", "flv", X264, False, "yuv420p"),
    ("mjpeg.avi", "mjpeg", {}, True, "yuvj420p"),
    ("ffv1.mkv", "ffv1", X264, False, "yuv420p"),
    ("gif.gif", "gif", {}, False, "rgb8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that the tests of both decoders share."""
    return tmp_path_factory.mktemp("clips")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One item for each time that frames were taken from a decode from the beginning."""
    found: list[str] = []
    pick = Video._pick_frames
    monkeypatch.setattr(Video, "_pick_frames", lambda self, indices: (found.append("all"), pick(self, indices))[1])
    return found


@pytest.mark.parametrize(("name", "codec", "options", "sought", "pix_fmt"), CLIPS, ids=[clip[0] for clip in CLIPS])
def test_frames_of_every_codec(
    folder: Path, begun: list[str], name: str, codec: str, options: dict[str, str], sought: bool, pix_fmt: str
) -> None:
    path = folder / name
    if not path.exists():
        encode(path, codec, options, range(FRAMES), pix_fmt=pix_fmt)
    assert decode_all(path) == list(range(FRAMES))
    assert read_singly(path, FRAMES) == list(range(FRAMES))
    assert (not begun) == sought
    with open_video(str(path)) as video:
        assert [number_of(frame) for frame in video.read([3, 3, 17, 21, 28])] == [3, 3, 17, 21, 28]
        assert video.times == pytest.approx([i / 25 for i in range(FRAMES)], abs=0.002)


@pytest.mark.parametrize("box", [b"free", b"stss"], ids=["no table", "an empty table"])
def test_an_mp4_without_its_key_frames(tmp_path: Path, begun: list[str], box: bytes) -> None:
    # Without a table all packets count as key frames, with an empty one none do.
    path = replace_box(
        encode(tmp_path / "a.mp4", options=X264, numbers=range(FRAMES)), tmp_path / "b.mp4", b"stss", box
    )
    if box == b"stss":
        data = bytearray(path.read_bytes())
        place = data.index(box)
        data[place + 8 : place + 12] = bytes(4)
        path.write_bytes(data)
    assert read_singly(path, FRAMES) == list(range(FRAMES))
    assert begun == []


def test_key_frames_that_are_none(tmp_path: Path) -> None:
    def mark(packets: list[Any]) -> Iterable[Any]:
        for place, packet in enumerate(packets):
            packet.is_keyframe = place % 7 == 0
        return packets

    source = encode(tmp_path / "a.mp4", options=X264, numbers=range(FRAMES))
    for name in ("b.mp4", "b.mkv"):
        assert read_singly(copy_packets(source, tmp_path / name, mark), FRAMES) == list(range(FRAMES))


def join(folder: Path, target: Path, *, overlap: float, first: int = 24) -> Path:
    """Two clips in one file; times of the second begin so many frames before the end of the first."""
    options = {"x264-params": "bframes=2:b-adapt=0:scenecut=0:keyint=12"}
    second = encode(folder / "second.mp4", options=options, numbers=range(100, 124))

    def add(packets: list[Any]) -> Iterator[Any]:
        tick = packets[-1].duration
        last = packets[-1].dts
        yield from packets
        import av

        with av.open(str(second)) as container:
            for packet in container.demux(video=0):
                if packet.size:
                    packet.pts += int((first - overlap) * tick)
                    packet.dts = last = max(last + 1, packet.dts + int((first - overlap) * tick))
                    packet.pts = max(packet.pts, packet.dts)
                    yield packet

    return copy_packets(encode(folder / "first.mp4", options=options, numbers=range(first)), target, add)


@pytest.mark.parametrize("overlap", [0, 1.5, 2, 7])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_joined_clips_whose_times_overlap(tmp_path: Path, suffix: str, overlap: float) -> None:
    path = join(tmp_path, tmp_path / f"joined{suffix}", overlap=overlap)
    everything = decode_all(path)
    with open_video(str(path)) as video:
        assert len(video.times) == len(everything)
        assert all(a < b for a, b in zip(video.times, video.times[1:], strict=False))
        assert [number_of(frame) for frame in video.read(range(len(everything)))] == everything
    assert read_singly(path, len(everything)) == everything


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".flv"])
@pytest.mark.parametrize(("codec", "options"), [("libx264", X264), ("libx264", OPEN), ("libx265", X265)])
def test_a_recording_that_begins_in_the_middle(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    if codec == "libx265" and suffix == ".flv":
        pytest.skip("HEVC in FLV is an extension")
    source = encode(tmp_path / f"a{suffix}", codec, options, range(FRAMES))
    path = copy_packets(source, tmp_path / f"b{suffix}", lambda packets: packets[5:])
    everything = decode_all(path)
    assert everything[-1] == FRAMES - 1
    with open_video(str(path)) as video:
        assert len(video.times) == len(everything)
    assert read_singly(path, len(everything)) == everything


def test_an_edit_list_hides_frames(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", options=X264, numbers=range(FRAMES))

    # Packets whose times are negative become an edit list that begins behind them.
    def shift(packets: list[Any]) -> Iterable[Any]:
        for packet in packets:
            packet.pts, packet.dts = packet.pts - 6 * packet.duration, packet.dts - 6 * packet.duration
        return packets

    path = copy_packets(source, tmp_path / "b.mp4", shift, options={"avoid_negative_ts": "disabled"})
    everything = decode_all(path)
    with open_video(str(path)) as video:
        assert len(video.times) == len(everything)
        assert video.times[0] == 0
    assert read_singly(path, len(everything)) == everything


@pytest.mark.parametrize("change", ["doubled", "missing", "late start"])
@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".nut"])
def test_times_that_are_doubled_missing_or_late(tmp_path: Path, suffix: str, change: str) -> None:
    def spoil(packets: list[Any]) -> Iterable[Any]:
        for place, packet in enumerate(packets):
            if change == "late start":
                packet.pts, packet.dts = packet.pts + 90_000, packet.dts + 90_000
            elif place == 20:
                packet.pts = packets[19].pts if change == "doubled" else None
        return packets

    options = {"x264-params": "bframes=0:keyint=12"}
    source = encode(tmp_path / "a.mp4", options=options, numbers=range(FRAMES))
    try:
        path = copy_packets(source, tmp_path / f"b{suffix}", spoil)
    except ValueError:
        pytest.skip("this container cannot be written so")
    everything = decode_all(path)
    with open_video(str(path)) as video:
        assert len(video.times) == len(everything)
        assert all(a < b for a, b in zip(video.times, video.times[1:], strict=False))
    assert read_singly(path, len(everything)) == everything


def test_packets_that_promise_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where decoding gives other frames than the packets spoke of, it is right."""
    from llava.data import video_index
    from llava.data.media import MediaError, sample_video

    path = encode(tmp_path / "a.mkv", options=X264, numbers=range(FRAMES))
    read = video_index._build_index

    def exaggerate(*args: Any) -> Any:
        index = read(*args)
        index.times.append(index.times[-1] + FRAMES)
        object.__setattr__(index, "plain", False)
        return index

    monkeypatch.setattr(video_index, "_build_index", exaggerate)
    sampled = sample_video(str(path), 2)
    assert sampled.indices == (0, FRAMES - 1)
    assert number_of(sampled.frames[-1].numpy()) == FRAMES - 1
    path = encode(tmp_path / "b.mkv", options=X264, numbers=range(4))
    with pytest.raises(MediaError, match="it has 5 frames, of which 4 can be decoded"):
        sample_video(str(path), 2)


def test_a_long_plain_clip_is_sought(tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    packets_from = Video._packets_from

    def count(self: Video, index: Any, key: int) -> Iterator[Any]:
        for packet in packets_from(self, index, key):
            decoded.append(packet.size)
            yield packet

    monkeypatch.setattr(Video, "_packets_from", count)
    path = encode(tmp_path / "long.mp4", options=X264, numbers=(i % 256 for i in range(600)))
    assert read_one(path, 500) == 500 % 256
    assert len(decoded) == 0 if decoder == "decord" else len(decoded) < 30
