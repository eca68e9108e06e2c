"""Videos: exact frames from every kind of file by either decoder, one clear error for every broken one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from conftest import COMMITTED_VIDEO

from llava.data.decoding import FrameRequest, choose_frames
from llava.data.media import MediaError, sample_video
from llava.data.video import Video, open_video

CODECS = {
    "mpeg4.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "mpeg2.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "h264.avi": ("libx264", {"g": "12"}),
    "h264.h264": ("libx264", {"g": "12"}),
    "h264.flv": ("libx264", {"g": "12"}),
    "h264.mkv": ("libx264", {"g": "12"}),
    "open_gop_h264.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}),
    "open_gop_hevc.mp4": ("libx265", {"x265-params": "open-gop=1:keyint=12:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "wmv.wmv": ("wmv2", {"g": "12"}),
}
SHARED_CLIPS = [
    *(f"codecs/{name}" for name in ("av1_video.mkv", "h264_10bits.mp4", "h265_10bits.mp4", "h265_video.mp4")),
    *(f"codecs/video_{degrees}.mov" for degrees in (0, 90, 180, 270)),
    "codecs/nasa_13013.mp4", "signs/again.mkv", "signs/brother.mkv",
]  # fmt: skip
COMMITTED_CLIPS = ["broken/unordered.mov", "signs/milk.mkv"]
MADE_CLIPS = {
    "h264.mkv": "decord",
    "upside_down.mp4": "decord",
    "hevc.mp4": "seek",
    "av1.mkv": "seek",
    "h264_10bits.mp4": "seek",
    "hevc_10bits.mp4": "seek",
    "two_streams.mp4": "seek",
}
"""Clips of ``make_clip``, and the decoder that is exact for each."""
needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")


@pytest.fixture
def without_decord(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "decord" else find(name))


@pytest.fixture
def decoders(monkeypatch) -> list[str]:
    """The decoders that were used, in order."""
    used: list[str] = []

    def watch(owner, name: str, label: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (used.append(label), function(*args))[1])

    watch(Video, "_read_with_decord", "decord")
    watch(Video, "_seek_frames", "seek")
    watch(Video, "_pick_frames", "from the beginning")
    return used


def encode(path: Path, codec: str, options: dict[str, str], num_frames: int = 40) -> Path:
    """A clip of noise that scrolls and brightens, so that no two frames are alike."""
    noise = np.random.default_rng(0).integers(0, 120, (64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(num_frames):
            image = np.roll(noise, 3 * i, axis=1) + np.uint8(3 * i % 120)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    """Every frame, decoded from the first to the last by PyAV, upright."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return [
            np.rot90(frame.to_ndarray(format="rgb24"), k=(frame.rotation // 90) % 4)
            for frame in container.decode(stream)
        ]


def check_random_access(path: Path) -> None:
    expected = decode_all(path)
    rng = np.random.default_rng(1)
    with open_video(str(path)) as video:
        assert len(video.times) == len(expected)
        for count in (1, 2, 4, 8):
            indices = np.sort(rng.integers(0, len(expected), count)).tolist()
            for index, frame in zip(indices, video.read(indices), strict=True):
                assert np.array_equal(frame, expected[index]), f"{path.name}: frame {index} of {indices}"


def check_error(path: Path, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        sample_video(str(path), 4)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CODECS)
def test_random_access_equals_sequential_decoding(tmp_path, name):
    codec, options = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    check_random_access(encode(tmp_path / name, codec, options))


def make_clip(folder: Path, name: str) -> Path:
    """A clip of the kind that its name says."""
    codec = {"h": "libx264", "u": "libx264", "t": "libx264", "a": "libsvtav1"}[name[0]]
    codec = "libx265" if name.startswith("hevc") else codec
    quiet = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12"}}.get(codec, {})
    pix_fmt = "yuv420p10le" if "10bits" in name else "yuv420p"
    path = clips.encode(folder / f"plain_{name}", codec, {"g": "12", **quiet}, range(40), pix_fmt=pix_fmt)
    if name.startswith("upside_down"):
        return clips.with_matrix(
            path, folder / name, (-clips.ONE, 0, 0, 0, -clips.ONE, 0, 160 << 16, 96 << 16, 1 << 30)
        )
    if not name.startswith("two_streams"):
        return path.rename(folder / name)
    with av.open(str(path)) as source, av.open(str(folder / name), "w") as target:
        streams = [target.add_stream_from_template(source.streams.video[0]) for _ in range(2)]
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet in packets:
            for stream in streams:
                packet.stream = stream
                target.mux(packet)
    return folder / name


@pytest.mark.parametrize("with_decord", [True, False])
@pytest.mark.parametrize("name", [*COMMITTED_CLIPS, *MADE_CLIPS])
def test_random_access_of_other_files(tmp_path, name, with_decord, request):
    if not with_decord:
        request.getfixturevalue("without_decord")
    check_random_access(COMMITTED_VIDEO / name if name in COMMITTED_CLIPS else make_clip(tmp_path, name))


@pytest.mark.parametrize("with_decord", [True, False])
def test_random_access_of_the_real_files(shared_data, with_decord, request):
    if not with_decord:
        request.getfixturevalue("without_decord")
    for name in SHARED_CLIPS:
        check_random_access(shared_data / "video" / name)


@needs_decord
@pytest.mark.parametrize("name", MADE_CLIPS)
def test_which_decoder_reads_what(tmp_path, decoders, name):
    sample_video(str(make_clip(tmp_path, name)), 4)
    assert decoders == [MADE_CLIPS[name]]


@needs_decord
def test_pyav_takes_over_where_decord_fails(media_dir, monkeypatch, decoders):
    import decord

    def fail(*args, **kwargs):
        raise decord.DECORDError("no")

    expected = sample_video(str(media_dir / "a.mp4"), 4)
    monkeypatch.setattr(decord, "VideoReader", fail)
    found = sample_video(str(media_dir / "a.mp4"), 4)
    assert decoders == ["decord", "decord", "seek"]
    assert (found.frames == expected.frames).all()
    assert found.times == expected.times


@pytest.mark.parametrize("with_decord", [True, False])
def test_rotated_clips_come_out_upright(shared_data, with_decord, request):
    if not with_decord:
        request.getfixturevalue("without_decord")
    folder = shared_data / "video" / "codecs"
    upright = sample_video(str(folder / "video_0.mov"), 3).frames.float()
    for degrees, turns in ((90, 3), (180, 2), (270, 1)):
        turned = sample_video(str(folder / f"video_{degrees}.mov"), 3).frames
        path = folder / f"video_{degrees}.mov"
        with av.open(str(path)) as container:
            stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.array_equal(turned[0].numpy(), np.rot90(stored, k=turns))
    assert upright.shape == (3, 320, 568, 3)


@pytest.mark.parametrize("name", ["short_groups.flv", "short_groups.mp4", "short_groups.mkv"])
def test_seeking_leads_to_the_nearest_key_frame(tmp_path, name, decoders, without_decord):
    options = {"x264-params": "open-gop=1:keyint=3:bframes=2:b-adapt=0:scenecut=0"}
    path = encode(tmp_path / name, "libx264", options)
    check_random_access(path)
    assert set(decoders) == {"seek"}
    with open_video(str(path)) as video:
        for key, time in enumerate(video._index.keys):
            assert next(video._decode_from(video._index, key)).pts == time


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", "mkv"), ("libx264", "mp4"), ("mpeg2video", "ts"), ("mpeg4", "mkv"), ("libx265", "mkv")],
)
def test_frames_before_the_first_key_frame_are_not_counted(tmp_path, codec, suffix, decoders, without_decord):
    """They refer to what was cut off; that seeking goes on shows that the index knows, not a decode of all the file."""
    options = {
        "libx264": {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"},
        "libx265": {"x265-params": "open-gop=1:keyint=12:bframes=3:log-level=none"},
    }.get(codec, {"g": "12", "bf": "2"})

    def cut(packets):
        """From the second key frame on, behind which frames come that are shown before it."""
        rest = packets[[i for i, packet in enumerate(packets) if packet.is_keyframe][1] :]
        assert min(packet.pts for packet in rest) < rest[0].pts
        return rest

    path = clips.copy_packets(clips.encode(tmp_path / f"a.{suffix}", codec, options), tmp_path / f"b.{suffix}", cut)
    expected = clips.decode_all(path)
    assert expected == list(range(12, 60))
    assert clips.read_singly(path, len(expected)) == expected
    with open_video(str(path)) as video:
        assert len(video.times) == len(expected)
        assert [clips.number_of(frame) for frame in video.read([0, 20, 47])] == [12, 32, 59]
    assert set(decoders) == {"seek"}


def test_long_clips_are_not_decoded_whole(tmp_path, monkeypatch, decoders):
    codec, options = CODECS["open_gop_hevc.mp4"]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = encode(tmp_path / "long.mp4", codec, options, num_frames=240)
    decoded = 0
    original = Video._decode_from

    def count(self, index, key):
        nonlocal decoded
        for frame in original(self, index, key):
            decoded += 1
            yield frame

    monkeypatch.setattr(Video, "_decode_from", count)
    sample_video(str(path), 4)
    assert decoders == ["seek"]
    assert decoded < 80


def test_frame_times_are_seconds_from_the_first_frame(media_dir, without_decord):
    video = sample_video(str(media_dir / "a.mp4"), 4)
    assert video.indices == (0, 4, 7, 11)
    assert video.times == pytest.approx((0, 0.5, 0.875, 1.375))


def test_times_do_not_depend_on_the_decoder(tmp_path, request):
    """At a variable frame rate: the second frame comes two thirtieths behind the first, the others one."""
    times = [0, *range(2, 31)]
    path = str(clips.encode(tmp_path / "a.mkv", numbers=range(30), times=times, time_base=Fraction(1, 30)))
    first = sample_video(path, 6).times
    request.getfixturevalue("without_decord")
    assert sample_video(path, 6).times == first
    assert first[0] == 0
    assert sample_video(path, 2, split=(0, 1)).times[1] == pytest.approx(2 / 30, abs=1e-3)


def choose(
    length: int, rate: float, num_frames: int, fps: float, bound: int, split: tuple[int, int] | None
) -> list[int]:
    """Of a clip of a constant frame rate."""
    return choose_frames([i / rate for i in range(length)], rate, FrameRequest("", num_frames, fps, bound, split))


def test_frames_are_spread_evenly():
    assert choose(12, 8.0, 4, 0.0, 32, None) == [0, 4, 7, 11]
    assert choose(100, 25.0, 1, 0.0, 32, None) == [0]
    assert choose(2, 25.0, 4, 0.0, 32, None) == [0, 0, 1, 1]
    assert choose(1, 25.0, 4, 0.0, 32, None) == [0, 0, 0, 0]
    assert choose(100, 25.0, 3, 0.0, 32, (10, 20)) == [10, 15, 20]
    assert choose(100, 25.0, 3, 0.0, 32, (99, 99)) == [99, 99, 99]


def test_frames_a_second_up_to_a_bound():
    assert choose(100, 25.0, 4, 1.0, 32, None) == [0, 33, 66, 99]
    assert len(choose(100, 25.0, 4, 2.0, 32, None)) == 8
    assert len(choose(100, 25.0, 4, 25.0, 32, None)) == 32
    assert choose(5, 25.0, 4, 1.0, 32, None) == [0]
    assert len(choose(100, 25.0, 4, 1.0, 32, (0, 49))) == 2


def test_split_behind_the_end_of_the_clip(media_dir):
    assert sample_video(str(media_dir / "a.mp4"), 2, split=(3, 11)).indices == (3, 11)
    with pytest.raises(MediaError, match=r"a\.mp4: .*frames are 0 to 11, but meta.split asks for 3 to 12"):
        sample_video(str(media_dir / "a.mp4"), 2, split=(3, 12))


def test_missing_empty_text_and_folder(tmp_path):
    check_error(tmp_path / "none.mp4", "no such file")
    (tmp_path / "empty.mp4").touch()
    check_error(tmp_path / "empty.mp4", "the file is empty")
    (tmp_path / "text.mp4").write_text("questo non è un video\n" * 100)
    check_error(tmp_path / "text.mp4", "cannot be decoded as a video")
    (tmp_path / "folder.mp4").mkdir()
    check_error(tmp_path / "folder.mp4", "a folder, not a file")
    check_error(tmp_path / ("x" * 300), "cannot be opened")
    with pytest.raises(MediaError, match="cannot be opened"):
        sample_video("nul\0.mp4", 4)


def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    check_error(tmp_path / "pipe.mp4", "a device or pipe, not a file")


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8"])
def test_playlist_does_not_reach_for_the_network(tmp_path, name):
    callers = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, caller = server.accept()
                    callers.append(caller)
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / name).write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}\n#EXT-X-ENDLIST\n")
        check_error(tmp_path / name, "cannot be decoded as a video")
    assert callers == []


