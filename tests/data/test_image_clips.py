"""Animated pictures, folders and lists of frames as clips."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from llava.data.check import main as check
from llava.data.images import list_frames
from llava.data.media import load_media, sample_video
from llava.data.media_files import MediaError, MediaLimits
from llava.data.records import read_records
from llava.types import Media

SHADES = (10, 60, 110, 160, 210, 250)
DELAYS = (100, 200, 300, 400, 500, 600)  # milliseconds
SAVE = {"gif": {}, "png": {}, "webp": {"lossless": True}}
if features.check("avif"):
    SAVE["avif"] = {"quality": 100, "subsampling": "4:4:4"}


def frames(size: tuple[int, int] = (32, 24), mode: str = "RGB") -> list[Image.Image]:
    return [Image.new("L", size, shade).convert(mode) for shade in SHADES]


def animate(path: Path, pictures: list[Image.Image], delays=DELAYS, **options) -> str:
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=list(delays), **options)
    return str(path)


def shades(video) -> list[int]:
    return [round(float(frame.float().mean())) for frame in video.frames]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Frames whose names sort otherwise by letters than by numbers."""
    (tmp_path / "clip").mkdir()
    for number, picture in enumerate(frames(), start=7):
        picture.save(tmp_path / "clip" / f"frame{number}.png")
    (tmp_path / "clip" / ".DS_Store").write_bytes(b"x")
    return tmp_path / "clip"


def write_sample(path: Path, video, num_places: int = 1, **more) -> str:
    turns = [{"from": "human", "value": "<video>" * num_places}, {"from": "gpt", "value": "ciao"}]
    path.write_text(json.dumps([{"id": 1, "video": video, "conversations": turns, **more}]))
    return str(path)


@pytest.mark.parametrize("timeout", [0.0, 60.0])
@pytest.mark.parametrize("kind", SAVE)
def test_an_animated_picture_is_a_clip_with_its_own_times(tmp_path: Path, kind: str, timeout: float) -> None:
    path = animate(tmp_path / f"a.{kind}", frames(), **SAVE[kind])
    video = sample_video(path, 6, split=(0, 5), timeout=timeout)
    by_place = sample_video(path, 1, split=(4, 4), timeout=timeout)
    assert np.abs(np.array(shades(by_place)) - SHADES[4]).max() <= 1
    assert by_place.times == pytest.approx((1.0,))
    assert video.duration == pytest.approx(2.1)
    assert video.times[0] == 0
    for time, shade in zip(video.times, shades(video), strict=True):
        at = [0.0, 0.1, 0.3, 0.6, 1.0, 1.5].index(round(time, 3))
        assert abs(shade - SHADES[at]) <= 1


def test_frames_a_second_go_by_the_delays(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.gif", frames(), (1000, 1000, 100, 100, 100, 100))
    assert sample_video(path, 4, fps=1.0).times == pytest.approx((0.0, 1.0), abs=0.2)


def test_a_delay_of_zero_is_a_tenth_of_a_second(tmp_path: Path) -> None:
    path = Path(animate(tmp_path / "a.gif", frames(), [0] * 6))
    assert sample_video(str(path), 6).times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def gif_frame(left: int, index: int, disposal: int) -> bytes:
    """A square of 2 x 2 in one colour of the palette, on a screen of 4 x 2; colour 3 is transparent."""
    control = b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | 1, 10, 3, 0)
    # Codes of 3 bits: clear, the colour four times with a clear behind two (the width grows else), end.
    codes = [4, index, index, 4, index, index, 5]
    bits = sum(code << 3 * place for place, code in enumerate(codes)).to_bytes(3, "little")
    return control + b"," + struct.pack("<HHHHB", left, 0, 2, 2, 0) + b"\x02" + bytes([len(bits)]) + bits + b"\0"


