"""Which frames a video has, when they are shown, and where decoding may begin, told from its packets alone.

Decoding all of a clip to count its frames would take minutes. But the marks of a container are not enough: a packet
may be marked as a key frame and be none, hold two pictures or a hidden one, or begin a group that refers to the group
before it. So packets are read in part, by one reader per codec; a clip of a codec without a reader can only be decoded
from the beginning of its file.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llava.data.media_files import DEFAULT_LIMITS, MediaLimits
from llava.data.nal_units import Bits, H264Reader, HevcReader, PacketFacts

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video stream, in the order in which they are shown.

    Attributes:
        times: presentation time of each frame, ascending, in units of the stream's time base.
        keys: presentation times of the packets at which decoding may begin, ascending; from each of them on all
            frames are exact.
        key_targets: for each of them, the earlier of its presentation and its decoding time.
        key_sizes: for each of them, its bytes.
        order: place in the file of each packet, by its presentation time and its bytes.
        plain: whether decord reads the frames right: each packet that is marked as a key frame begins a group that
            stands alone, every packet is shown, and nothing but decoding is asked for.
    """

    times: list[int]
    keys: list[int]
    key_targets: list[int]
    key_sizes: list[int]
    order: dict[tuple[int | None, int], int]
    plain: bool

    def key_before(self, time: int) -> int:
        """Position in ``keys`` of the last one at or before a time, 0 where there is none."""
        return max(bisect_right(self.keys, time) - 1, 0)


class _Packet(NamedTuple):
    """What is kept of a packet: all but its data."""

    pts: int
    dts: int | None
    size: int
    is_keyframe: bool
    is_discard: bool
    facts: PacketFacts


def index_packets(
    container: InputContainer, stream: VideoStream, limits: MediaLimits = DEFAULT_LIMITS
) -> tuple[VideoIndex | None, VideoFrame | None]:
    """Read the packets of a stream, of which only the first are decoded, up to the first frame.

    Args:
        container: at its beginning.
        stream: the video stream.
        limits: say how many frames there may be; more are a ValueError.

    Returns:
        The index, or None where packets do not say clearly which frames are shown, when, or where decoding may begin:
        such a video can only be decoded from its beginning. And the first frame that is shown, if there is any.
    """
    context = stream.codec_context
    codec = context.codec.canonical_name
    read = packet_reader(codec, bytes(context.extradata or b""))
    packets: list[_Packet] | None = []
    first = None
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(decode_start(packet)), None)
        if packet.size:
            check_packet(packet, codec, container.format.name)
            facts = read(bytes(packet)) if read is not None and packets is not None else None
            # New settings of the decoder may be another size, or another codec.
            if facts is None or packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata"):
                packets = None
            elif packets is not None:
                packets.append(
                    _Packet(packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard, facts)
                )
                limits.check_length(len(packets))
        if packets is None and first is not None:
            break
    if not packets or (container.format.name == "avi" and not all(packet.facts.starts for packet in packets)):
        return None, first  # AVI does not say when frames are shown
    index = _build_index(packets, getattr(context, "reorder_depth", 0) or 0)
    if index is None or first is None or first.pts != index.times[0]:
        return None, first
    return index, first


