"""Which container a video file is, told from its first bytes, so that libav is never left to guess.

libav guesses from names too, and knows hundreds of kinds of file: it plays a text as terminal art, takes ``v%03d.jpg``
for all pictures with such names, and opens whatever a playlist names. So the file's content chooses one of a few
containers, and the only protocol is that of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llava.data.nal_units import H264Reader, HevcReader, PacketFacts

_HEAD_BYTES = 4096
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"styp", b"sidx", b"free", b"skip", b"wide", b"pnot", b"uuid")
_PICTURE_BRANDS = (b"heic", b"heix", b"mif1", b"avif")

# What files begin with, and libav's name of the container.
_SIGNATURES = {
    b"\x1a\x45\xdf\xa3": "matroska",
    b"OggS": "ogg",
    b"FLV\x01": "flv",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c": "asf",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02": "mxf",
    b"DKIF": "ivf",
    b"nut/multimedia container\0": "nut",
    b".RMF": "rm",
    b"YUV4MPEG2 ": "yuv4mpegpipe",
    b"\x1f\x07\x00": "dv",
    b"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d": "wtv",
    b"\x12\x00\x0a": "obu",
    b"\0\0\1\xba": "mpeg",
    b"\0\0\1\xb3": "mpegvideo",
}
_PICTURE = "it is a picture, not a video"
_NO_VIDEO = "it has no video stream, it is an audio file"
_UNKNOWN = "its content is no video of a kind that is read, whatever its name says (docs/data.md lists them)"
_AUDIO = (b"ID3", b"fLaC", b"caff", b"FORM", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9", b"#!AMR")
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"BM")
_LISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"<smil", b"[playlist]")


def find_container(path: str) -> str:
    """libav's name of the container that a file is.

    Raises:
        ValueError: it is none that is read; the message is one line without the path.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        head = file.read(_HEAD_BYTES)
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head[4:8] in _MP4_BOXES:
        if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS:
            raise ValueError(_PICTURE)
        return "mov"
    if head.startswith(b"RIFF"):
        if head[8:12] in (b"AVI ", b"AVIX", b"AMV "):
            return "avi"
        raise ValueError({b"WAVE": _NO_VIDEO, b"WEBP": _PICTURE}.get(head[8:12], _UNKNOWN))
    if packet_size(head):
        return "mpegts"
    raw = _raw_stream(head)
    if raw is None:
        raise ValueError(_refusal(head))
    return raw


def _refusal(head: bytes) -> str:
    if head.startswith(_AUDIO):
        return _NO_VIDEO
    if head.startswith(_PICTURES):
        return _PICTURE
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_LISTS):
        return "it is a list of other files, not a video"
    if not any(head):
        return "it holds only zeros"
    return _UNKNOWN


def packet_size(head: bytes) -> int:
    """Bytes of each packet of an MPEG transport stream, 0 for what is none."""
    for size in (188, 192, 204):
        for start in range(min(size, len(head))):
            marks = head[start::size][: 5 if len(head) > 6 * 204 else None]
            if len(marks) > 1 and not marks.strip(b"G"):
                return size
    return 0


def _raw_stream(head: bytes) -> str | None:
    """The kind of a stream of H.264, HEVC or MPEG-4 without a container."""
    start = head.find(b"\0\0\1")
    if start < 0 or head[:start].strip(b"\0") or start + 5 > len(head):
        return None
    first, second = head[start + 3 : start + 5]
    if first == 0xB0 or (0x20 <= first <= 0x2F and second in (0, 0x80)):
        return "m4v"
    if (first >> 1) & 63 in (32, 33, 34, 35, 39) and not first & 0x81 and second == 1:
        return "hevc"
    if not first & 0x80 and first & 31 in (1, 5, 6, 7, 9):
        return "h264"
    return None


def open_container(path: str) -> Any:
    """Open a video file with PyAV.

    Raises:
        ValueError: it is no container that is read; the message is one line without the path.
        av.FFmpegError: it is broken.
        OSError: it cannot be opened.
    """
    import av

    # Only files, and none whose name says otherwise ("concat:a|b"): nothing but this one is opened.
    options = {"protocol_whitelist": "file"}
    return av.open(f"file:{path}", format=find_container(path), options=options, metadata_errors="ignore")


# What a compressed video packet shows, and whether decoding may begin at it, read from its own bytes.

PacketReader = Callable[[bytes], PacketFacts | None]
"""Reads one packet; None where it does not say clearly what it shows."""

_INTRA = PacketFacts(shown=1, starts=True, closed=True)
_INTER = PacketFacts(shown=1)
_HIDDEN = PacketFacts(shown=0)

