"""The processes that load data: one that cannot hand over a batch, or is ended, ends the run with words, not a wait."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing import queues
from typing import Any

from llava.messages import explain_error

_LOST = 74
"""Exit status of a process that loads data and cannot hand it over; EX_IOERR of sysexits.h."""
_WAYS = {
    "Bus error": "a file that it had mapped was cut off or lies on a disk that fails (--data_cache_dir, "
    "--feature_cache), or shared memory (/dev/shm) is full",
    "Killed": "the system ended it, perhaps as there was no memory left: fewer --dataloader_num_workers take less",
}


def end_without_batches() -> None:
    """In such a process: end it where a batch cannot be sent.

    Batches are sent by a thread, through shared memory and a socket in the folder for temporary files. Where either
    is full or gone, Python prints a traceback, drops the batch, and the trainer would wait for it for ever.
    """
    queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: Exception, batch: object) -> None:
    print(
        f"a batch cannot be handed over by the process that loads it: {explain_error(error)}; see that the folder for "
        "temporary files (TMPDIR) and shared memory (/dev/shm) have room, or give --dataloader_num_workers 0",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(_LOST)


def explaining_ends(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a ValueError where torch says that a process that loads them was ended."""
    try:
        yield from batches
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not said.startswith("DataLoader worker ("):
            raise
        first = said.partition(". ")[0].rstrip(".")
        why = next((why for sign, why in _WAYS.items() if sign in first), "what it has said stands before this")
        raise ValueError(
            f"{first}: a process that loads data was ended; {why}. Go on with --resume_from_checkpoint auto"
        ) from error