@pytest.mark.parametrize(("disposal", "left_behind"), [(1, 100), (2, 255), (3, 255)])
def test_what_a_frame_of_a_gif_leaves_behind(tmp_path: Path, disposal: int, left_behind: int) -> None:
    palette = bytes([100] * 3 + [200] * 3 + [50] * 3 + [0] * 3)
    data = b"GIF89a" + struct.pack("<HHBBB", 4, 2, 0x91, 3, 0) + palette
    data += gif_frame(0, 0, disposal) + gif_frame(2, 1, 1) + b";"
    (tmp_path / "a.gif").write_bytes(data)
    video = sample_video(str(tmp_path / "a.gif"), 2)
    assert video.frames[0, 0, :, 0].tolist() == [100, 100, 255, 255]
    assert video.frames[1, 0, :, 0].tolist() == [left_behind, left_behind, 200, 200]


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_transparent_frames_are_laid_on_white(tmp_path: Path, kind: str) -> None:
    pictures = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(3)]
    for number, picture in enumerate(pictures):
        picture.paste((9, 9, 9, 255), (4 * number, 0, 4 * number + 4, 16))
    path = animate(tmp_path / f"a.{kind}", pictures, [100] * 3, disposal=2 if kind == "gif" else 1, **SAVE[kind])
    for number, frame in enumerate(sample_video(path, 3).frames.numpy()):
        expected = np.full((16, 16, 3), 255)
        expected[:, 4 * number : 4 * number + 4] = 9
        assert np.abs(frame.astype(int) - expected).max() <= 1, number


def test_the_picture_that_a_png_shows_to_others_is_no_frame(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.png", frames(), DELAYS[1:], default_image=True)
    video = sample_video(path, 5, split=(0, 4))
    assert shades(video)[0] == SHADES[1]
    assert shades(video)[-1] == SHADES[5]
    assert video.duration == pytest.approx(2.0)
    with pytest.raises(MediaError, match="its frames are 0 to 4"):
        sample_video(path, 1, split=(5, 5))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tiff", "clip.mp4"])
def test_a_still_picture_is_no_clip(tmp_path: Path, name: str) -> None:
    frames()[0].save(tmp_path / name, "PNG" if name == "clip.mp4" else None)
    with pytest.raises(MediaError, match=r"it is one still picture and no clip; give it as \"image\""):
        sample_video(str(tmp_path / name), 2)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2)])
def test_animations_that_were_not_written_in_full(tmp_path: Path, kind: str, harm: Callable[[bytes], bytes]) -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    path = Path(animate(tmp_path / f"a.{kind}", noise, **SAVE[kind]))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(MediaError, match=f"a.{kind}: cannot be read as an image"):
        sample_video(str(path), 2)
    data = write_sample(tmp_path / "a.json", f"a.{kind}")
    assert check([data, "--workers", "0"]) == 1


def test_long_animations_and_clips_of_pictures_have_limits(tmp_path: Path, folder: Path) -> None:
    path = animate(tmp_path / "a.gif", frames())
    for clip, name in ((path, "a.gif"), (str(folder), "clip")):
        with pytest.raises(MediaError, match=rf"{name}: .*more frames than --max_video_frames, 5"):
            sample_video(clip, 2, limits=MediaLimits(max_video_frames=5))
        with pytest.raises(MediaError, match=rf"{name}: .*3 frames of 32 x 24 are 2304 pixels"):
            sample_video(clip, 3, limits=MediaLimits(max_video_pixels=2303))


@pytest.mark.parametrize("timeout", [0.0, 60.0])
def test_a_folder_of_pictures_is_a_clip_in_the_order_of_their_numbers(folder: Path, timeout: float) -> None:
    video = sample_video(str(folder), 6, timeout=timeout)
    assert shades(video) == list(SHADES)
    assert video.times == (0, 1, 2, 3, 4, 5)
    quick = sample_video(str(folder), 3, frame_rate=10.0, split=(1, 5))
    assert (quick.indices, quick.duration) == ((1, 3, 5), pytest.approx(0.6))
    assert quick.times == pytest.approx((0.1, 0.3, 0.5))


def test_folders_that_are_no_clip(tmp_path: Path, folder: Path, media_dir: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match=r"empty: a folder, not a file; .* but it is empty"):
        sample_video(str(tmp_path / "empty"), 2)
    with pytest.raises(MediaError, match=r"a folder, not a file; .* but \S+ is none"):
        sample_video(str(media_dir), 2)
    frames()[0].save(folder / "frame007.jpg")
    with pytest.raises(MediaError, match=r"its pictures frame007\.jpg and frame7\.png have one place"):
        list_frames(str(folder))
    (folder / "frame007.jpg").unlink()
    Image.new("RGB", (8, 8)).save(folder / "frame8.png")
    with pytest.raises(MediaError, match=r"frame7\.png is 32 x 24, frame8\.png is 8 x 8"):
        sample_video(str(folder), 6)