def decode_start(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames that a packet brings at the beginning of a file.

    A recording may begin in the middle of a group: what comes before its first frame need not be decodable.
    """
    import av

    try:
        return packet.decode()
    except av.error.InvalidDataError:
        return []


def _build_index(packets: Sequence[_Packet], decoder_depth: int) -> VideoIndex | None:
    """The index of a stream, or None where its packets leave open which frames are shown, and in which order.

    Args:
        packets: all of them, in the order of the file.
        decoder_depth: how many frames the decoder holds back until it shows the first.
    """
    if not packets[0].facts.starts:
        return None
    shown = _shown(packets)
    times = sorted(packet.pts for packet in shown)
    if not times or len(set(times)) < len(times) or not _is_in_order(packets, shown):
        return None
    # A decoder that holds back fewer frames than the stream needs shows some too early, out of order.
    depth = _reorder_depth([packet.pts for packet in shown])
    promised = packets[-1].facts.num_reordered
    if depth > max(decoder_depth, promised or 0) and any(p.facts.reorders for p in packets):
        return None
    keys = sorted((p.pts, p.pts if p.dts is None else min(p.pts, p.dts), p.size) for p in packets if p.facts.starts)
    plain = len(shown) == len(packets) and all(p.facts.closed or not (p.is_keyframe or p.facts.starts) for p in packets)
    return VideoIndex(
        times=times,
        keys=[time for time, _, _ in keys],
        key_targets=[target for _, target, _ in keys],
        key_sizes=[size for _, _, size in keys],
        order={(packet.pts, packet.size): place for place, packet in enumerate(packets)},
        plain=plain and packets[0].is_keyframe and not any(packet.facts.special for packet in packets),
    )


def _shown(packets: Sequence[_Packet]) -> list[_Packet]:
    """The packets that a decode of all the file shows, in the order of the file."""
    shown, restarted = [], False
    for packet in packets:
        facts = packet.facts
        if facts.starts:
            restarted = facts.restarts
        if facts.leading and restarted:
            continue
        # Before the first picture are those that refer to what is not in the file.
        if facts.shown and not packet.is_discard and (facts.may_lead or packet.pts >= packets[0].pts):
            shown.append(packet)
    return shown


def _is_in_order(packets: Sequence[_Packet], shown: Sequence[_Packet]) -> bool:
    """Whether frames are shown in the order of their times: decoders do not look at these.

    At a place where decoding may begin, all that was decoded before is shown before its picture, and before all
    that follows where it is closed. In a file of clips that were joined, times may overlap there.
    """
    on_screen = {packet.pts for packet in shown}
    earliest: list[float] = []  # of the frames from each packet on, from the last packet to the first
    low = math.inf
    for packet in reversed(packets):
        low = min(low, packet.pts) if packet.pts in on_screen else low
        earliest.append(low)
    high = -math.inf
    for packet, low in zip(packets, reversed(earliest), strict=True):
        if packet.facts.starts and (low if packet.facts.closed else packet.pts) <= high:
            return False
        high = max(high, packet.pts) if packet.pts in on_screen else high
    return True


def _reorder_depth(times: Sequence[int]) -> int:
    """How many frames at most are decoded before another one and shown behind it."""
    seen: list[int] = []
    depth = 0
    for time in times:
        depth = max(depth, len(seen) - bisect_left(seen, time))
        insort(seen, time)
    return depth


# What a packet shows, and whether decoding may begin at it, by codec.

PacketReader = Callable[[bytes], PacketFacts | None]
"""Reads one packet; None where it does not say clearly what it shows."""

_INTRA = PacketFacts(shown=1, starts=True, closed=True)
_INTER = PacketFacts(shown=1)
_HIDDEN = PacketFacts(shown=0)

# Every packet of these is one picture of its own.
_INTRA_CODECS = (
    "mjpeg", "prores", "dnxhd", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "dvvideo", "jpeg2000", "v210", "cfhd",
)  # fmt: skip


def packet_reader(codec: str, extradata: bytes) -> PacketReader | None:
    """The reader for packets of a codec, or None where only decoding from the beginning tells which frames there are.

    Args:
        codec: FFmpeg's name of the codec, not of the decoder.
        extradata: what the container says of the whole stream.
    """
    if codec == "h264":
        return H264Reader(extradata)
    if codec == "hevc":
        return HevcReader(extradata)
    if codec in _INTRA_CODECS:
        return lambda data: _INTRA
    return _READERS.get(codec)


# Packets that are cut, or were not copied.

_RAW_CODECS = ("rawvideo", "v210")
_START_CODE_CODECS = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vc1")
_RUN = bytes(64)
# Their packets begin with a mark; longer runs are what files are cut into on a disk or for a download.
_NEVER_ZERO_FIRST = ("vp8", "vp9", "av1", "mjpeg", "theora", "flv1", "h263")
_PAGE = bytes(4096)


def check_packet(packet: Packet[VideoStream], codec: str, container: str) -> None:
    """A ValueError for a packet that is cut, or of nothing but zeros, as a download that was not finished leaves them.

    Args:
        packet: one of PyAV's, not empty.
        codec: FFmpeg's name of the codec.
        container: libav's name of the container; in a transport stream packets are lost on the air.
    """
    if packet.is_corrupt and container != "mpegts":
        raise ValueError("it is cut off or damaged: one of its packets is incomplete")
    if codec not in _RAW_CODECS and _has_hole(bytes(packet), codec):
        raise ValueError("part of it holds only zeros, so it was not copied or downloaded in full")


def _has_hole(data: bytes, codec: str) -> bool:
    """Whether zeros stand in a packet where its encoder wrote others."""
    starts_with_zeros = len(data) > 8 and not any(data[:8])
    if starts_with_zeros and (codec in _NEVER_ZERO_FIRST or not data.strip(b"\0")):
        return True
    if codec not in _START_CODE_CODECS:
        return codec in _NEVER_ZERO_FIRST and _PAGE in data
    # Start codes cannot occur within a picture, so its data hold no such run; between pictures there may be filling
    # with zeros, up to the next start code.
    at = data.find(_RUN)
    while at >= 0:
        rest = data[at:].lstrip(b"\0")
        if rest and rest[0] != 1:
            return True
        at = data.find(_RUN, len(data) - len(rest))
    return False


# VP8, VP9 and AV1


def _read_vp8(data: bytes) -> PacketFacts | None:
    """RFC 6386, 9.1: bit 0 of a frame is 0 for a key frame, bit 4 says whether it is shown."""
    if len(data) < 3:
        return None
    if not data[0] & 0x10:
        # A hidden key frame, which no encoder writes, would be no place to begin: nothing shows when it was.
        return _HIDDEN if data[0] & 1 else None
    return _INTER if data[0] & 1 else _INTRA


def _read_vp9(data: bytes) -> PacketFacts | None:
    frames = [_read_vp9_frame(frame) for frame in _vp9_frames(data)]
    first = frames[0] if frames else None
    if first is None or None in frames:
        return None
    shown = sum(frame.shown for frame in frames if frame)
    return PacketFacts(shown, first.starts and shown == 1, first.starts)


def _vp9_frames(data: bytes) -> Iterator[bytes]:
    """The frames of a packet: a superframe ends with their sizes, between two equal markers (VP9, annex B)."""
    marker = data[-1] if data else 0
    count, width = (marker & 7) + 1, ((marker >> 3) & 3) + 1
    size = 2 + count * width
    if marker & 0xE0 != 0xC0 or len(data) < size or data[-size] != marker:
        yield data
        return
    sizes, start = data[-size + 1 : -1], 0
    for i in range(count):
        length = int.from_bytes(sizes[i * width : (i + 1) * width], "little")
        if length:
            yield data[start : start + length]
        start += length


def _read_vp9_frame(data: bytes) -> PacketFacts | None:
    """VP9, 6.2: the first bits of the uncompressed header."""
    bits = Bits(data[:2])
    if bits.read(2) != 2:  # frame_marker
        return None
    if bits.read(2) == 3:  # profile, and in profile 3 a reserved bit
        bits.read()
    if bits.read():  # show_existing_frame: one that was decoded before
        return _INTER
    key, show = not bits.read(), bits.read()
    return PacketFacts(show, key, key)


_AV1_SEQUENCE, _AV1_FRAME_HEADER, _AV1_FRAME = 1, 3, 6


def _read_av1(data: bytes) -> PacketFacts | None:
    shown, starts, sequence = 0, False, False
    for kind, payload in _av1_units(data):
        if kind == _AV1_SEQUENCE:
            sequence = True
            if len(payload) and payload[0] & 0x18:  # still pictures have headers of another form
                return None
        elif kind in (_AV1_FRAME_HEADER, _AV1_FRAME):
            if not payload:
                return None
            if payload[0] & 0x80:  # a frame that was decoded before is shown, which may renew the references
                shown += 1
                continue
            key, show = payload[0] & 0x60 == 0, bool(payload[0] & 0x10)
            starts = starts or (key and show and shown == 0)
            shown += show
    return PacketFacts(shown, starts and sequence, starts)


def _av1_units(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and first bytes of each open bitstream unit (AV1, 5.3), whose length is coded in groups of seven bits."""
    position = 0
    while position < len(data):
        header = data[position]
        position += 1 + (header >> 2 & 1)  # an extension of one byte
        length = len(data) - position
        if header & 2:  # obu_has_size_field
            length = shift = 0
            while position < len(data):
                byte = data[position]
                position += 1
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80 or shift > 56:
                    break
        yield header >> 3 & 15, data[position : position + min(length, 4)]
        position += length


# MPEG-1, 2 and 4

_MOST_SKIPPED_BYTES = 20
"""An MPEG-4 packet as short as this may say that its picture is left out."""


def _start_codes(data: bytes) -> Iterator[tuple[int, int]]:
    """Each start code and the position behind it."""
    position = data.find(b"\0\0\1")
    while 0 <= position < len(data) - 3:
        yield data[position + 3], position + 4
        position = data.find(b"\0\0\1", position + 3)


def _read_mpeg12(data: bytes) -> PacketFacts | None:
    """ISO/IEC 13818-2, 6.2: sequence header, picture header, picture coding extension."""
    kinds: list[int] = []
    structures: list[int] = []  # 1 and 2 are the fields of a frame, 3 is a whole one
    sequence = False
    for code, start in _start_codes(data):
        if code == 0xB3:
            sequence = True
        elif code == 0 and start + 2 <= len(data):
            kinds.append(data[start + 1] >> 3 & 7)
            structures.append(3)
        elif code == 0xB5 and structures and start + 3 <= len(data) and data[start] >> 4 == 8:
            structures[-1] = data[start + 2] & 3
    if structures != [3] and sorted(structures) != [1, 2]:
        return None
    return PacketFacts(1, starts=sequence and kinds[0] == 1)


def _read_mpeg4(data: bytes) -> PacketFacts | None:
    """ISO/IEC 14496-2, 6.2.5: the two bits behind a picture's start code are 0 for one that stands alone."""
    pictures = [data[start] >> 6 for code, start in _start_codes(data) if code == 0xB6 and start < len(data)]
    # Several pictures: a packed stream, in which later packets are empty ones.
    if len(pictures) != 1 or len(data) <= _MOST_SKIPPED_BYTES:
        return None
    return PacketFacts(1, starts=pictures[0] == 0)


_READERS: dict[str, PacketReader] = {
    "vp8": _read_vp8, "vp9": _read_vp9, "av1": _read_av1, "mpeg4": _read_mpeg4, "mpeg1video": _read_mpeg12,
    "mpeg2video": _read_mpeg12,
}  # fmt: skip


_TIMES_AS_LONG = 4
_TOO_LONG = 20.0
"""Seconds. Edits and streams of several lengths make a container say less than its frames take, but not so."""


def check_times(seconds: float, container: InputContainer, stream: VideoStream) -> None:
    """A ValueError for frames whose times lead far beyond what the container says that it lasts."""
    lengths = [stream.duration * float(stream.time_base or 0)] if stream.duration else []
    lengths += [container.duration / 1e6] if container.duration else []
    if lengths and seconds > _TIMES_AS_LONG * max(lengths) + _TOO_LONG:
        raise ValueError(
            f"it is damaged: by the times of its frames it lasts {seconds:,.0f} seconds, and its container says "
            f"{max(lengths):,.1f}"
        )
