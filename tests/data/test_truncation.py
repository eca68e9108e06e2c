"""Files that end before their container says so, byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from llava.data.containers import check_complete


def box(kind: bytes, payload: bytes = b"", wide: bool = False) -> bytes:
    """A box of an MP4; a wide one has its length in eight bytes."""
    if wide:
        return struct.pack(">I4sQ", 1, kind, 16 + len(payload)) + payload
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


FTYP = box(b"ftyp", b"isom" + bytes(4))
MOOV = box(b"moov", bytes(100))


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check_complete(str(path), len(content))


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("moov_first", [False, True])
def test_a_box_that_ends_behind_the_file(tmp_path: Path, wide: bool, moov_first: bool) -> None:
    mdat = box(b"mdat", bytes(range(256)) * 4, wide)
    whole = FTYP + (MOOV + mdat if moov_first else mdat + MOOV)
    check(tmp_path / "a.mp4", whole)
    check(tmp_path / "a.mp4", whole + box(b"free", bytes(20)))
    for end in (len(whole) - 1, len(whole) - 90, len(FTYP) + 40):
        # What is cut off may be a box that only the one before it has room for.
        if end > len(FTYP) + 16:
            message = r"it is cut off: its container speaks of \d+ bytes, the file has " + str(end)
            with pytest.raises(ValueError, match=message):
                check(tmp_path / "a.mp4", whole[:end])


def test_a_length_of_64_bits_is_read_whole(tmp_path: Path) -> None:
    """Its upper half too: such boxes are there for files above 4 GB."""
    length = (3 << 32) + 40
    header = struct.pack(">I4sQ", 1, b"mdat", length)
    with pytest.raises(ValueError, match=f"speaks of {len(FTYP) + length} bytes, the file has {len(FTYP) + 100}"):
        check(tmp_path / "a.mp4", FTYP + header + bytes(84))
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
    check(tmp_path / "a.mp4", FTYP + box(b"mdat", bytes(32)) + MOOV + junk)


@pytest.mark.parametrize("length", [2, 4, 7])
def test_an_impossible_length_does_not_hide_what_was_cut_before_it(tmp_path: Path, length: int) -> None:
    mdat = struct.pack(">I4s", 5000, b"mdat")
    with pytest.raises(ValueError, match=f"speaks of {len(FTYP) + 5000} bytes"):
        check(tmp_path / "a.mp4", FTYP + mdat + struct.pack(">I4s", length, b"junk") + bytes(40))


def test_a_box_to_the_end_of_the_file(tmp_path: Path) -> None:
    check(tmp_path / "a.mp4", FTYP + MOOV + struct.pack(">I4s", 0, b"mdat") + bytes(500))
