"""The units (NAL units) that H.264 and HEVC packets are made of: which show a picture, and where decoding may begin.

A unit has a header that says its kind: a slice of a picture, or what is common to pictures (parameter sets, messages).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class PacketFacts:
    """Which pictures a packet shows, and whether decoding may begin at it, as its own bytes have it.

    Attributes:
        shown: pictures that it shows; other than one where pictures are hidden.
        starts: whether decoding may begin here: all that is shown from this picture on is exact.
        closed: whether, besides, no picture that follows in the file is shown before it.
        leading: whether the picture needs one from before the last place where decoding may begin (HEVC).
        restarts: whether such pictures behind this one are left out, in a decode of all the file too (HEVC).
        special: whether the stream asks for more than decoding: another size, fields, an orientation.
        may_lead: whether pictures that are shown before the first of the file can be decoded (HEVC).
        reorders: whether decoders have to guess how many pictures may be decoded before one and shown behind it
            where ``num_reordered`` does not say it (H.264).
        num_reordered: see ``reorders``.
    """

    shown: int = 1
    starts: bool = False
    closed: bool = False
    leading: bool = False
    restarts: bool = False
    special: bool = False
    may_lead: bool = False
    reorders: bool = False
    num_reordered: int | None = None


class Bits:
    """Reads numbers from bytes, bit by bit; behind the end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int = 1) -> int:
        """An unsigned number of ``count`` bits."""
        self._left -= count
        return (self._value >> self._left if self._left >= 0 else 0) & ((1 << count) - 1)

    def read_golomb(self) -> int:
        """An unsigned number in Exp-Golomb coding, ITU-T H.264, 9.1."""
        zeros = 0
        while not self.read():
            zeros += 1
            if zeros > 32:
                raise ValueError("its headers are damaged")
        return (1 << zeros) - 1 + self.read(zeros)

    def skip_golomb(self, count: int = 1) -> None:
        """Pass over numbers in Exp-Golomb coding."""
        for _ in range(count):
            self.read_golomb()


def split_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The units of a packet: behind their lengths, or behind start codes where ``length_size`` is 0."""
    if length_size:
        position = 0
        while position + length_size < len(data):
            start = position + length_size
            position = start + int.from_bytes(data[position:start], "big")
            yield data[start:position]
        return
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        yield data[start + 3 : end] if end >= 0 else data[start + 3 :]
        start = end


def _sized_units(data: bytes, position: int, count: int) -> tuple[list[bytes], int]:
    """So many units behind lengths of two bytes, as avcC and hvcC boxes have them (ISO/IEC 14496-15), and their end."""
    units = []
    for _ in range(count):
        start = position + 2
        position = start + int.from_bytes(data[position:start], "big")
        units.append(data[start:position])
    return units, position


def _unescape(unit: bytes) -> bytes:
    """A unit without the bytes that keep start codes out of it."""
    return unit.replace(b"\0\0\3", b"\0\0")


def _read_messages(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each message of an SEI unit, its header taken off (ITU-T H.264, 7.3.2.3.1)."""
    position = 0
    while position + 2 < len(payload):
        numbers = []
        for _ in range(2):  # the kind and the size: the sum of bytes up to the first that is not 255
            number = 0
            while position < len(payload) and payload[position] == 255:
                number, position = number + 255, position + 1
            number, position = number + (payload[position] if position < len(payload) else 0), position + 1
            numbers.append(number)
        kind, size = numbers
        yield kind, payload[position : position + size]
        position += size


_RECOVERY_POINT, _ORIENTATION = 6, 47


