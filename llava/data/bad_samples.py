"""Samples that cannot be used: what is said of one, and how it is raised."""

from __future__ import annotations

from llava.data.media_files import MediaError
from llava.types import BadSample, Record

__all__ = ["ERROR", "ON_BAD_SAMPLE", "SKIP", "BadSample", "BadSampleError", "check_on_bad_sample", "describe_error"]

ERROR, SKIP = "error", "skip"
ON_BAD_SAMPLE = (ERROR, SKIP)
"""What may be done about a bad sample: stop with an error that names it, or leave it out and write it down."""


def describe_error(record: Record, error: ValueError) -> BadSample:
    """What an error that was raised over a record says of it."""
    file = error.path if isinstance(error, MediaError) else ""
    reason = str(error).removeprefix(f"{record}: ").removeprefix(f"{record.source}: ").removeprefix(f"{file}: ")
    return BadSample(record.id, record.source, file, " ".join(reason.splitlines()), record.data_file)


class BadSampleError(ValueError):
    """A bad sample under ``on_bad_sample="error"``; the message is one line that names sample and file.

    What is raised in a worker process torch raises anew from its type and a text, the worker's traceback.
    That text ends with the line that was meant, which is taken out of it here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__qualname__}: ")[2].rstrip())


def check_on_bad_sample(value: str) -> None:
    """A ValueError for a value that ``--on_bad_sample`` does not have."""
    if value not in ON_BAD_SAMPLE:
        raise ValueError(f"--on_bad_sample is {value!r}; known: {', '.join(ON_BAD_SAMPLE)}")
