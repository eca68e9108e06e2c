"""Whose files a run unpickles: DeepSpeed's, and so only this user's own."""

from __future__ import annotations

import os
from pathlib import Path

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
