"""Damaged pictures and clips: an error that names the file, or pixels that stand in it; no hang, no crash, no bomb."""

from __future__ import annotations

import io
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA
from fuzzing import attempt, cases
from hypothesis import given
from hypothesis import strategies as st
from mutated_media import Files, ebml_elements, mutated, write_clips, write_pictures

from llava.data.decoding import DecoderProcess, FrameRequest, Frames
from llava.data.images import read_image_size, read_picture
from llava.data.media_files import MediaError, MediaLimits

SHARED = SHARED_DATA if SHARED_DATA.is_dir() else None
LIMITS = MediaLimits(
    max_image_pixels=2_000_000, max_image_bytes=10_000_000, max_video_pixels=40_000_000, max_video_frames=2000
)
TIMEOUT = 30.0
MOST_MEMORY = 1 << 30
"""Bytes that a decoder may need at its peak with these limits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def clips(folder) -> Files:
    return write_clips(folder / "clips", SHARED)


@pytest.fixture(scope="module")
def pictures() -> Files:
    return write_pictures(SHARED)


class Decoder:
    """A decoder process whose memory is measured; another where a file has brought one down."""

    def __init__(self) -> None:
        self._process: DecoderProcess | None = None

    def decode(self, request: FrameRequest) -> Frames | MediaError:
        """Frames, or the error that a run would note; a hang, a crash and too much memory are findings."""
        if self._process is None or not self._process.alive:
            self._process = DecoderProcess()
        begin = time.monotonic()
        try:
            return self._process.decode(request, TIMEOUT)
        except MediaError as error:
            said = str(error)
            assert said.startswith(request.path), said
            assert "\n" not in said
            assert "takes longer" not in said, said
            assert "does not fit into memory" not in said, said
            assert "brought the decoder down" not in said, said
            return error
        finally:
            assert time.monotonic() - begin < TIMEOUT + 10
            assert self.most_memory() < MOST_MEMORY

    def most_memory(self) -> int:
        """The most bytes that the process has had; 0 where the system does not say, or it is gone."""
        status = Path(f"/proc/{self._process._process.pid}/status") if self._process is not None else Path("/nothing")
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)

    def end(self) -> None:
        if self._process is not None:
            self._process.end()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.end()


def ask(path: Path, num_frames: int = 3, dense: bool = False) -> FrameRequest:
    """For a few frames of a file, or for all of them."""
    return FrameRequest(
        str(path), num_frames, fps=100_000.0 if dense else 0.0, max_frames=0 if dense else 32, limits=LIMITS
    )


def check_frames(frames: Frames, num_frames: int) -> None:
    """What holds for every clip that decodes."""
    count, height, width, channels = frames.pixels.shape
    assert (count, channels) == (num_frames, 3)
    assert 0 < height * width <= LIMITS.max_image_pixels
    assert len(frames.indices) == len(frames.times) == num_frames
    assert list(frames.indices) == sorted(frames.indices)
    assert frames.indices[0] >= 0
    assert list(frames.times) == sorted(frames.times)
    assert all(math.isfinite(second) and second >= 0 for second in (*frames.times, frames.duration))
    assert frames.duration >= frames.times[-1]


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@cases(offline=1500, in_ci=45)
@given(st.data(), st.integers(1, 5))
def test_a_damaged_clip_is_refused_or_gives_frames_that_stand_in_it(decoder, clips, folder, data, num_frames):
    name, content = data.draw(mutated(clips))
    path = write(folder, name, content)
    frames = decoder.decode(ask(path, num_frames))
    if isinstance(frames, MediaError):
        return
    check_frames(frames, num_frames)
    again = decoder.decode(ask(path, num_frames))
    assert isinstance(again, Frames)
    assert np.array_equal(again.pixels, frames.pixels)
    # All frames, decoded one behind the other, have the few that were sought in their places.
    every = decoder.decode(ask(path, dense=True))
    if isinstance(every, Frames) and list(every.indices) == list(range(len(every.indices))):
        places = list(frames.indices)
        assert [every.times[place] for place in places] == list(frames.times)
        assert np.array_equal(every.pixels[places], frames.pixels)


_SECTOR = 512


def cut_off(content: bytes, length: int, with_zeros: bool) -> bytes:
    """A file that ends early, or that was written up to a sector of the disk, behind which it is zeros."""
    if with_zeros and (whole := length // _SECTOR * _SECTOR) + _SECTOR <= len(content):
        return content[:whole] + bytes(len(content) - whole)
    return content[:length]


_OPEN_ENDED = (".ts", ".mpg", ".flv", ".wmv", "_fragments.mp4")
"""Containers that may end behind any packet or fragment: a shorter recording of theirs is whole."""
_STORED = ("rgb.bmp", "rgb.ppm", "rgb.tga", "rgb.tif", "rgb.sgi")
"""Pictures whose pixels are stored as they are."""


@cases(offline=700, in_ci=25)
@given(st.data(), st.booleans())
def test_a_clip_that_is_cut_off_is_refused_or_whole(decoder, clips, folder, data, with_zeros):
    name = data.draw(st.sampled_from(sorted(clips)))
    content = clips[name]
    length = data.draw(
        st.one_of(st.integers(0, len(content) - 1), st.integers(max(len(content) - 300, 0), len(content) - 1))
    )
    whole = decoder.decode(ask(write(folder, f"whole_{name}", content), dense=True))
    frames = decoder.decode(ask(write(folder, name, cut_off(content, length, with_zeros)), dense=True))
    if isinstance(frames, MediaError):
        return
    assert isinstance(whole, Frames)
    kept = len(frames.indices)
    if not name.endswith(_OPEN_ENDED):
        assert kept == len(whole.indices), f"{kept} of {len(whole.indices)} frames"
    assert np.array_equal(frames.pixels, whole.pixels[:kept])
    assert frames.times == whole.times[:kept]


def reference(content: bytes) -> np.ndarray | None:
    """What Pillow alone makes of a plain picture; None for those that are read otherwise here, or not at all."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        if image.mode not in ("RGB", "L", "CMYK", "YCbCr", "1", "P") or "transparency" in image.info:
            return None
        # Pages of a TIFF are looked for by reading each, and the second may be damaged; the first is what is read.
        if image.format != "TIFF" and getattr(image, "n_frames", 1) > 1:
            return None
        image.load()
        upright = ImageOps.exif_transpose(image)
        return None if upright.has_transparency_data else np.array(upright.convert("RGB"))


