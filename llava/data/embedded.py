"""Media that stand in a data file itself, as bytes: written once to a folder of files, which everything else reads."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import tempfile
import uuid
from functools import cache
from pathlib import Path
from typing import Any

_DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def media_folder(cache_dir: Path | None) -> Path:
    """The folder of such files: below that of the indexes or, without one, a folder that goes with this process."""
    return _temporary_folder() if cache_dir is None else cache_dir.absolute() / "media"


@cache
def _temporary_folder() -> Path:
    import atexit
    import shutil

    folder = tempfile.mkdtemp(prefix="llava-media-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_media(data: bytes, name: str, folder: Path) -> str:
    """The path of a file with these bytes; it is named after them, so that each is there once.

    Args:
        data: of an image or a video.
        name: that it had, of which the suffix is kept; "" if none is known.
        folder: see ``media_folder``.

    Raises:
        ValueError: there are none.
    """
    if not data:
        raise ValueError("its bytes are empty")
    digest = hashlib.sha256(data).hexdigest()
    suffix = Path(name).suffix.lower()
    path = folder / digest[:2] / (digest + (suffix if _SUFFIX.fullmatch(suffix) else ""))
    if path.is_file() and path.stat().st_size == len(data):
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return str(path)


def decode_data_uri(text: str) -> bytes | None:
    """The bytes of a ``data:...;base64,`` address; None for any other text.

    Raises:
        ValueError: what follows is not base64.
    """
    match = _DATA_URI.match(text)
    if match is None:
        return None
    try:
        return base64.b64decode(text[match.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"its data: address is not base64: {error}") from error


def encode_picture(picture: Any) -> bytes:
    """A picture of Pillow as a PNG, without loss."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