# Every packet of these is one picture of its own.
_INTRA_CODECS = (
    "mjpeg", "prores", "dnxhd", "rawvideo", "huffyuv", "ffvhuff", "utvideo", "dvvideo", "jpeg2000", "v210", "cfhd",
)  # fmt: skip
_RAW_CODECS = ("rawvideo", "v210")
_START_CODE_CODECS = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vc1")
_RUN = bytes(64)
# Their packets begin with a mark; longer runs are what files are cut into on a disk or for a download.
_NEVER_ZERO_FIRST = ("vp8", "vp9", "av1", "mjpeg", "theora", "flv1", "h263")
_PAGE = bytes(4096)
_MOST_SKIPPED_BYTES = 20
"""An MPEG-4 packet as short as this may say that its picture is left out."""


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
    return {"vp8": _read_vp8, "vp9": _read_vp9, "av1": _read_av1, "mpeg4": _read_mpeg4}.get(
        codec, _read_mpeg12 if codec in ("mpeg1video", "mpeg2video") else None
    )


def check_packet(packet: Any, codec: str, container: str) -> None:
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
    # Their pictures hold no such run; between them there may be filling, up to the next start code.
    at = data.find(_RUN)
    while at >= 0:
        rest = data[at:].lstrip(b"\0")
        if rest and rest[0] != 1:
            return True
        at = data.find(_RUN, len(data) - len(rest))
    return False


def _read_vp8(data: bytes) -> PacketFacts | None:
    if len(data) < 3:
        return None
    if not data[0] & 0x10:
        # A hidden key frame, which no encoder writes, would be no place to begin: nothing shows when it was.
        return _HIDDEN if data[0] & 1 else None
    return _INTER if data[0] & 1 else _INTRA


def _read_vp9(data: bytes) -> PacketFacts | None:
    frames = [_read_vp9_frame(frame) for frame in _vp9_frames(data)]
    if not frames or None in frames:
        return None
    shown = sum(frame.shown for frame in frames if frame)
    first = frames[0]
    starts = first is not None and first.starts
    return PacketFacts(shown, starts and shown == 1, starts)


def _vp9_frames(data: bytes) -> Iterator[bytes]:
    """The frames of a packet, which ends with their sizes where they are several."""
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
    if not data or data[0] >> 6 != 2:
        return None
    bits = f"{int.from_bytes(data[:2].ljust(2, bytes(1)), 'big'):016b}"[2:]
    # Two bits of the profile; profile 3 has a reserved bit behind them.
    bits = bits[3:] if bits[:2] == "11" else bits[2:]
    if bits[0] == "1":  # a frame that was decoded before is shown
        return _INTER
    key, show = bits[1] == "0", bits[2] == "1"
    return PacketFacts(int(show), key, key)


def _read_av1(data: bytes) -> PacketFacts | None:
    shown, starts, sequence = 0, False, False
    for kind, payload in _av1_units(data):
        if kind == 1:
            sequence = True
            if len(payload) and payload[0] & 0x18:  # still pictures have headers of another form
                return None
        elif kind in (3, 6):
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
    position = 0
    while position < len(data):
        header = data[position]
        position += 1 + (header >> 2 & 1)
        length = len(data) - position
        if header & 2:
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


class _MpegPicture(NamedTuple):
    kind: int
    structure: int


def _start_codes(data: bytes) -> Iterator[tuple[int, int]]:
    """Each start code of MPEG-1, 2 and 4 and the position behind it."""
    position = data.find(b"\0\0\1")
    while 0 <= position < len(data) - 3:
        yield data[position + 3], position + 4
        position = data.find(b"\0\0\1", position + 3)


def _read_mpeg12(data: bytes) -> PacketFacts | None:
    pictures: list[_MpegPicture] = []
    sequence = False
    for code, start in _start_codes(data):
        if code == 0xB3:
            sequence = True
        elif code == 0 and start + 2 <= len(data):
            pictures.append(_MpegPicture(data[start + 1] >> 3 & 7, 3))
        elif code == 0xB5 and pictures and start + 3 <= len(data) and data[start] >> 4 == 8:
            pictures[-1] = pictures[-1]._replace(structure=data[start + 2] & 3)
    structures = [picture.structure for picture in pictures]
    # One frame, or its two fields.
    if structures != [3] and sorted(structures) != [1, 2]:
        return None
    return PacketFacts(1, starts=sequence and pictures[0].kind == 1)


def _read_mpeg4(data: bytes) -> PacketFacts | None:
    pictures = [data[start] >> 6 for code, start in _start_codes(data) if code == 0xB6 and start < len(data)]
    # Several pictures: a packed stream, in which later packets are empty ones.
    if len(pictures) != 1 or len(data) <= _MOST_SKIPPED_BYTES:
        return None
    return PacketFacts(1, starts=pictures[0] == 0)
