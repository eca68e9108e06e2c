"""Which frames a video has and where decoding can begin, told from its packets alone."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.data.limits import DEFAULT_LIMITS, MediaLimits
from llava.data.nal_units import PacketFacts
from llava.data.packets import check_packet, packet_reader


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
    order: dict[tuple[int, int], int]
    plain: bool

    def key_before(self, time: int) -> int:
        """Position in ``keys`` of the last one at or before a time, 0 where there is none."""
        return max(bisect_right(self.keys, time) - 1, 0)


class _Packet(NamedTuple):
    """What a packet says of itself, without its data."""

    pts: int
    dts: int | None
    size: int
    is_keyframe: bool
    is_discard: bool
    facts: PacketFacts


class PacketScan(NamedTuple):
    """What reading a stream's packets brings.

    Attributes:
        packets: the index, or None where packets do not say clearly which frames are shown, when, or where decoding may
            begin: such a video can only be decoded from its beginning.
        first: the first frame that is shown, or None.
    """

    packets: VideoIndex | None
    first: Any


def index_packets(container: Any, stream: Any, limits: MediaLimits = DEFAULT_LIMITS) -> PacketScan:
    """Read the packets of a stream, of which only the first are decoded, up to the first frame.

    Args:
        container: an open PyAV container, at its beginning.
        stream: the video stream.
        limits: say how many frames there may be; more are a ValueError.
    """
    codec = stream.codec_context.codec.canonical_name
    read = packet_reader(codec, bytes(stream.codec_context.extradata or b""))
    packets: list[_Packet] | None = []
    first = None
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(decode_start(packet)), None)
        if packet.size:
            check_packet(packet, codec, container.format.name)
            data = bytes(packet)
            facts = read(data) if read is not None and packets is not None else None
            if facts is None or packet.pts is None or packet.is_corrupt or _changes(packet):
                packets = None
            if packets is not None and facts is not None:
                packets.append(
                    _Packet(packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard, facts)
                )
                limits.check_length(len(packets))
        if packets is None and first is not None:
            break
    if not packets or (container.format.name == "avi" and not all(packet.facts.starts for packet in packets)):
        return PacketScan(None, first)  # AVI does not say when frames are shown
    index = _build_index(packets, getattr(stream.codec_context, "reorder_depth", 0) or 0)
    if index is None or first is None or first.pts != index.times[0]:
        return PacketScan(None, first)
    return PacketScan(index, first)


def decode_start(packet: Any) -> list[Any]:
    """The frames that a packet brings at the beginning of a file.

    A recording may begin in the middle of a group: what comes before its first frame need not be decodable.
    """
    import av

    try:
        return list(packet.decode())
    except av.error.InvalidDataError:
        return []


def _changes(packet: Any) -> bool:
    """Whether a packet brings new settings of its decoder, as PyAV tells from release 15 on."""
    has = getattr(packet, "has_sidedata", None)
    return bool(has is not None and has("new_extradata"))


def _build_index(packets: Sequence[_Packet], decoder_depth: int) -> VideoIndex | None:
    if not packets[0].facts.starts:
        return None
    shown = _shown(packets)
    times = sorted(packet.pts for packet in shown)
    if not times or len(set(times)) < len(times) or not _is_in_order(packets, shown):
        return None
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
