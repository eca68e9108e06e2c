"""What lies in a run's folder before it starts: nothing, its own checkpoints, or another run that must not be lost."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from llava.model.model_card import CARD, is_generated
from llava.train import preemption
from llava.train.arguments import TrainingArguments, scheduler_job
from llava.train.bad_samples import BAD_SAMPLES_FILE
from llava.train.checkpoint import (
    CHECKSUMS,
    RUN_IDENTITY,
    is_auto,
    is_resume_asked,
    list_checkpoints,
    list_milestones,
    remove_leftovers,
)
from llava.train.distributed import broadcast_from_rank0
from llava.train.exposure_log import EXPOSURE_FILE
from llava.train.nan_check import BAD_STEP_RUN
from llava.train.run_lock import release_lock, take_lock
from llava.train.run_report import RUN_REPORT, is_report_own
from llava.train.run_starts import RUN_STARTS
from llava.train.samples import SAMPLES_FILE, SAMPLES_FOLDER
from llava.train.score_table import SCORE_FILES

logger = logging.getLogger(__name__)

_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "adapter_model*")
_RUN_FILES = (
    *_WEIGHTS, *SCORE_FILES, BAD_SAMPLES_FILE, EXPOSURE_FILE, RUN_REPORT, RUN_STARTS, "config.json",
    "generation_config.json", "adapter_config.json", "non_lora_trainables.*", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "spiece.model", "chat_template.jinja", "training_args.bin",
)  # fmt: skip
# A run's marks come last: whoever is ended in between finds, the next time, that a run lay here.
_MARKS = (TRAINER_STATE_NAME, RUN_IDENTITY)


def take_folder(training_args: TrainingArguments, sources: Mapping[str, str | None] | None = None) -> None:
    """Take the lock of ``--output_dir`` and, at the start of a run, see that nothing of worth is overwritten there.

    Args:
        sources: what the run reads, by flag; None where the folder has been seen to.

    Raises:
        ValueError: another run is in the folder, or has been and nothing says what shall become of it.
    """
    folder = Path(str(training_args.output_dir))

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ValueError(f"--output_dir {folder} is a file; give a folder") from error
        except OSError as error:
            raise ValueError(f"--output_dir {folder} cannot be made: {error}; give another folder") from error
        take_lock(folder, *scheduler_job())
        if sources is not None:
            given = training_args.resume_from_checkpoint
            prepare_folder(str(folder), given, training_args.overwrite_output_dir, sources)

    try:
        # The other ranks wait, and get the first one's error.
        broadcast_from_rank0(take)
    except ValueError:
        release_lock(folder)
        raise
    if sources is not None and not (folder / RUN_IDENTITY).is_file():
        preemption.may_leave(lambda: release_lock(folder))


@contextlib.contextmanager
def taking_folder(training_args: TrainingArguments, sources: Mapping[str, str | None]) -> Iterator[None]:
    """Take the folder for a run that trains, and give it back if what is done in it fails; see ``take_folder``."""
    if not training_args.do_train:  # The folder becomes no run's.
        yield
        return
    take_folder(training_args, sources)
    try:
        yield
    except BaseException:
        release_lock(str(training_args.output_dir))
        raise


def prepare_folder(
    output_dir: str, resume: str | bool | None, overwrite: bool, sources: Mapping[str, str | None]
) -> None:
    """See that a run may write to its folder, and clear it where that is asked for.

    Args:
        output_dir: the folder, whose lock this run has.
        resume: ``--resume_from_checkpoint``.
        overwrite: ``--overwrite_output_dir``: what another run left goes. Files that no run leaves stay.
        sources: what the run reads, by flag; it is never cleared.

    Raises:
        ValueError: the folder holds a run and nothing says what shall become of it; names the ways on.
    """
    folder = Path(output_dir)
    resumes = is_resume_asked(resume)
    if overwrite and resumes:
        raise ValueError(
            f"--overwrite_output_dir starts anew and --resume_from_checkpoint {resume} goes on; give one of them"
        )
    for flag, path in sources.items():
        if path and Path(path).is_dir() and Path(path).resolve() == folder.resolve() and not _is_own_run(folder):
            raise ValueError(
                f"--output_dir {output_dir} is {flag} too, which would be overwritten; give another folder"
            )
    if overwrite:
        clear_run(folder, sources)
        return
    found = describe_run(folder)
    if found is None:
        return
    if resumes and goes_on_inside(str(resume), folder):
        # Milestones of a run that was ended before its first checkpoint are written once more.
        if not list_checkpoints(folder) and not (folder / RUN_IDENTITY).is_file() and _has_model(folder):
            raise ValueError(
                f"--output_dir {output_dir} holds a model ({found}), which would be overwritten, and no checkpoint to "
                "go on from (--resume_from_checkpoint); give another --output_dir"
            )
        return
    if resumes:
        raise ValueError(
            f"--output_dir {output_dir} holds a run ({found}), but --resume_from_checkpoint {resume} is another's; "
            "give --resume_from_checkpoint auto to go on with the one that is there, another --output_dir, or remove it"
        )
    if not _is_own_run(folder):
        raise ValueError(
            f"--output_dir {output_dir} holds a model that no run left there ({found}), which would be overwritten; "
            "give another folder"
        )
    raise ValueError(
        f"--output_dir {output_dir} holds a run ({found}), which would be overwritten; go on with it "
        "(--resume_from_checkpoint auto), give another --output_dir, or start anew in its place "
        "(--overwrite_output_dir true, which removes what it left)"
    )


def describe_run(folder: Path) -> str | None:
    """What a run, or a model, left in a folder; None where there is nothing of the kind."""
    if not folder.is_dir():
        return None
    names = [path.name for path in list_checkpoints(folder)]
    names += [path.name for path in list_milestones(folder)]
    names = names if len(names) < 4 else [*names[:2], "...", names[-1]]
    for pattern in (*_WEIGHTS, *_MARKS):
        names += sorted(path.name for path in folder.glob(pattern))
    return ", ".join(dict.fromkeys(names)) or None


def _has_model(folder: Path) -> bool:
    return any(path for pattern in (*_WEIGHTS, *_MARKS) for path in folder.glob(pattern))


def goes_on_inside(resume: str, folder: Path) -> bool:
    """Whether a run that resumes so goes on with what its own folder holds."""
    return is_auto(resume) or Path(resume).resolve().parent == folder.resolve()


def clear_run(folder: Path, sources: Mapping[str, str | None]) -> None:
    """Remove what a run left in a folder; other files stay.

    Raises:
        ValueError: it is a model that no run left, or something that the new run reads is among it.
    """
    found = describe_run(folder)
    if found is None:
        return
    if not _is_own_run(folder):
        raise ValueError(
            f"--overwrite_output_dir: {folder} holds a model that no run left there ({found}), and is not cleared; "
            "give another --output_dir"
        )
    folders = [path for path in _list_saved(folder) if _is_checkpoint(path)]
    folders += [path for path in folder.glob("bad_step-*") if (path / BAD_STEP_RUN).is_file()]
    folders += [path for path in folder.glob("hang-*") if any(path.glob("rank-*.txt"))]
    folders += [folder / SAMPLES_FOLDER] if (folder / SAMPLES_FOLDER / SAMPLES_FILE).is_file() else []
    files = [path for pattern in _RUN_FILES for path in folder.glob(pattern) if path.is_file()]
    if not is_report_own(folder):
        files.remove(folder / RUN_REPORT)
    going = {path.resolve() for path in (*folders, *files)}
    for flag, source in sources.items():
        place = Path(source).resolve() if source else None
        if place is not None and (place == folder.resolve() or going & {place, *place.parents}):
            raise ValueError(
                f"--overwrite_output_dir would remove {flag} {source}, which this run starts from; give another "
                "--output_dir"
            )
    logger.warning("--overwrite_output_dir: removing the run in %s (%s)", folder, found)
    remove_leftovers(folder)
    for path in folders:
        shutil.rmtree(path)
    for events in (folder / "runs").glob("*/events.out.tfevents.*"):
        events.unlink()
    if is_generated(folder / CARD):  # One that somebody wrote or changed stays.
        files.append(folder / CARD)
    for path in (*files, *(folder / mark for mark in _MARKS)):
        path.unlink(missing_ok=True)


def _is_own_run(folder: Path) -> bool:
    """Whether a run of this program left something in a folder; otherwise a model there is somebody's own."""
    marked = any((folder / mark).is_file() for mark in _MARKS)
    return marked or any(_is_checkpoint(path) for path in _list_saved(folder))


def _list_saved(folder: Path) -> list[Path]:
    return [*list_checkpoints(folder), *list_milestones(folder)]


def _is_checkpoint(folder: Path) -> bool:
    return (folder / TRAINER_STATE_NAME).is_file() or (folder / CHECKSUMS).is_file()