class H264Reader:
    """Reads the packets of one H.264 stream, in order."""

    def __init__(self, extradata: bytes) -> None:
        with_lengths = len(extradata) > 6 and extradata[0] == 1
        self._length_size = (extradata[4] & 3) + 1 if with_lengths else 0
        self._sequences: set[bytes] = set()
        self._fields = False
        self._num_reordered: int | None = None
        units = _sized_units(extradata, 6, extradata[5] & 31)[0] if with_lengths else split_units(extradata, 0)
        for unit in units:
            if unit and unit[0] & 31 == 7:
                self._add_sequence(unit)

    def _add_sequence(self, unit: bytes) -> None:
        unit = unit.rstrip(b"\0")
        if unit not in self._sequences:
            self._sequences.add(unit)
            frames_only, self._num_reordered = _read_h264_sequence(_unescape(unit[1:]))
            self._fields = self._fields or not frames_only

    def __call__(self, data: bytes) -> PacketFacts | None:
        """The facts of the next packet; None if it is not one whole picture. Kinds are of ITU-T H.264, table 7-1."""
        pictures, kinds, recovers, special = 0, set(), False, False
        for unit in split_units(data, self._length_size):
            kind = unit[0] & 31 if unit else 0
            if 1 <= kind <= 5 and len(unit) > 1:  # slices, of which kind 5 (IDR) refers to nothing before it
                kinds.add(kind)
                pictures += kind in (1, 2, 5) and unit[1] >> 7  # the slice that begins at the first macroblock
            elif kind == 7:
                self._add_sequence(unit)
            elif kind == 6:
                for message, content in _read_messages(_unescape(unit[1:])):
                    special = special or message == _ORIENTATION
                    recovers = recovers or (message == _RECOVERY_POINT and _is_exact(content))
        if pictures != 1 or self._fields:
            return None
        refresh = kinds == {5}
        return PacketFacts(
            starts=refresh or recovers,
            closed=refresh,
            special=special or len(self._sequences) > 1,
            reorders=True,
            num_reordered=self._num_reordered,
        )


def _is_exact(recovery: bytes) -> bool:
    """Whether a recovery point promises that pictures are exact from its own on, and its stream was not cut there."""
    bits = Bits(recovery)
    # recovery_frame_cnt, exact_match_flag, broken_link_flag (ITU-T H.264, D.1.8)
    return bits.read_golomb() == 0 and bits.read() == 1 and bits.read() == 0


# Profiles whose parameter sets describe chroma and scaling.
_HIGH_PROFILES = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)


def _read_h264_sequence(data: bytes) -> tuple[bool, int | None]:
    """Whether a stream has whole frames only, and how many pictures wait to be shown in order (None: not said).

    Args:
        data: the sequence parameter set of ITU-T H.264, 7.3.2.1.1, without its unit's header.
    """
    bits = Bits(data)
    profile = bits.read(8)
    bits.read(16)  # constraint flags, level
    bits.skip_golomb()  # seq_parameter_set_id
    if profile in _HIGH_PROFILES:
        chroma = bits.read_golomb()
        bits.read(chroma == 3)
        bits.skip_golomb(2)  # bit depths
        bits.read()
        if bits.read():  # seq_scaling_matrix_present_flag
            for i in range(12 if chroma == 3 else 8):
                if bits.read():
                    _skip_scaling_list(bits, 16 if i < 6 else 64)
    bits.skip_golomb()  # log2_max_frame_num_minus4
    order = bits.read_golomb()  # pic_order_cnt_type
    if order == 0:
        bits.skip_golomb()
    elif order == 1:
        bits.read()
        bits.skip_golomb(2)
        bits.skip_golomb(bits.read_golomb())
    bits.skip_golomb()  # max_num_ref_frames
    bits.read()
    bits.skip_golomb(2)  # width and height
    frames_only = bool(bits.read())
    if not frames_only:
        bits.read()
    bits.read()
    if bits.read():  # frame_cropping_flag
        bits.skip_golomb(4)
    if order == 2:
        return frames_only, 0  # pictures are shown in the order in which they are decoded
    return frames_only, _read_num_reordered(bits) if bits.read() else None


