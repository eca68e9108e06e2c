"""Which frames a video has and where decoding can begin, told from its packets alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.data.limits import DEFAULT_LIMITS, MediaLimits


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video stream, in the order in which they are shown.

    Attributes:
        times: presentation time of each frame, ascending, in units of the stream's time base.
        keys: presentation times of the key frames, ascending; each begins a group of frames.
        key_targets: for each key frame, the earlier of its presentation and its decoding time.
        plain: whether every group stands alone and every packet is shown. In an open group frames
            before the key frame need the group before it, and an edit list hides packets.
    """

    times: list[int]
    keys: list[int]
    key_targets: list[int]
    plain: bool

    def key_before(self, time: int) -> int:
        """Position in ``keys`` of the last key frame at or before a time."""
        return bisect_right(self.keys, time) - 1


class _Packet(NamedTuple):
    """What a packet says of itself, without its data."""

    pts: int | None
    dts: int | None
    is_keyframe: bool
    is_discard: bool


def index_packets(container: Any, stream: Any, limits: MediaLimits = DEFAULT_LIMITS) -> VideoIndex | None:
    """Read the packets of a stream, which takes milliseconds: nothing is decoded.

    Args:
        container: an open PyAV container, at its beginning.
        stream: the video stream.
        limits: say how many frames there may be; more are a ValueError.

    Returns:
        The index, or None where packets do not say when they are shown (in AVI they guess), or name no
        key frame: such a video can only be decoded from its beginning.
    """
    if container.format.name == "avi":
        return None
    packets: list[Any] = []
    for packet in container.demux(stream):
        if packet.size:
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
            limits.check_length(len(packets))
    times = [packet.pts for packet in packets]
    if None in times or len(set(times)) < len(times):
        return None
    keys = sorted((p.pts, p.pts if p.dts is None else min(p.pts, p.dts)) for p in packets if p.is_keyframe)
    if not keys:
        return None
    plain, latest_key = True, keys[0][0]
    for packet in packets:
        if packet.is_keyframe:
            latest_key = packet.pts
        plain = plain and packet.pts >= latest_key and not packet.is_discard
    return VideoIndex(
        # Frames before the first key frame refer to what is not in the file.
        times=sorted(p.pts for p in packets if not p.is_discard and p.pts >= keys[0][0]),
        keys=[time for time, _ in keys],
        key_targets=[target for _, target in keys],
        plain=plain,
    )