@pytest.mark.parametrize("name", ["clip.mp4", "moov_first.mp4", "clip.mkv", "clip.webm"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_video(tmp_path, name, share):
    codec, options = CODECS["vp9.webm" if name == "clip.webm" else "h264.mkv"]
    whole = encode(tmp_path / f"whole_{name}", codec, options)
    if name == "moov_first.mp4":
        whole = move_index_to_front(whole, tmp_path / "moved.mp4")
    assert len(sample_video(str(whole), 4).frames) == 4
    data = whole.read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    check_error(tmp_path / name, "cannot be decoded as a video")


def move_index_to_front(path: Path, target: Path) -> Path:
    """The same packets in an MP4 whose list of frames stands before them, as the web likes it."""
    with av.open(str(path)) as source, av.open(str(target), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target


CORRUPTED = COMMITTED_VIDEO / "broken" / "corrupted.mp4"


def write_sound(path: Path) -> Path:
    """A second of silence, in a container that could hold a video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("with_decord", [True, False])
def test_broken_real_files(tmp_path, with_decord, request):
    if not with_decord:
        request.getfixturevalue("without_decord")
    check_error(CORRUPTED, "Invalid data found")
    check_error(write_sound(tmp_path / "sound.mp4"), "no video stream")


def test_decoders_keep_quiet(tmp_path):
    files = [CORRUPTED, *(COMMITTED_VIDEO / name for name in COMMITTED_CLIPS), write_sound(tmp_path / "sound.mp4")]
    files += [make_clip(tmp_path, name) for name in MADE_CLIPS]
    program = (
        "import sys\nfrom llava.data.media import MediaError, sample_video\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        sample_video(path, 4)\n    except MediaError:\n        print('bad')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "bad\n" * 2)


def test_files_are_closed(media_dir, tmp_path):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")
    hevc = make_clip(tmp_path, "hevc.mp4")
    before = len(os.listdir("/proc/self/fd"))
    for path in (media_dir / "a.mp4", hevc, CORRUPTED) * 3:
        with contextlib.suppress(MediaError):
            sample_video(str(path), 4)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
