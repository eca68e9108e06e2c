"""Clips that were cut off, end in zeros, or were never finished; and files that are no clips."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from clips import encode
from PIL import Image

from llava.data.check import main as check
from llava.data.containers import check_complete
from llava.data.media import MediaError, sample_video

X264, FAST = {"g": "12"}, {"deadline": "good", "cpu-used": "5", "g": "12"}
X265 = {"x265-params": "log-level=none"}
# Name, codec, its options, those of the container.
CONTAINERS: list[tuple[str, str, dict[str, str], dict[str, str]]] = [
    ("mpeg4.avi", "mpeg4", X264, {}),
    ("h264.avi", "libx264", X264, {}),
    ("plain.mkv", "libx264", X264, {}),
    ("live.mkv", "libx264", X264, {"live": "1"}),
    ("live.webm", "libvpx", FAST, {"live": "1"}),
    ("plain.mp4", "libx264", X264, {}),
    ("faststart.mp4", "libx264", X264, {"movflags": "faststart"}),
    ("fragmented.mp4", "libx264", X264, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ("indexed.mp4", "libx264", X264, {"movflags": "dash+global_sidx+frag_keyframe+empty_moov"}),
    ("h264.flv", "libx264", X264, {}),
    ("wmv2.wmv", "wmv2", X264, {}),
    ("vp8.ogv", "libvpx", FAST, {}),
    ("h264.ts", "libx264", X264, {}),
    ("mpeg1.mpg", "mpeg1video", X264, {}),
    ("mpeg2.mpg", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    ("animation.gif", "gif", {}, {}),
    ("vp9.ivf", "libvpx-vp9", FAST, {}),
    ("h264.nut", "libx264", X264, {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole clips, which the tests copy in part."""
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(("name", "codec", "options", "container"), CONTAINERS, ids=[case[0] for case in CONTAINERS])
def test_a_clip_that_is_not_whole(
    folder: Path, tmp_path: Path, name: str, codec: str, options: dict[str, str], container: dict[str, str]
) -> None:
    pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    path = encode(folder / name, codec, options, range(80), pix_fmt=pix_fmt, container_options=container)
    assert sample_video(str(path), 4).indices == (0, 26, 53, 79)
    data = path.read_bytes()
    for share in (0.3, 0.52, 0.7):
        keep = int(share * len(data))
        for kind, content in (("cut", data[:keep]), ("zeros", data[:keep] + bytes(len(data) - keep))):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(MediaError) as caught:
                sample_video(str(tmp_path / name), 4)
            assert str(tmp_path / name) in str(caught.value), (kind, share)
            assert "\n" not in str(caught.value)


