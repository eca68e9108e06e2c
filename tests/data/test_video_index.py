"""What packets say of themselves."""

from __future__ import annotations

from llava.data.nal_units import PacketFacts
from llava.data.video_index import packet_reader


def test_what_packets_say_of_themselves() -> None:
    vp8, vp9, av1 = (packet_reader(codec, b"") for codec in ("vp8", "vp9", "av1"))
    assert vp8 is not None
    assert vp9 is not None
    assert av1 is not None
    # A hidden picture, one that is shown, a key frame, and a hidden key frame, of which nobody knows when it shows.
    facts = [vp8(bytes([first, 0, 0])) for first in (0x01, 0x11, 0x10, 0x00)]
    assert [fact and (fact.shown, fact.starts) for fact in facts] == [(0, False), (1, False), (1, True), None]
    # A hidden picture alone, and one in front of another in a packet with their sizes.
    assert vp9(b"\x84\x00") == PacketFacts(shown=0)
    key, hidden, shown = b"\x82\x00", b"\x84\x00", b"\x86\x00"
    index = bytes([0xC1, 2, 2, 0xC1])
    assert vp9(key + hidden + index) == PacketFacts(shown=1, starts=True, closed=True)
    assert vp9(hidden + shown + index) == PacketFacts(shown=1)
    assert vp9(shown + shown + index) == PacketFacts(shown=2)
    # A header of the sequence and a key frame; the frame without the header, where decoding cannot begin.
    assert av1(b"\x0a\x01\x00\x32\x01\x10") == PacketFacts(shown=1, starts=True, closed=True)
    frame = av1(b"\x32\x01\x10")
    assert frame is not None
    assert not frame.starts
    assert packet_reader("wmv2", b"") is None


def test_a_header_that_ends_with_its_packet_says_nothing() -> None:
    read = packet_reader("mpeg2video", b"")
    assert read is not None
    picture, extension = b"\0\0\1\0\0\x08", b"\0\0\1\xb5"
    facts = [read(picture + extension + rest) for rest in (b"", b"\x80", b"\x80\0\3")]
    assert [found and found.shown for found in facts] == [1, 1, 1]
