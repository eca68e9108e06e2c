"""A clip whose frames' times were changed is damaged; what it claims does not become the length of a sample."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_video

from llava.data.decoding import FrameRequest, decode_frames, read_times
from llava.data.media_files import MediaError


@pytest.mark.parametrize(("box", "place"), [(b"stts", 16), (b"mdhd", 16)])
def test_times_beyond_the_end_of_the_container(tmp_path: Path, box: bytes, place: int) -> None:
    content = write_video(tmp_path / "clip.mp4", num_frames=24).read_bytes()
    assert read_times(str(tmp_path / "clip.mp4"))[1] == pytest.approx(3.0)
    at = content.find(box) + place
    value = b"\x7f\xff\xff\xff" if box == b"stts" else b"\0\0\0\1"
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content[:at] + value + content[at + 4 :])
    with pytest.raises(MediaError, match=r"damaged\.mp4: .* lasts [\d,]+ seconds, and its container says 3\.0"):
        decode_frames(FrameRequest(str(damaged), num_frames=3))
