"""When the frames of a video are shown, in seconds, and which of them lie nearest to given times."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llava.data.media_files import DEFAULT_LIMITS, MediaLimits
from llava.data.nal_units import PacketFacts
from llava.data.packets import check_packet, packet_reader

_RESTART_SECONDS = 1.0
"""A time that is so much before the latest one begins another clip, which was joined to the one before it."""
_SAME_RATE, _ROUNDING = 0.01, 0.0011


def seconds_of(times: Sequence[int | None], unit: float, rate: float) -> list[float]:
    """Seconds of each frame from the first one, ascending.

    Frames without a time, or with one that was there already, lie evenly between their neighbours.

    Args:
        times: of frames in the order in which they are shown.
        unit: seconds that a time counts.
        rate: frames a second, for the frames before the first known time and behind the last; 0 where it is not known.
    """
    known = [time for time in times if time is not None]
    if len(known) == len(times) and all(a < b for a, b in pairwise(known)):
        return [float((time - known[0]) * unit) for time in known]
    gaps = np.diff(known)
    step = 1 / rate if rate else float(np.median(gaps[gaps > 0])) * unit if (gaps > 0).any() else 1.0
    places: list[int] = []
    seconds: list[float] = []
    shift = 0.0
    for place, time in enumerate(times):
        if time is None:
            continue
        second = time * unit + shift
        if seconds and second <= seconds[-1]:
            if seconds[-1] - second < _RESTART_SECONDS:
                continue
            shift += seconds[-1] + step * (place - places[-1]) - second
            second = time * unit + shift
        places.append(place)
        seconds.append(second)
    if not places:
        return [step * i for i in range(len(times))]
    before = [seconds[0] - step * (places[0] - i) for i in range(places[0])]
    after = [seconds[-1] + step * (i - places[-1]) for i in range(places[-1] + 1, len(times))]
    between = np.interp(range(places[0], places[-1] + 1), places, seconds).tolist()
    first, *others = [*before, *between, *after]
    return [0.0, *(second - first for second in others)]


def frame_rate(times: Sequence[float], declared: float) -> float:
    """Frames a second on average: what the container declares where the frames' times agree with it."""
    if len(times) < 2 or times[-1] <= times[0]:
        return declared or 1.0
    gaps, seconds = len(times) - 1, times[-1] - times[0]
    # Matroska rounds times to milliseconds.
    if declared and abs(gaps / declared - seconds) <= max(_SAME_RATE * seconds, _ROUNDING):
        return declared
    return gaps / seconds


def is_constant(times: Sequence[float]) -> bool:
    """Whether frames lie so evenly that counting them and looking at their times give the same frames."""
    if len(times) < 3:
        return True
    even = np.linspace(times[0], times[-1], len(times))
    step = (times[-1] - times[0]) / (len(times) - 1)
    return bool(np.abs(np.asarray(times) - even).max() <= step / 2)


def last_frame_seconds(times: Sequence[float], rate: float) -> float:
    """How long the last frame is shown: as an average one, or as the one before it where the frame rate varies."""
    return 1 / rate if is_constant(times) else times[-1] - times[-2]


def nearest(times: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """For each wanted time the position of the nearest one; of two that are as near, the earlier."""
    known = np.asarray(times)
    after = np.searchsorted(known, wanted).clip(0, len(known) - 1)
    before = (after - 1).clip(0)
    is_before = np.asarray(wanted) - known[before] <= known[after] - np.asarray(wanted)
    return np.where(is_before, before, after).tolist()  # type: ignore[no-any-return]


# How the frames of a video are shown: upright, not mirrored, with square pixels, all of one size.

_MOST_STRETCH = 16
"""A pixel that is said to be so many times as wide as high, or more, is a damaged header."""
_AS_STORED = (1, 0, 0, 1)

Turn = tuple[int, int, int, int]
"""Where a stored pixel at (x, y) is shown: at (a x + c y, b x + d y), each of a, b, c, d being -1, 0 or 1."""


class Display:
    """How one clip is shown.

    Orientation comes with frames, from the container (MP4, MOV, Matroska) or from the stream (H.264 and HEVC, where
    only the first frame of a group may carry it, and it holds on). The shape of pixels is that of the stored picture.

    Attributes:
        size: width and height of a frame as it is shown.
    """

    def __init__(self, first: Any, pixel_ratio: Any) -> None:
        self._stored = (first.width, first.height)
        self._width = first.width
        if pixel_ratio:
            if not 1 / _MOST_STRETCH <= pixel_ratio <= _MOST_STRETCH:
                raise ValueError(f"its pixels are said to be {float(pixel_ratio):g} times as wide as high")
            self._width = max(round(first.width * float(pixel_ratio)), 1)
        self._is_start = True
        self._first_turn = self._turn = read_turn(first) or _AS_STORED
        self.size = (self._width, first.height)
        if self._turn[0] == 0:
            self.size = self.size[::-1]

    @property
    def is_plain(self) -> bool:
        """Whether frames are shown as they are stored."""
        return self._first_turn == _AS_STORED and self._width == self._stored[0]

    @property
    def is_turned(self) -> bool:
        """Whether frames are turned, but neither mirrored nor stretched."""
        a, b, c, d = self._first_turn
        return a * d - b * c == 1 and self._width == self._stored[0]

    def begin(self, place: int) -> None:
        """Say that frames follow from a place of the clip on, where decoding begins."""
        self._turn, self._is_start = self._first_turn, place == 0

    def follow(self, frame: Any, index: int) -> None:
        """Look at a frame, in the order in which they are decoded; a ValueError if it is damaged or of another size."""
        if frame.is_corrupt and not self._is_start:
            raise ValueError(f"frame {index} is damaged: the file was cut off there, or not copied as it was")
        # A recording that begins in the middle begins with pictures that lack what came before.
        self._is_start = self._is_start and frame.is_corrupt
        size = (frame.width, frame.height)
        if size != self._stored:
            raise ValueError(
                f"its picture changes size on the way, from {self._stored[0]} x {self._stored[1]} to {size[0]} x "
                f"{size[1]} at frame {index}; re-encode it to one size"
            )
        self._turn = read_turn(frame) or self._turn
        if (self._turn[0] == 0) != (self._first_turn[0] == 0):
            raise ValueError(f"its picture is turned to its side on the way, at frame {index}; cut it into two clips")

    def show(self, frame: Any) -> NDArray[np.uint8]:
        """The frame that was followed last, as (height, width, 3)."""
        if self._width != self._stored[0]:
            frame = frame.reformat(width=self._width, height=self._stored[1], format="rgb24", interpolation="BICUBIC")
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
        a, b, c, d = self._turn
        if a == 0:
            pixels = pixels.swapaxes(0, 1)
        # Rows run along y, columns along x; the sign that is not zero says which way.
        return pixels[:: b + d, :: a + c]


def read_turn(frame: Any) -> Turn | None:
    """How a frame is to be shown, to the nearest quarter turn; None where it does not say."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (_sign(a), 0, 0, _sign(d)) if a and d else None
    return 0, _sign(b), _sign(c), 0


def _sign(number: int) -> int:
    return 1 if number >= 0 else -1


# Which frames a video has and where decoding can begin, told from its packets alone.


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
