"""Files that cannot be written: recognised as such, kept until all ranks meet, and said with what helps."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from llava.messages import explain_error
from llava.train.checkpoint import list_checkpoints

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_HINTS = {
    errno.EIO: "the disk fails to write (I/O error): look at it, or give another folder",
    errno.EROFS: "the disk is mounted read-only: mount it for writing, or give another folder",
    errno.EACCES: "writing there is not allowed: check the permissions of the folder, or give another one",
    errno.EPERM: "writing there is not allowed: check the permissions of the folder, or give another one",
    errno.ENOENT: "something that was just written, or the folder itself, is gone: see that no other run and no "
    "cleaning job uses this folder",
    errno.ENOTDIR: "something on the way to it is a file, not a folder",
    errno.EMFILE: "this process has too many files open: raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many files open",
    errno.ENAMETOOLONG: "its name is too long: give a shorter --output_dir",
    errno.ETIMEDOUT: "the network disk did not answer: look at it, or give another folder",
}
if hasattr(errno, "ESTALE"):
    _HINTS[errno.ESTALE] = "the network disk has lost the folder: mount it anew"
_IN_TEXT = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


class WriteFailure(contextlib.AbstractContextManager):
    """Keeps the first error of writing, instead of letting it out: the other ranks wait at the next meeting.

    Attributes:
        message: of the error, None while there was none.
    """

    def __init__(self) -> None:
        self.message: str | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_write_error(error):
            return False
        self.message = self.message or str(error).partition("\n")[0]
        return True


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written: each library that writes a checkpoint says it in its own way."""
    if isinstance(error, OSError | SafetensorError):
        return True
    text = str(error)
    if isinstance(error, RuntimeError):  # torch.save
        return "PytorchStreamWriter" in text or "inline_container" in text or "iostream error" in text
    return type(error) is Exception and "(os error" in text  # tokenizers


def explain_failures(folder: Path, failures: list[str], needed: int, kept: str, about_to_go: int = 0) -> str:
    """The one error that a save which failed ends the run with.

    Args:
        folder: what could not be written.
        failures: of the ranks.
        needed: bytes that it takes.
        kept: what there still is to go on from.
        about_to_go: bytes on that disk that the run gives back when it ends.
    """
    numbers = {int(found[1] or found[2]) for text in failures for found in _IN_TEXT.finditer(text)}
    try:
        free = free_bytes(folder) + about_to_go
    except OSError as error:  # The disk does not even say how much room it has.
        numbers |= {error.errno or errno.EIO}
        free = 0
    said = f"{folder} could not be written: {'; '.join(failures)}"
    # Who does not say what went wrong (torch.save) has in most cases found no room.
    if numbers & _FULL or not numbers:
        # With room for twice as much it is not the disk that is full.
        may = "a quota may allow less" + (", or the disk may fail" if not numbers and free > 2 * needed else "")
        return (
            f"{said}. About {needed:,} bytes are needed, {free:,} are free on that disk ({may}); "
            f"{kept}. Make room, or save less with --save_total_limit, and go on with --resume_from_checkpoint auto"
        )
    return f"{said}. {_advise(numbers)}; {kept}. Then go on with --resume_from_checkpoint auto"


def _advise(numbers: set[int]) -> str:
    """What helps against errors of the system; a sentence without its full stop."""
    hints = "; ".join(dict.fromkeys(_HINTS[number] for number in sorted(numbers) if number in _HINTS))
    return hints[:1].upper() + hints[1:] if hints else "Mend that"


@contextlib.contextmanager
def explaining_disk_errors(output_dir: str | None) -> Iterator[None]:
    """Within it an error of the system (a log that cannot be written, say) is a ValueError that tells what is left."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        last = next(reversed(list_checkpoints(str(output_dir))), None)
        kept = f"{last} is unharmed" if last is not None else "there is no checkpoint yet"
        hint = "There is no room on that disk: make some" if error.errno in _FULL else _advise({error.errno})
        raise ValueError(
            f"{explain_error(error)}. {hint}; {kept}. Then go on with --resume_from_checkpoint auto"
        ) from error


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    # disk_usage needs a folder that is there: the nearest one above tells the disk.
    existing = next(path for path in [folder, *folder.absolute().parents] if path.is_dir())
    return shutil.disk_usage(existing).free
