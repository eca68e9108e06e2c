"""Checkpoints as folders: written beside and renamed, checked by their checksums, found and rotated.

A folder ``checkpoint-N`` is complete from the moment it has that name. Until then its files lie in
``tmp-checkpoint-N``, a name that nothing resumes from.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from llava.io import hash_file, sync, write_json
from llava.messages import shorten_text
from llava.model.model_card import CARD
from llava.model.pretrained import UNSAFE_WEIGHTS
from llava.storage import read_again
from llava.stored_forms import MODEL, TRAINING_STATE
from llava.train.arguments import TrainingArguments
from llava.train.checkpoint_contents import find_malformed, find_unlisted
from llava.train.distributed import AgreedError, broadcast_from_rank0

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
"""Lists every file of a checkpoint but itself and the card: path in the folder, bytes and SHA-256."""

RUN_IDENTITY = "run_identity.json"
"""What makes a run this run and no other, see ``llava.train.identity``; beside a final model: that run is finished."""

_STAGING = "tmp-"
_NAME = re.compile(r"checkpoint-(\d+)")
_MILESTONE = re.compile(r"chck_\d+[kM]?")
_FOLDERS = ("checkpoint-*", "chck_*")
_READERS = 8


def staging_of(folder: Path) -> Path:
    """Where the files of a folder lie until they are complete: beside it, on the same disk."""
    return folder.with_name(_STAGING + folder.name)


# Writing: files beside their place, then their checksums, then the name.


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json``, and let every file of the folder reach the disk."""
    # The card is for people to read and to change.
    unlisted = {folder / CHECKSUMS, folder / CARD}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in unlisted)
    with ThreadPoolExecutor(_READERS) as readers:  # Reading, hashing and waiting for the disk free the interpreter.
        entries = list(readers.map(_sync_and_hash, files))
    listed = {path.relative_to(folder).as_posix(): entry for path, entry in zip(files, entries, strict=True)}
    write_json(folder / CHECKSUMS, listed, sort_keys=True)
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(inner)


def _sync_and_hash(path: Path) -> dict[str, str | int]:
    """A file's entry in ``checksums.json``; the file is on the disk when this returns."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def finalize(staged: Path, folder: Path) -> None:
    """Give a staged folder its checksums and then its name; what had that name before is gone afterwards."""
    # A kill between the two leaves a staged folder with checksums: clear_leftovers verifies it and gives it its name.
    write_checksums(staged)
    _rename(staged, folder)


def _rename(staged: Path, folder: Path) -> None:
    replaced = staging_of(folder.with_name(f"{folder.name}-replaced"))
    # A rename does not replace a folder that has files, so the older one steps aside first.
    if folder.exists():
        folder.rename(replaced)
    staged.rename(folder)
    # The names are on the disk only when the folder that holds them is.
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def replace_files(staged: Path, folder: Path) -> None:
    """Move the files of a saved model into a folder that may hold an older one, and remove ``staged``.

    Each file changes at once. Of a model in several files, the index goes first and comes last: in
    between the folder is one that cannot be loaded, never a mixture of two models.
    """
    files = sorted(path for path in staged.iterdir() if path.name != SAFE_WEIGHTS_INDEX_NAME)
    files.sort(key=lambda path: path.suffix == ".safetensors")
    for path in files:
        if path.is_file():
            sync(path)
    (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    for path in files:
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    kept = {path.name for path in files}
    # Left by an older model of more shards: no index names them any more, and they would only take room.
    for shard in folder.glob("model-*-of-*.safetensors"):
        if shard.name not in kept:
            shard.unlink()
    index = staged / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        index.replace(folder / index.name)
    staged.rmdir()
    sync(folder)


# Finding the one to go on from.


def is_auto(asked: str | bool | None) -> bool:
    """Whether a value of ``--resume_from_checkpoint`` means the last complete checkpoint of the run's folder."""
    return asked in ("auto", "true", "True")