def read_all(path: Path) -> tuple[np.ndarray, tuple[int, int]] | ValueError:
    """The pixels of a picture, and the size that its header says."""
    found = attempt(lambda: (read_picture(str(path), LIMITS), read_image_size(str(path))))
    assert not isinstance(found, ValueError) or str(found).startswith(str(path))
    return found


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what is wrong in metadata.
@cases(offline=1200, in_ci=80)
@given(st.data())
def test_a_damaged_picture_is_refused_or_is_what_its_bytes_say(pictures, folder, data):
    name, content = data.draw(mutated(pictures))
    path = write(folder, name, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_all(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    if isinstance(found, ValueError):
        return
    pixels, size = found
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*size, 3)
    assert pixels.size <= 3 * LIMITS.max_image_pixels
    expected = reference(content)
    if expected is not None:
        assert np.array_equal(pixels, expected)


@pytest.mark.filterwarnings("ignore")
@cases(offline=500, in_ci=60)
@given(st.data(), st.booleans())
def test_a_picture_that_is_cut_off_is_refused_or_whole(pictures, folder, data, with_zeros):
    name = data.draw(st.sampled_from(sorted(pictures)))
    content = pictures[name]
    length = data.draw(
        st.one_of(st.integers(0, len(content) - 1), st.integers(max(len(content) - 40, 0), len(content) - 1))
    )
    whole = read_all(write(folder, f"whole_{name}", content))
    # Zeros behind the end of a row that is stored as it is are black rows.
    found = read_all(write(folder, name, cut_off(content, length, with_zeros and name not in _STORED)))
    if not isinstance(found, ValueError):
        assert np.array_equal(found[0], whole[0]), f"{name}, cut at {length} of {len(content)}"


@pytest.mark.filterwarnings("ignore")
@cases(offline=300, in_ci=20)
@given(st.data(), st.integers(1, 4))
def test_a_damaged_animation_is_refused_or_has_its_frames(decoder, pictures, folder, data, num_frames):
    moving = Files({name: pictures[name] for name in pictures if name.startswith(("animated", "still", "rgb.avif"))})
    name, content = data.draw(mutated(moving))
    path = write(folder, name, content)
    frames = decoder.decode(ask(path, num_frames))
    if isinstance(frames, Frames):
        check_frames(frames, num_frames)
        again = decoder.decode(ask(path, num_frames))
        assert isinstance(again, Frames)
        assert np.array_equal(again.pixels, frames.pixels)


# What was found, as cases of their own.


@pytest.mark.parametrize("name", ["vp8.webm", "h264.mkv"])
def test_a_matroska_whose_copy_ends_behind_the_id_of_a_block(decoder, clips, folder, name):
    """Its length then begins with a zero, as none does; all behind it was left out without a word."""
    content = clips[name]
    blocks = [start for start, _ in ebml_elements(content) if content[start] in (0xA0, 0xA3)]
    assert len(blocks) > 12
    for start in blocks[:10]:
        cut = content[: start + 1] + bytes(len(content) - start - 1)
        assert isinstance(decoder.decode(ask(write(folder, name, cut), dense=True)), MediaError)


@pytest.mark.parametrize("name", ["rgb.pcx", "rle.tga", "rle.sgi"])
def test_runs_of_pixels_that_end_in_zeros_were_not_written_in_full(pictures, folder, name):
    content = pictures[name]
    with pytest.raises(MediaError, match=r"its end is zeros|truncated"):
        read_picture(str(write(folder, name, content[:2000] + bytes(len(content) - 2000))))
    whole = read_picture(str(write(folder, name, content)))
    assert np.array_equal(read_picture(str(write(folder, name, content + bytes(3000)))), whole)


def test_a_palette_with_unused_colours_is_no_end_of_zeros(folder):
    from PIL import Image

    picture = Image.new("P", (9, 7), 3)
    picture.putpalette([10, 20, 30] * 4)
    picture.save(folder / "palette.pcx")
    assert (folder / "palette.pcx").read_bytes().endswith(bytes(700))
    assert (read_picture(str(folder / "palette.pcx")) == (10, 20, 30)).all()
