"""Media files: what asks for too much is an error before it is decoded, and paths stay in the folder of media."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from clips import encode
from PIL import Image

from llava.data.check import main as check
from llava.data.dataset import SupervisedDataset
from llava.data.images import read_image_size
from llava.data.media import check_links, load_image, load_media, sample_video
from llava.data.media_files import DEFAULT_LIMITS, PILLOW_LIMIT, MediaError, MediaLimits, find_media
from llava.data.records import parse_record, read_records
from llava.train.arguments import DataArguments
from llava.types import Media


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, width: int, height: int, *chunks: bytes, depth: int = 8) -> Path:
    """A PNG that declares a size; of its pixels there are none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    ending = png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + ending)
    return path


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding any pixel of an image fails the test."""
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *args: pytest.fail("decoded"))


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (10_001, 10_000, r"it is 10001 x 10000 pixels, 100010000, but --max_image_pixels is 100000000"),
        (100_000, 100_000, r"10000000000 pixels.* limit of 178956970 .*--max_image_pixels is 100000000"),
        (2**31 - 1, 2**31 - 1, r"--max_image_pixels is 100000000"),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_declares_too_much(tmp_path, depth: int, width: int, height: int, message: str) -> None:
    path = write_png(tmp_path / "bomb.png", width, height, depth=depth)
    assert path.stat().st_size < 200
    with pytest.raises(MediaError, match=message) as caught:
        load_image(str(path))
    assert str(path) in str(caught.value)
    assert Image.MAX_IMAGE_PIXELS == PILLOW_LIMIT // 2, "this is the process's, not ours, to set"


def test_text_that_unpacks_to_too_much(tmp_path) -> None:
    text = png_chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(200_000_000)))
    path = write_png(tmp_path / "text.png", 4, 4, text)
    for read in (load_image, read_image_size):
        with pytest.raises(MediaError, match=r"text\.png: cannot be read as an image"):
            read(str(path))


def test_an_image_within_its_limits(media_dir) -> None:
    path = media_dir / "a.png"  # 90 x 60
    size = path.stat().st_size
    assert load_image(str(path), MediaLimits(max_image_pixels=5400, max_image_bytes=size)).shape == (60, 90, 3)
    with pytest.raises(MediaError, match=r"a\.png.*it is 90 x 60 pixels, 5400, but --max_image_pixels is 5399"):
        load_image(str(path), MediaLimits(max_image_pixels=5399))
    with pytest.raises(MediaError, match=rf"a\.png.*its file has {size} bytes, but --max_image_bytes is {size - 1}"):
        load_image(str(path), MediaLimits(max_image_bytes=size - 1))


def test_of_a_large_animation_one_picture_is_decoded(tmp_path) -> None:
    pictures = [Image.new("P", (200, 200), i) for i in range(2)] * 100
    pictures[0].save(tmp_path / "long.gif", save_all=True, append_images=pictures[1:])
    assert load_image(str(tmp_path / "long.gif"), MediaLimits(max_image_pixels=40_000)).shape == (200, 200, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_absurd_orientation_is_upright(tmp_path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4)).save(tmp_path / "absurd.jpg", exif=exif)
    assert load_image(str(tmp_path / "absurd.jpg")).shape == (4, 8, 3)
    assert read_image_size(str(tmp_path / "absurd.jpg")) == (4, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "webp", "tiff"])
def test_the_header_tells_the_size_of_the_upright_picture(tmp_path, suffix: str, orientation: int) -> None:
    """Of 5 to 8, two mirrored ones among them, the picture lies on its side in the file."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"a.{suffix}")
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    expected = (4, 8) if orientation < 5 else (8, 4)
    assert read_image_size(path) == expected
    assert load_image(path).shape == (*expected, 3)


@pytest.mark.parametrize("kind", range(14))
def test_absurd_exif_leaves_a_picture_as_it_is_stored(tmp_path, kind: int) -> None:
    """An orientation of a wrong type, or one that lies behind the end of the file, says nothing."""
    for count in (1, 2**16, 2**32 - 1):
        path = write_oriented(tmp_path / "exif.jpg", kind, count, 2**31)
        assert load_image(path)[:, :4].float().mean() > 200
        assert load_image(path)[:, 4:].float().mean() < 50
        assert read_image_size(path) == (4, 8)


def test_an_orientation_of_the_right_type_says_something(tmp_path) -> None:
    path = write_oriented(tmp_path / "exif.jpg", 3, 1, 6)
    assert load_image(path)[:4].float().mean() > 200
    assert load_image(path)[4:].float().mean() < 50
    assert read_image_size(path) == (8, 4)