def is_resume_asked(asked: str | bool | None) -> bool:
    """Whether a value of ``--resume_from_checkpoint`` asks to go on."""
    return asked not in (None, False, "", "false", "False")


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that ``--resume_from_checkpoint`` asks for, the same on all ranks; what half of one is left goes.

    Raises:
        ValueError: there is none that a run can go on from, or somebody else may have written it.
    """
    asked, output_dir = args.resume_from_checkpoint, str(args.output_dir)
    broadcast_from_rank0(lambda: clear_leftovers(output_dir))
    checkpoint = broadcast_from_rank0(lambda: choose_checkpoint(asked, output_dir, args.resume_changed))
    if checkpoint is not None:
        check_pickles_are_ours(checkpoint)
    return checkpoint


def choose_checkpoint(asked: str | None, output_dir: str | Path, take_unverified: bool = False) -> str | None:
    """The checkpoint to go on from.

    Args:
        asked: a folder, ``auto`` (or ``true``) for the last complete one of ``output_dir``, or nothing.
        output_dir: the run's folder.
        take_unverified: whether one without checksums will do.

    Returns:
        A folder; None for a run that starts anew.

    Raises:
        ValueError: the folder that was named is no checkpoint to resume from, or none of those in
            ``output_dir`` is one.
    """
    if not is_resume_asked(asked):
        return None
    if not is_auto(asked):
        folder = Path(str(asked))
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked}: no such folder; give one, or auto for the last one")
        check_forms(folder)
        if damage := read_again(partial(find_damage, folder, take_unverified), folder):
            raise ValueError(
                f"--resume_from_checkpoint {asked}: {damage}; give another, or auto for the last complete one"
            )
        return str(asked)
    skipped = []
    for folder in reversed(list_checkpoints(output_dir)):
        check_forms(folder)
        # One that cannot be read now is not damaged: the run would go back to an older one for no reason.
        damage = read_again(partial(find_damage, folder, take_unverified), folder)
        if damage is None:
            logger.info("resuming from %s", folder)
            return str(folder)
        logger.warning("skipping %s: %s", folder, damage)
        skipped.append(f"{folder.name}: {damage}")
    if skipped:
        raise ValueError(
            f"--resume_from_checkpoint {asked}: none of the checkpoints in {output_dir} can be gone on from "
            f"({'; '.join(skipped)}), and a new start would write over them; give another --output_dir, or start anew "
            "with --overwrite_output_dir true in place of --resume_from_checkpoint"
        )
    logger.info("no checkpoint in %s: starting anew", output_dir)
    return None


def check_forms(folder: Path) -> None:
    """A ValueError for a checkpoint of another release whose files would be read as something else, or not at all."""
    # The last two as exposure_log and data_order name them, which import this file.
    for name, form in (
        ("config.json", MODEL), (RUN_IDENTITY, TRAINING_STATE), ("data_state.json", TRAINING_STATE),
        ("exposure.json", TRAINING_STATE),
    ):  # fmt: skip
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # What is not there or damaged is found when the checksums are compared.
        form.check(content, str(folder / name))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Folders with the name of a checkpoint, by step."""
    if not Path(output_dir).is_dir():
        return []
    found = [path for path in Path(output_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def list_milestones(output_dir: str | Path) -> list[Path]:
    """Folders with the name of a milestone, which ``auto`` does not go on from and nothing rotates away."""
    if not Path(output_dir).is_dir():
        return []
    return sorted(path for path in Path(output_dir).iterdir() if _MILESTONE.fullmatch(path.name) and path.is_dir())


def find_damage(folder: Path, take_unverified: bool = False) -> str | None:
    """What keeps a run from going on from a folder; None if nothing does.

    Args:
        folder: named as a checkpoint.
        take_unverified: whether one without checksums, of an earlier version, will do if the files that a
            run needs are there.
    """
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"it is incomplete (no {TRAINER_STATE_NAME})"
    # transformers writes rng_state.pth on one rank, rng_state_N.pth on several.
    if not any(folder.glob("rng_state*.pth")):
        return "it holds a model only, as --save_only_model asks, without the optimizer and the random states"
    if not (folder / CHECKSUMS).is_file():
        if not take_unverified:
            return (
                f"it has no {CHECKSUMS}, so nothing tells whether it is whole (an earlier version wrote none; "
                "--resume_changed true takes it as it is)"
            )
        if not _has_optimizer(folder):
            return "its optimizer's state is missing (optimizer.pt and scheduler.pt)"
        logger.warning("%s has no %s: taken as it is, which --resume_changed asks for", folder, CHECKSUMS)
        return find_malformed(folder)
    if damage := find_changes(folder):
        return damage
    if not _has_optimizer(folder):
        return "its optimizer's state is missing (optimizer.pt and scheduler.pt)"
    return find_malformed(folder)


def find_changes(folder: Path) -> str | None:
    """In what a folder with checksums is no longer as it was written; None where it is."""
    try:
        listed = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {CHECKSUMS} is damaged"
    if (unlisted := find_unlisted(folder, listed)) is not None:
        return unlisted
    # Names and sizes first: a file that was cut short shows without reading gigabytes for their hashes.
    for path, (size, _) in expected.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, expected {size}"
    with ThreadPoolExecutor(_READERS) as readers:
        digests = readers.map(hash_file, expected)
        changed = [path.name for path, digest in zip(expected, digests, strict=True) if digest != expected[path][1]]
    if changed:
        return f"{', '.join(changed)} changed since it was written (checksum)"
    return None


def _has_optimizer(folder: Path) -> bool:
    """Whether the optimizer's state is there, in a form that some engine writes."""
    if any(folder.glob("global_step*")):  # DeepSpeed's
        return True
    sharded = any(path.is_dir() for path in folder.glob("optimizer*"))  # FSDP's
    whole = sharded or (folder / "optimizer.pt").is_file() or (folder / "optimizer.bin").is_file()
    return whole and (folder / "scheduler.pt").is_file()


def _step(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


# The best one, by its evaluation.


def store_best(best: str | None, output_dir: str | Path) -> str | None:
    """How a checkpoint's state names the best one: within the run's folder, which may be moved or renamed."""
    if best is None:
        return None
    inside = os.path.realpath(Path(best).parent) == os.path.realpath(output_dir)
    return os.path.basename(best) if inside else os.path.abspath(best)


def find_best(checkpoint: str | Path) -> tuple[str | None, str | None]:
    """The best checkpoint so far: what the state of a checkpoint calls it, and where it lies now (None if it is gone).

    It is called by its name, or by a path, which an earlier version wrote; it lies beside the checkpoint.
    """
    stored = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("best_model_checkpoint")
    if stored is None:
        return None, None
    # Beside the checkpoint before anywhere else: at its old path a copied run's folder may be another run by now.
    beside = Path(checkpoint).parent / os.path.basename(os.path.normpath(stored))
    if _NAME.fullmatch(beside.name) and beside.is_dir():
        return stored, str(beside)
    return stored, stored if Path(stored).is_absolute() and Path(stored).is_dir() else None


# Removing: what was left half-written, and what is more than --save_total_limit.


def clear_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed run left half-written; a checkpoint that lacked but its name gets it."""
    if not Path(output_dir).is_dir():
        return
    for left in sorted(path for name in _FOLDERS for path in Path(output_dir).glob(_STAGING + name)):
        staged = left / left.name.removeprefix(_STAGING)
        folder = left.with_name(staged.name)
        # Checksums are written last, but may themselves be whole while the disk lost other files: all are read.
        whole = partial(read_again, partial(find_damage, staged), staged)
        if (staged / CHECKSUMS).is_file() and not folder.exists() and whole() is None:
            logger.info("%s was complete when the run before this was ended: kept as %s", left, folder)
            _rename(staged, folder)
        else:
            logger.info("removing %s, which a run that was ended left incomplete", left)
        shutil.rmtree(left, ignore_errors=True)
    remove_leftovers(output_dir)


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove what has a temporary name; nothing goes on from it."""
    for name in (*_FOLDERS, "model", "trial"):
        for left in Path(output_dir).glob(_STAGING + name):
            shutil.rmtree(left, ignore_errors=True)
    for name in (TRAINER_STATE_NAME, RUN_IDENTITY):
        Path(output_dir, f"{name}.part").unlink(missing_ok=True)


def rotate(newest: Path, limit: int | None, keep: Iterable[str | None] = ()) -> None:
    """Remove checkpoints beside the newest one until no more than ``limit`` are left.

    Those of later steps go first: they are another run's, which this one went back from. Then the
    oldest. The newest is complete and stays, so there is always one to go on from.

    Args:
        newest: the checkpoint that was written last.
        limit: None or 0 for no limit.
        keep: more checkpoints that must stay, such as the best one; they count.
    """
    if not limit or limit < 0:
        return
    stays = {os.path.realpath(path) for path in (newest, *keep) if path is not None}
    found = list_checkpoints(newest.parent)
    removable = [path for path in found if os.path.realpath(path) not in stays]
    # False sorts before True: first those of later steps, then the others by step.
    removable.sort(key=lambda path: (_step(path) < _step(newest), _step(path)))
    for path in removable[: max(0, len(found) - limit)]:
        gone = staging_of(path)
        try:
            path.rename(gone)  # At once: a kill while it is removed leaves no half of a checkpoint.
        except OSError as error:
            logger.warning("--save_total_limit: %s cannot be removed: %s", path, error)
            continue
        shutil.rmtree(gone, ignore_errors=True)


# What a resumed run unpickles: plain tensors, and DeepSpeed's files, which must be this user's own.

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
    # Windows has no owner as a number, nor the permission bits below.
    if not hasattr(os, "getuid"):
        return
    for folder in Path(checkpoint).glob(_STEP_FOLDER):
        for file in (folder, *sorted(folder.rglob("*"))):
            status = file.stat()  # of a link, what it leads to: a link itself says it is open to all
            foreign = status.st_uid != os.getuid()
            if foreign or status.st_mode & _WRITABLE_BY_ALL:
                whose = f"belongs to user {status.st_uid}, not to you" if foreign else "can be written by everybody"
                raise ValueError(
                    f"--resume_from_checkpoint {checkpoint}: {file} {whose}, and DeepSpeed runs what its files hold; "
                    "if you trust whoever wrote them, copy the checkpoint to a folder of your own and resume from there"
                )


@contextmanager
def reading_checkpoint(checkpoint: str | None) -> Iterator[None]:
    """Within it a file of a checkpoint that holds more than tensors, or another model's, is a ValueError.

    What holds more is not unpickled. DeepSpeed reads the weights from files of its own, strictly.
    """
    try:
        yield
    except UNSAFE_WEIGHTS as error:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: one of its files (optimizer.pt, scheduler.pt, scaler.pt, "
            "rng_state*.pth) holds more than plain tensors, or is damaged, and is not read; resume from another"
        ) from error
    except RuntimeError as error:
        # torch says "Error(s) in loading state_dict for <class>" in a plain RuntimeError; any other one is a bug.
        if "loading state_dict" not in str(error):
            raise
        raise AgreedError(
            f"--resume_from_checkpoint {checkpoint}: its weights are not those of this run's model: "
            f"{shorten_text(str(error), 500)}; give another checkpoint, or the model and flags that it was written with"
        ) from error