def test_the_check_of_data_finds_half_an_avi(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = encode(tmp_path / "whole.avi", "mpeg4", X264, range(60))
    data = whole.read_bytes()
    (tmp_path / "half.avi").write_bytes(data[: len(data) // 2])
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "ciao"}]
    records = [{"id": name, "video": f"{name}.avi", "conversations": turns} for name in ("whole", "half")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert check([str(tmp_path / "data.json"), "--workers", "0"]) == 1
    assert "half" in (printed := capsys.readouterr().out)
    assert "1 bad" in printed
    assert "it is cut off" in printed


def test_pictures_at_the_end_that_only_decoding_shows(tmp_path: Path) -> None:
    # A cut lies between two of the container's parts; the last picture in the file is not the last one shown. Where
    # pictures end differs with the encoder's build: of neighbouring cuts some lie between whole pictures.
    path = encode(tmp_path / "a.mpg", "mpeg2video", {"g": "12", "bf": "2"}, range(120))
    data = path.read_bytes()
    damaged = []
    for part in range(6):
        (tmp_path / "b.mpg").write_bytes(data[: (len(data) // 4096 + part) * 2048])
        try:
            sample_video(str(tmp_path / "b.mpg"), 4)
        except MediaError as error:
            damaged.append(str(error))
    assert len(damaged) > 2
    assert all(re.search(r"frame \d+ is damaged", message) for message in damaged)


@pytest.mark.parametrize("name", ["a.ogv", "a.webm", "a.nut", "a.h264", "a.ivf"])
def test_zeros_in_the_last_picture(tmp_path: Path, name: str) -> None:
    codec = {"nut": "libx264", "h264": "libx264", "ivf": "libvpx-vp9"}.get(name[2:], "libvpx")
    live = {"live": "1"} if name == "a.webm" else {}
    path = encode(tmp_path / name, codec, X264 if codec == "libx264" else FAST, range(24), container_options=live)
    data = path.read_bytes()
    path.write_bytes(data[:-80] + bytes(80))
    with pytest.raises(MediaError, match="it holds only zeros from byte"):
        sample_video(str(path), 2)


def test_whole_recordings_are_no_alarm(tmp_path: Path) -> None:
    for name, codec, options in (
        ("a.mkv", "libx264", X264),
        ("a.ts", "libx264", X264),
        ("a.m2ts", "libx264", X264),
        ("a.flv", "libx264", X264),
        ("a.avi", "mpeg4", X264),
        ("a.wmv", "wmv2", X264),
        ("a.ogv", "libvpx", FAST),
    ):
        # Through a pipe nothing can be written back into the header: no length, no duration.
        written: list[bytes] = []

        class Pipe:
            def write(self, data: bytes) -> int:
                written.append(bytes(data))  # noqa: B023
                return len(data)

        suffix = name.rpartition(".")[2]
        muxer = {"mkv": "matroska", "ts": "mpegts", "m2ts": "mpegts", "wmv": "asf", "ogv": "ogg"}.get(suffix, suffix)
        options_of = {"mpegts_m2ts_mode": "1"} if suffix == "m2ts" else {}
        with av.open(Pipe(), "w", format=muxer, options=options_of) as container:
            stream = container.add_stream(codec, rate=25, options=options)
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            for i in range(30):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((96, 160, 3), 4 * i, np.uint8))))
            container.mux(stream.encode())
        (tmp_path / name).write_bytes(b"".join(written))
        assert sample_video(str(tmp_path / name), 2).indices == (0, 29), name


def test_a_transport_stream_that_lost_packets_is_read(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.ts", "mpeg2video", {"g": "1"}, range(30))
    data = path.read_bytes()
    for name, broken in (("mark", data[: 188 * 10] + b"F" + data[188 * 10 + 1 :]), ("gap", data[:1600] + data[1650:])):
        (tmp_path / f"{name}.ts").write_bytes(broken)
        check_complete(str(tmp_path / f"{name}.ts"), len(broken))
        (tmp_path / "cut.ts").write_bytes(broken[:-50])
        with pytest.raises(ValueError, match="it is cut off"):
            check_complete(str(tmp_path / "cut.ts"), len(broken) - 50)


def write_song(path: Path, codec: str, cover: bool) -> Path:
    """A second of sound, with or without a cover picture."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=44100)
        picture = None
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
        if picture is not None:
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            container.mux(picture.encode(image))
            container.mux(picture.encode())
    return path


@pytest.mark.parametrize("name", ["song.m4a", "song.mp3", "song.ogg", "song.wav", "song.mka", "song.flac"])
def test_sound_is_no_video(tmp_path: Path, name: str) -> None:
    codec = {"song.wav": "pcm_s16le", "song.flac": "flac", "song.ogg": "flac", "song.mp3": "libmp3lame"}.get(
        name, "aac"
    )
    if codec in ("pcm_s16le", "flac", "libmp3lame"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            frame.sample_rate = 44100
            resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=44100)
            for part in resampler.resample(frame):
                container.mux(stream.encode(part))
            container.mux(stream.encode())
    else:
        write_song(tmp_path / name, codec, cover=False)
    with pytest.raises(MediaError, match="it has no video stream"):
        sample_video(str(tmp_path / name), 2)


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = write_song(tmp_path / "song.mp4", "aac", cover=True)
    with av.open(str(path)) as container:
        if not container.streams.video:
            pytest.skip("this PyAV does not write covers")
    with pytest.raises(MediaError, match="it has no video stream, only a cover picture"):
        sample_video(str(path), 2)


def test_a_name_does_not_say_what_a_file_is(tmp_path: Path) -> None:
    clip = encode(tmp_path / "clip.mp4", options=X264, numbers=range(12)).read_bytes()
    for name in ("clip.txt", "v%03d.jpg", "concat:a|b", "list.m3u8", "http:clip", "clip", "file:clip.mp4", "a,b.mp4"):
        (tmp_path / name).write_bytes(clip)
        assert sample_video(str(tmp_path / name), 2).indices == (0, 11), name


def test_nothing_but_the_file_is_opened(tmp_path: Path, warm_python: str) -> None:
    # A pipe hangs whoever opens it; the siblings of v%03d.jpg would be read as its frames.
    os.mkfifo(tmp_path / "pipe.ts")
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / f"v{i:03d}.jpg")
    pipe = tmp_path / "pipe.ts"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{pipe}\n#EXT-X-ENDLIST\n"
    contents = {
        "list.m3u8": playlist,
        "list.txt": playlist,
        "clip.mp4": playlist,
        "list.ffconcat": f"ffconcat version 1.0\nfile '{pipe}'\n",
        "list.mp4": f"ffconcat version 1.0\nfile '{pipe}'\n",
        "a.mpd": f'<?xml version="1.0"?><MPD><BaseURL>{pipe}</BaseURL></MPD>',
        "art.txt": "hello\n" * 500,
        "v%03d.jpg": "no picture",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    program = (
        "import sys\nfrom llava.data.media import MediaError, sample_video\nfor path in sys.argv[1:]:\n"
        "    try:\n        sample_video(path, 2)\n    except MediaError as error:\n        print(error)\n"
    )
    paths = [str(tmp_path / name) for name in contents]
    done = subprocess.run([warm_python, "-c", program, *paths], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == paths, done
    listed = ["it is a list of other files" in line for line in lines]
    assert listed == [name not in ("art.txt", "v%03d.jpg") for name in contents]
    assert all("no video of a kind that is read" in line for line in lines[-2:])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tiff"])
def test_a_picture_is_no_video(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.mp4").write_bytes((tmp_path / f"a.{suffix}").read_bytes())
    with pytest.raises(MediaError, match="it is one still picture and no clip"):
        sample_video(str(tmp_path / "a.mp4"), 2)


# Name, codec, its options, pixel format, size.
HOLED: list[tuple[str, str, dict[str, str], str]] = [
    ("h264.mp4", "libx264", X264, "yuv420p"),
    ("hevc.mp4", "libx265", X265, "yuv420p"),
    ("h264.mkv", "libx264", X264, "yuv420p"),
    ("live.mkv", "libx264", X264, "yuv420p"),
    ("vp9.webm", "libvpx-vp9", FAST, "yuv420p"),
    ("mpeg4.avi", "mpeg4", X264, "yuv420p"),
    ("mjpeg.avi", "mjpeg", {}, "yuvj420p"),
    ("h264.ts", "libx264", X264, "yuv420p"),
    ("mpeg2.mpg", "mpeg2video", X264, "yuv420p"),
    ("h264.flv", "libx264", X264, "yuv420p"),
    ("wmv2.wmv", "wmv2", X264, "yuv420p"),
    ("vp8.ogv", "libvpx", FAST, "yuv420p"),
    ("h264.264", "libx264", X264, "yuv420p"),
]


@pytest.mark.parametrize(("name", "codec", "options", "pix_fmt"), HOLED, ids=[case[0] for case in HOLED])
def test_a_hole_in_the_middle_of_a_clip(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], pix_fmt: str
) -> None:
    """A download of many parts, or a copy onto a full disk, may leave out some and have all behind them."""
    live = {"live": "1"} if name.startswith("live") else {}
    path = encode(tmp_path / name, codec, options, range(80), pix_fmt=pix_fmt, container_options=live)
    data = path.read_bytes()
    assert sample_video(str(path), 80).indices == tuple(range(80))
    for share in (0.25, 0.4, 0.6):
        start, end = int(share * len(data)), int((share + 0.25) * len(data))
        while data[end:].lstrip(b"\0")[:1] == b"\1":
            end += 1  # To the next start code zeros may be filling, and what a coder writes differs between machines.
        path.write_bytes(data[:start] + bytes(end - start) + data[end:])
        with pytest.raises(MediaError, match=r"zeros|cut off|damaged|[Ii]nvalid data|no frames") as caught:
            sample_video(str(path), 80)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.264", "a.265", "a.m2v"])
def test_a_hole_anywhere_in_a_stream_without_container(tmp_path: Path, name: str) -> None:
    """A decoder may pass over what is left of a unit, and give as many frames as the clip had."""
    codec, options = {"264": ("libx264", X264), "265": ("libx265", X265), "m2v": ("mpeg2video", X264)}[name[2:]]
    path = encode(tmp_path / name, codec, options, range(80))
    data = path.read_bytes()
    check_complete(str(path), len(data))
    for start in range(200, len(data) - 200, 97):
        if data[start + 100 :].lstrip(b"\0")[:1] == b"\1":
            continue  # To the next start code zeros may be filling.
        path.write_bytes(data[:start] + bytes(100) + data[start + 100 :])
        with pytest.raises(ValueError, match="holds only zeros"):
            check_complete(str(path), len(data))


def test_a_transport_stream_whose_second_packet_is_a_hole(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.ts", "libx264", X264, range(80))
    data = path.read_bytes()
    path.write_bytes(data[: 188 * 6] + bytes(188 * 5) + data[188 * 11 :])
    with pytest.raises(MediaError, match="only zeros"):
        sample_video(str(path), 4)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "gray"])
def test_uncompressed_clips_that_are_cut_off(tmp_path: Path, pix_fmt: str) -> None:
    """Their frames are all of one size, and say nothing of their number."""
    path = encode(tmp_path / "clip.y4m", "wrapped_avframe", {"strict": "-1"}, range(9), pix_fmt=pix_fmt, size=(162, 98))
    assert sample_video(str(path), 9).indices == tuple(range(9))
    data = path.read_bytes()
    for keep in (len(data) // 2, len(data) - 9):
        path.write_bytes(data[:keep])
        with pytest.raises(MediaError, match="cut off"):
            sample_video(str(path), 4)


def test_a_dv_clip_that_is_cut_off(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.dv", "dvvideo", {}, range(5), size=(720, 576))
    assert sample_video(str(path), 5).indices == tuple(range(5))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4 - 7])
    with pytest.raises(MediaError, match="cut off"):
        sample_video(str(path), 5)


def test_filling_between_pictures_is_no_hole(tmp_path: Path) -> None:
    """Zeros before a start code keep a stream at its rate."""
    path = encode(tmp_path / "clip.264", "libx264", X264, range(40))
    data = path.read_bytes()
    place = data.index(b"\0\0\1", len(data) // 2)
    path.write_bytes(data[:place] + bytes(6000) + data[place:])
    assert sample_video(str(path), 40).indices == tuple(range(40))


# Boxes of an MP4, byte by byte


def box(kind: bytes, payload: bytes = b"", wide: bool = False) -> bytes:
    """A box of an MP4; a wide one has its length in eight bytes."""
    if wide:
        return struct.pack(">I4sQ", 1, kind, 16 + len(payload)) + payload
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


FTYP = box(b"ftyp", b"isom" + bytes(4))
MOOV = box(b"moov", bytes(100))


def write_and_check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check_complete(str(path), len(content))


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("moov_first", [False, True])
def test_a_box_that_ends_behind_the_file(tmp_path: Path, wide: bool, moov_first: bool) -> None:
    mdat = box(b"mdat", bytes(range(256)) * 4, wide)
    whole = FTYP + (MOOV + mdat if moov_first else mdat + MOOV)
    write_and_check(tmp_path / "a.mp4", whole)
    write_and_check(tmp_path / "a.mp4", whole + box(b"free", bytes(20)))
    for end in (len(whole) - 1, len(whole) - 90, len(FTYP) + 40):
        # What is cut off may be a box that only the one before it has room for.
        if end > len(FTYP) + 16:
            message = r"it is cut off: its container speaks of \d+ bytes, the file has " + str(end)
            with pytest.raises(ValueError, match=message):
                write_and_check(tmp_path / "a.mp4", whole[:end])


def test_a_length_of_64_bits_is_read_whole(tmp_path: Path) -> None:
    """Its upper half too: such boxes are there for files above 4 GB."""
    length = (3 << 32) + 40
    header = struct.pack(">I4sQ", 1, b"mdat", length)
    with pytest.raises(ValueError, match=f"speaks of {len(FTYP) + length} bytes, the file has {len(FTYP) + 100}"):
        write_and_check(tmp_path / "a.mp4", FTYP + header + bytes(84))
    with (tmp_path / "large.mp4").open("wb") as file:  # A hole: it takes no room on the disk.
        file.write(FTYP + header)
        file.truncate(len(FTYP) + length)
        file.seek(len(FTYP) + length)
        file.write(MOOV)
    check_complete(str(tmp_path / "large.mp4"), len(FTYP) + length + len(MOOV))
    with pytest.raises(ValueError, match="it is cut off"):
        check_complete(str(tmp_path / "large.mp4"), len(FTYP) + length + len(MOOV) - 1)


@pytest.mark.parametrize("length", [2, 4, 7])
@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_a_box_shorter_than_its_own_header_ends_the_row(tmp_path: Path, length: int, wide: bool) -> None:
    """Read on from its middle, what follows looks like a box that is cut off."""
    header = struct.pack(">I4sQ", 1, b"mdat", length) if wide else struct.pack(">I", length)
    # From the byte that the length leads to, a box of far more bytes than the file has.
    junk = bytearray(header + bytes(80 - len(header)))
    junk[max(length, len(header)) : length + 4] = b"\1\1\1\1"[max(len(header) - length, 0) :]
    junk[max(length + 4, len(header)) : length + 8] = b"mdat"[max(len(header) - length - 4, 0) :]
    write_and_check(tmp_path / "a.mp4", FTYP + box(b"mdat", bytes(32)) + MOOV + junk)


@pytest.mark.parametrize("length", [2, 4, 7])
def test_an_impossible_length_does_not_hide_what_was_cut_before_it(tmp_path: Path, length: int) -> None:
    mdat = struct.pack(">I4s", 5000, b"mdat")
    with pytest.raises(ValueError, match=f"speaks of {len(FTYP) + 5000} bytes"):
        write_and_check(tmp_path / "a.mp4", FTYP + mdat + struct.pack(">I4s", length, b"junk") + bytes(40))


def test_a_box_to_the_end_of_the_file(tmp_path: Path) -> None:
    write_and_check(tmp_path / "a.mp4", FTYP + MOOV + struct.pack(">I4s", 0, b"mdat") + bytes(500))