def write_oriented(path: Path, kind: int, count: int, value: int) -> str:
    """A JPEG of 8 x 4, bright on its left half, with an orientation of this type, length and value or place."""
    entry = struct.pack("<HHII", 0x0112, kind, count, value)
    tags = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<H", 1) + entry + bytes(4)
    stream = io.BytesIO()
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    jpeg = stream.getvalue()
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tags) + 2) + tags + jpeg[2:])
    return str(path)


def test_postscript_is_no_picture(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("ran a program"))
    Image.new("RGB", (8, 4)).save(tmp_path / "program.eps")
    (tmp_path / "program.jpg").write_bytes((tmp_path / "program.eps").read_bytes())
    with pytest.raises(MediaError, match=r"program\.jpg: .*it is PostScript"):
        load_image(str(tmp_path / "program.jpg"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_image_pixels": 64 * 48 - 1}, "it is 64 x 48 pixels, 3072, but --max_image_pixels is 3071"),
        ({"max_video_pixels": 4 * 3072 - 1}, "4 frames of 64 x 48 are 12288 pixels, but --max_video_pixels is 12287"),
        ({"max_video_frames": 11}, "it has more frames than --max_video_frames, 11"),
    ],
)
@pytest.mark.parametrize("timeout", [0.0, 60.0])
def test_a_video_that_asks_for_too_much(media_dir, timeout: float, limits: dict[str, int], message: str) -> None:
    with pytest.raises(MediaError, match=rf"a\.mp4: .*{message}"):
        sample_video(str(media_dir / "a.mp4"), 4, limits=MediaLimits(**limits), timeout=timeout)
    exact = {name: value + 1 for name, value in limits.items()}
    assert len(sample_video(str(media_dir / "a.mp4"), 4, limits=MediaLimits(**exact), timeout=timeout).frames) == 4