def test_a_list_of_pictures_is_one_clip(folder: Path, tmp_path: Path, tiny_vision) -> None:
    paths = [f"clip/frame{number}.png" for number in (9, 8, 7)]
    data = write_sample(tmp_path / "a.json", paths, meta={"fps": 4})
    for options in ({}, {"cache_dir": str(tmp_path / "cache")}, {"cache_dir": str(tmp_path / "cache")}):
        (record,) = read_records(data, **options)
        (clip,) = record.media
        assert clip == Media("video", str(tmp_path / paths[0]), len(str(tmp_path)),
                             tuple(str(tmp_path / path) for path in paths), 4.0)  # fmt: skip
    loaded = load_media(clip, tiny_vision, timeout=60)
    assert loaded.times == pytest.approx((0, 0.25, 0.5))
    assert loaded.duration == pytest.approx(0.75)
    assert [round(float(frame.float().mean())) for frame in loaded.frames] == [SHADES[2], SHADES[1], SHADES[0]]
    assert check([data, "--workers", "0"]) == 0


def test_lists_of_lists_are_several_clips(folder: Path, tmp_path: Path) -> None:
    nested = [["clip/frame7.png", "clip/frame8.png"], ["clip/frame9.png"], "clip"]
    (record,) = read_records(write_sample(tmp_path / "a.json", nested, 3))
    assert [len(media.frames) for media in record.media] == [2, 1, 0]
    (record,) = read_records(write_sample(tmp_path / "a.json", ["a.gif", "b.gif"], 2))
    assert [media.frames for media in record.media] == [(), ()]
    with pytest.raises(ValueError, match=r"sample '1' .*\"video\" has 2 pictures and its text 2 <video>; give"):
        read_records(write_sample(tmp_path / "a.json", ["a.jpg", "b.jpg"], 2))
    with pytest.raises(ValueError, match="0 <video>, but the sample has 2 video files"):
        read_records(write_sample(tmp_path / "a.json", ["a.jpg", "b.jpg"], 0))
    with pytest.raises(ValueError, match=r'"meta\.fps" must be the frames a second of a clip, above 0, found 0'):
        read_records(write_sample(tmp_path / "a.json", ["a.jpg", "b.jpg"], meta={"fps": 0}))


def test_frames_without_a_rate_have_no_times_to_ask_for(folder: Path, tiny_vision) -> None:
    with pytest.raises(MediaError, match=r"frames without their rate, and --video_fps is set; give meta\.fps"):
        sample_video(str(folder), 4, fps=1.0)
    assert len(sample_video(str(folder), 4, fps=2.0, frame_rate=4.0).times) == 3
    vision = replace(tiny_vision, add_time_instruction=True)
    with pytest.raises(MediaError, match=r"frames without their rate, and --add_time_instruction is set"):
        load_media(Media("video", str(folder)), vision)
    assert load_media(Media("video", str(folder), fps=2.0), vision).duration == 3.0


@pytest.mark.parametrize("spelling", ["folder", "list"])
def test_frames_may_not_lie_elsewhere(folder: Path, tmp_path: Path, tiny_vision, spelling: str) -> None:
    frames()[0].save(tmp_path / "secret.png")
    (folder / "frame99.png").symlink_to(tmp_path / "secret.png")
    video = "." if spelling == "folder" else ["frame7.png", "frame99.png"]
    data = write_sample(tmp_path / "a.json", video if spelling == "list" else "inner")
    if spelling == "folder":
        (folder / "inner").mkdir()
        (folder / "inner/1.png").symlink_to(tmp_path / "secret.png")
    (record,) = read_records(data, video_folder=str(folder))
    with pytest.raises(MediaError, match=r"is a link to \S+secret\.png, which lies outside the folder"):
        load_media(record.media[0], tiny_vision)


def test_the_home_folder_in_data_files(media_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(media_dir))
    data = write_sample(tmp_path / "a.json", "~/a.mp4")
    (record,) = read_records(data, video_folder="~")
    assert record.media[0].path == str(media_dir / "a.mp4")
    (record,) = read_records(write_sample(tmp_path / "a.json", "a.mp4"), video_folder="~")
    assert record.media[0].path == str(media_dir / "a.mp4")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_records("~/a.json")) == 1
