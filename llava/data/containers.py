"""Which container a video file is, told from its first bytes, so that libav is never left to guess.

libav guesses from names too, and knows hundreds of kinds of file: it plays a text as terminal art, takes ``v%03d.jpg``
for all pictures with such names, and opens whatever a playlist names. So the file's content chooses one of a few
containers, and the only protocol is that of files.
"""

from __future__ import annotations

from typing import Any

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
