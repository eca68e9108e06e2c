"""JSON that people write: a value, or one line that says what is wrong with it; no key is there twice."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from typing import Any

from llava.messages import shorten

BOM = "\ufeff"
"""The mark that some editors begin a file with."""
LONG_NUMBER = "has a whole number of thousands of digits; put it in quotes if it is a name"


class RepeatedKeyError(ValueError):
    """An object of JSON with a key twice, of which Python would take the last one without a word."""


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RepeatedKeyError(f"has the key {shorten(twice)} twice in one place; leave one out")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_read_object)
_decode = _decoder.raw_decode
_decode_any = json.JSONDecoder().raw_decode


def decode_value(text: str, start: int) -> tuple[Any, int]:
    """The value at a place, or the error of one with a key twice, and where it ends."""
    try:
        return _decode(text, start)
    except RepeatedKeyError as error:
        return error, _decode_any(text, start)[1]


def parse_json(data: bytes, where: str) -> Any:
    """The value that JSON holds; a ValueError that begins with ``where`` if it is none, or has a key twice."""
    try:
        text = data.decode().removeprefix(BOM)
        with suppress(json.JSONDecodeError):  # Space around a value is looked for only where there is some.
            value, end = _decode(text)
            if end == len(text) or text[end:] in ("\n", "\r\n"):
                return value
        return _decoder.decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a sample: brackets within brackets without end") from error
    except RepeatedKeyError as error:
        raise ValueError(f"{where}: {error}") from error
    except ValueError as error:  # Nothing else is wrong with JSON.
        raise ValueError(f"{where}: {LONG_NUMBER}") from error