def test_frames_are_not_decoded_to_be_counted_for_ever(tmp_path) -> None:
    # An AVI does not say when its frames are shown: they are counted by decoding them.
    with av.open(str(tmp_path / "long.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="more frames than --max_video_frames, 29"):
        sample_video(str(tmp_path / "long.avi"), 4, limits=MediaLimits(max_video_frames=29))


def test_the_decoder_itself_keeps_the_limit(tmp_path) -> None:
    # The header speaks of the first clip's size; the second one's frames are larger.
    parts = [encode(tmp_path / f"{width}.h264", numbers=range(3), size=(width, 48)) for width in (64, 640)]
    (tmp_path / "a.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    limits = MediaLimits(max_image_pixels=64 * 48)
    with pytest.raises(MediaError, match=r"a\.h264: cannot be decoded as a video: (?!its picture changes size)"):
        sample_video(str(tmp_path / "a.h264"), 2, limits=limits)
    with pytest.raises(MediaError, match="its picture changes size on the way, from 64 x 48 to 640 x 48 at frame 3"):
        sample_video(str(tmp_path / "a.h264"), 2)


def test_a_list_of_other_files_is_no_video(media_dir, tmp_path) -> None:
    (tmp_path / "a.mp4").write_bytes((media_dir / "a.mp4").read_bytes())
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(MediaError, match=r"list\.mp4: .*it is a list of other files, not a video"):
        sample_video(str(tmp_path / "list.mp4"), 2)


def test_flags_become_limits(media_dir, tiny_vision) -> None:
    assert DataArguments(data_path=["x"]).media_limits == DEFAULT_LIMITS
    limits = DataArguments(data_path=["x"], max_image_pixels=99).media_limits
    with pytest.raises(MediaError, match="--max_image_pixels is 99"):
        load_media(Media("image", str(media_dir / "a.png")), tiny_vision, limits=limits)
    with pytest.raises(ValueError, match="--max_video_frames is 0; it must be at least 1"):
        DataArguments(data_path=["x"], max_video_frames=0)
    with pytest.raises(ValueError, match=r"--max_image_pixels is 200000000; it can be at most 178956970"):
        DataArguments(data_path=["x"], max_image_pixels=200_000_000)


# Paths in data files: by their spelling and through links


TURNS = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "una stella"}]


@pytest.fixture
def folders(tmp_path: Path, media_dir: Path) -> Path:
    """A folder of media with a data file, and a picture beside the folder."""
    shutil.copy(media_dir / "a.png", tmp_path / "secret.png")
    (tmp_path / "media").mkdir()
    shutil.copy(media_dir / "a.png", tmp_path / "media" / "a.png")
    return tmp_path


def write(folders: Path, path: str, **more) -> str:
    file = folders / "media" / "data.json"
    file.write_text(json.dumps([{"id": "x", "image": path, "conversations": TURNS, **more}]))
    return str(file)


@pytest.mark.parametrize("path", ["a.png", "./a.png", "sub/../a.png", "../media/a.png", "{root}/media/a.png"])
def test_paths_inside(folders: Path, path: str) -> None:
    (media,) = read_records(write(folders, path.format(root=folders)))[0].media
    assert media == Media("image", f"{folders}/media/a.png", len(f"{folders}/media"))
    check_links(media)


@pytest.mark.parametrize(
    "path", ["../secret.png", "a/../../secret.png", "{root}/secret.png", "/etc/passwd", "{root}/media2/a.png", "."]
)
def test_paths_outside(folders: Path, path: str) -> None:
    path = path.format(root=folders)
    with pytest.raises(ValueError, match=r"^sample 'x' \(data\.json, sample 1\): its image ") as caught:
        read_records(write(folders, path))
    assert f"{path!r} lies outside the folder {folders}/media; give the folder that has it with --image_folder" in str(
        caught.value
    )
    (media,) = read_records(write(folders, path), allow_outside_paths=True)[0].media
    assert media.root == 0
    check_links(media)


def test_another_folder_allows_other_paths(folders: Path) -> None:
    (media,) = read_records(write(folders, f"{folders}/secret.png"), image_folder=str(folders))[0].media
    assert media.path == f"{folders}/secret.png"
    # Of the root every path is inside, and so is the whole of it.
    assert find_media("/etc/passwd", "image", "/", False, "x") == Media("image", "/etc/passwd", 1)
    check_links(Media("image", "/etc/passwd", 1))


def test_an_empty_folder_takes_paths_as_they_are(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in the LLaVA family: relative to where the program runs, and absolute ones wherever they lead.
    monkeypatch.chdir(folders)
    for path in (f"{folders}/secret.png", "secret.png", "../" + folders.name + "/secret.png"):
        (media,) = read_records(write(folders, path), image_folder="", cache_dir=str(folders / "cache"))[0].media
        assert media == Media("image", f"{folders}/secret.png")
    # What the current folder was is a part of what was read; videos keep to their own folder.
    monkeypatch.chdir(folders / "media")
    (media,) = read_records(write(folders, "secret.png"), image_folder="", cache_dir=str(folders / "cache"))[0].media
    assert media.path == f"{folders}/media/secret.png"
    with pytest.raises(ValueError, match=r"its image .* lies outside the folder"):
        read_records(write(folders, f"{folders}/secret.png"), video_folder="")


def test_a_source_is_no_way_out(folders: Path) -> None:
    with pytest.raises(ValueError, match="lies outside the folder"):
        read_records(write(folders, "secret.png", source=".."))
    with pytest.raises(ValueError, match="lies outside the folder"):
        parse_record({"id": 1, "video": "v.mp4", "conversations": [{"from": "gpt", "value": "<video>"}]}, "x",
                     "/i", "/v", "../w")  # fmt: skip


def test_links_that_lead_out(folders: Path, visual_tokenizer, tiny_vision) -> None:
    (folders / "media" / "link.png").symlink_to(folders / "secret.png")
    path = write(folders, "link.png")
    message = rf"link\.png: is a link to {folders}/secret\.png, which lies outside the folder {folders}/media"
    with pytest.raises(ValueError, match=rf"sample 'x' \(data\.json, sample 1\): .*{message}"):
        SupervisedDataset(read_records(path), visual_tokenizer, tiny_vision, 512)[0]
    assert check([path, "--workers", "0"]) == 1
    allowed = read_records(path, allow_outside_paths=True)
    assert SupervisedDataset(allowed, visual_tokenizer, tiny_vision, 512)[0].media
    assert check([path, "--workers", "0", "--allow_outside_paths"]) == 0


def test_a_folder_may_be_a_link_and_hold_links_to_itself(folders: Path) -> None:
    (folders / "elsewhere").symlink_to(folders / "media")
    (folders / "media" / "link.png").symlink_to("a.png")
    (media,) = read_records(write(folders, "link.png"), image_folder=str(folders / "elsewhere"))[0].media
    assert media.path == f"{folders}/elsewhere/link.png"
    check_links(media)


def test_a_missing_file_is_missing_not_outside(folders: Path, visual_tokenizer, tiny_vision) -> None:
    records = read_records(write(folders, "gone.png"))
    with pytest.raises(ValueError, match=r"gone\.png: no such file"):
        SupervisedDataset(records, visual_tokenizer, tiny_vision, 512)[0]
    (folders / "media" / "gone.png").symlink_to("/nowhere")
    with pytest.raises(MediaError, match="is a link to /nowhere"):
        check_links(records[0].media[0])


def test_indexes_do_not_remember_what_was_allowed(folders: Path, tmp_path: Path) -> None:
    path, cache = write(folders, "../secret.png"), str(tmp_path / "cache")
    assert len(read_records(path, cache_dir=cache, allow_outside_paths=True)) == 1
    with pytest.raises(ValueError, match="lies outside the folder"):
        read_records(path, cache_dir=cache)