def _skip_scaling_list(bits: Bits, size: int) -> None:
    """ITU-T H.264, 7.3.2.1.1.1: differences of numbers, up to the first number that is 0."""
    last = following = 8
    for _ in range(size):
        if following:
            number = bits.read_golomb()
            following = (last + ((number + 1) // 2 if number % 2 else -number // 2)) % 256
        last = following or last


def _read_num_reordered(bits: Bits) -> int | None:
    """From the usability information of a sequence, ITU-T H.264, E.1.1."""
    if bits.read() and bits.read(8) == 255:  # a shape of pixels that is written out
        bits.read(32)
    if bits.read():  # overscan
        bits.read()
    if bits.read():  # video_signal_type_present_flag
        bits.read(4)
        if bits.read():
            bits.read(24)
    if bits.read():  # chroma_loc_info_present_flag
        bits.skip_golomb(2)
    if bits.read():  # timing_info_present_flag
        bits.read(65)
    limited = [_skip_buffer_model(bits) for _ in range(2)]
    if any(limited):
        bits.read()
    bits.read()
    if not bits.read():  # bitstream_restriction_flag
        return None
    bits.read()
    bits.skip_golomb(4)
    return bits.read_golomb()


def _skip_buffer_model(bits: Bits) -> bool:
    """Pass over ``hrd_parameters``, E.1.2; whether they were there."""
    if not bits.read():
        return False
    count = bits.read_golomb() + 1
    bits.read(8)
    for _ in range(count):
        bits.skip_golomb(2)
        bits.read()
    bits.read(20)
    return True


class HevcReader:
    """Reads the packets of one HEVC stream, in order; of several layers the first."""

    def __init__(self, extradata: bytes) -> None:
        with_lengths = len(extradata) > 22 and extradata[0] == 1
        self._length_size = (extradata[21] & 3) + 1 if with_lengths else 0
        self._sequences: set[bytes] = set()
        for unit in _hvcc_units(extradata) if with_lengths else split_units(extradata, 0):
            if len(unit) > 1 and unit[0] >> 1 == 33 and not _layer(unit):
                self._sequences.add(unit.rstrip(b"\0"))
        self._fresh = True  # the next picture is the first of its sequence

    def __call__(self, data: bytes) -> PacketFacts | None:
        """The facts of the next packet; None if it is not one picture. Kinds of units are of ITU-T H.265, table 7-1."""
        pictures, slices, special, ends = 0, set(), False, False
        for unit in split_units(data, self._length_size):
            if len(unit) < 2 or _layer(unit):
                continue
            kind = unit[0] >> 1
            if kind < 32:
                slices.add(kind)
                pictures += len(unit) > 2 and unit[2] >> 7  # the first slice of its picture
            elif kind == 33:
                self._sequences.add(unit.rstrip(b"\0"))
            elif kind in (36, 37):
                ends = True
            elif kind == 39:
                special = special or any(message == _ORIENTATION for message, _ in _read_messages(_unescape(unit[2:])))
        if pictures != 1:
            return None
        kind = min(slices)
        starts = 16 <= kind <= 21  # BLA, IDR and CRA
        # Behind a CRA (21) in the midst of a stream its leading pictures are decoded, else they are left out.
        restarts = starts and (kind != 21 or self._fresh)
        self._fresh = ends
        return PacketFacts(
            starts=starts,
            closed=kind in (19, 20),
            leading=kind in (8, 9),
            restarts=restarts,
            may_lead=True,
            special=special or len(self._sequences) > 1,
        )


def _layer(unit: bytes) -> int:
    return (unit[0] & 1) << 5 | unit[1] >> 3


def _hvcc_units(extradata: bytes) -> Iterator[bytes]:
    position = 23
    for _ in range(extradata[22]):  # arrays of units of one kind each
        count = int.from_bytes(extradata[position + 1 : position + 3], "big")
        units, position = _sized_units(extradata, position + 3, count)
        yield from units
