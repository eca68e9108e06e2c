"""How errors read: values shortened, one line each."""

from __future__ import annotations

import io
import logging
import re
import reprlib
import sys
from collections.abc import Sequence
from contextlib import suppress

_LONGEST_VALUE = 80
_LONGEST_LINE = 1000
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class _Shortener(reprlib.Repr):
    """``repr`` with a limit on everything, numbers that Python refuses to write out included."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _LONGEST_VALUE
        self.maxlong = 40
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 4

    def repr_int(self, x: int, level: int) -> str:
        # log10(2) digits a bit. Python refuses to write a number of more than 4,300 digits.
        digits = int(x.bit_length() * 0.30103) + 1
        return super().repr_int(x, level) if digits < 1000 else f"a number of about {digits:,} digits"

    def repr_str(self, x: str, level: int) -> str:
        short = super().repr_str(x, level)
        return short if len(x) <= 2 * _LONGEST_VALUE else f"{short} ({len(x):,} characters)"


def shorten(value: object) -> str:
    """A value as an error shows it: its ``repr``, the middle left out where that is longer than 80 characters."""
    short = _Shortener().repr(value)
    return short if len(short) <= 3 * _LONGEST_VALUE else f"{short[: 2 * _LONGEST_VALUE]}...{short[-20:]}"


_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Characters that a terminal obeys, or that turn the order of a line round, and halves of characters."""


def escape_controls(text: str) -> str:
    """A text without what a terminal would obey: names of files and words of data may hold anything.

    New lines and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class PlainFormatter(logging.Formatter):
    """Lines of a log without what a terminal would obey; all else is another formatter's."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(self._inner.format(record))


def print_anything() -> None:
    """From now on let what a terminal does not have be printed as its escape, and what it would obey be logged so.

    A character that its encoding lacks would otherwise end the program.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors not in ("backslashreplace", "replace"):
            with suppress(OSError):  # Of a file that was replaced under it: it asks for a place that there is not.
                stream.reconfigure(errors="backslashreplace")
    for handler in logging.getLogger().handlers:
        if handler.formatter is not None and not isinstance(handler.formatter, PlainFormatter):
            handler.setFormatter(PlainFormatter(handler.formatter))


def shorten_text(text: str, limit: int = _LONGEST_LINE) -> str:
    """A text on one line, the middle left out where it is longer than ``limit`` characters."""
    if len(text) > limit:
        kept = limit * 3 // 4
        text = f"{text[:kept]} ... [{len(text) - limit:,} characters] ... {text[kept - limit :]}"
    return escape_controls(" ".join(text.split()))


def explain_error(error: BaseException) -> str:
    """What an error says, on one line; of an error of the system, the file and its reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        # Of a rename that failed both names count.
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return shorten_text(f"{' -> '.join(names)}: {error.strerror}")
    if is_out_of_memory(error):
        return shorten_text(
            # The first sentence: torch goes on with a page about its allocator.
            f"{str(error).partition('. ')[0]}; take a smaller batch (--per_device_train_batch_size, --batch_size), "
            "fewer frames or a smaller model"
        )
    return shorten_text(str(error)) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left; torch says so with a RuntimeError."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def list_names(names: Sequence[str], limit: int = 5) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
