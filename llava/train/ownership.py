"""What a resumed run unpickles: plain tensors, and DeepSpeed's files, which must be this user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.model.foreign_code import UNSAFE_WEIGHTS

_STEP_FOLDER = "global_step*"
"""Folders in which DeepSpeed keeps its state, inside a checkpoint."""

_WRITABLE_BY_ALL = 0o002


def check_pickles_are_ours(checkpoint: str) -> None:
    """Refuse to resume from DeepSpeed's files where somebody else may have written them.

    transformers reads its own files of a checkpoint as plain tensors (``weights_only``). DeepSpeed unpickles
    its own, which runs whatever code they hold, and there is no switch for that: a file must belong to this
    user, who then could have run that code anyway, and not be open to writing by all.

    Raises:
        ValueError: names the file.
    """
    if not hasattr(os, "getuid"):
        return
    for folder in Path(checkpoint).glob(_STEP_FOLDER):
        for file in (folder, *sorted(folder.rglob("*"))):
            status = file.stat()
            foreign = status.st_uid != os.getuid()
            if foreign or (status.st_mode & _WRITABLE_BY_ALL and not file.is_symlink()):
                whose = f"belongs to user {status.st_uid}, not to you" if foreign else "can be written by everybody"
                raise ValueError(
                    f"--resume_from_checkpoint {checkpoint}: {file} {whose}, and DeepSpeed runs what its files hold; "
                    "if you trust whoever wrote them, copy the checkpoint to a folder of your own and resume from there"
                )


@contextmanager
def plain_tensors_only(checkpoint: str | None) -> Iterator[None]:
    """Within it a file of a checkpoint that holds more than tensors, which is not unpickled, is a ValueError."""
    try:
        yield
    except UNSAFE_WEIGHTS as error:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: one of its files (optimizer.pt, scheduler.pt, scaler.pt, "
            "rng_state*.pth) holds more than plain tensors, or is damaged, and is not read; resume from another"
        ) from error
