"""The folder of an export: written beside and renamed, marked as an export, and never written over something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llava.command import check_output_folder
from llava.io import apply_umask, sync, write_json
from llava.messages import list_names
from llava.model.model_card import CARD, is_generated

EXPORT_FILE = "export.json"
"""What was exported from where, and how the check at the end came out; the mark by which ``--overwrite`` knows it."""


def check_target(out: Path, checkpoint: str, overwrite: bool, mark: str = EXPORT_FILE) -> None:
    """A ValueError where an export must not be written to ``out``: it would be lost, or something else would.

    Args:
        out: a folder that there is not yet, an empty one or, with ``overwrite``, an earlier export.
        checkpoint: what is exported.
        overwrite: whether an earlier export may be replaced.
        mark: a file that every export, or other result of the same command, has.
    """
    check_output_folder(str(out), "OUT")
    what = Path(mark).stem
    source, target = Path(os.path.realpath(checkpoint)), Path(os.path.realpath(out))
    if target == source or target in source.parents:
        raise ValueError(f"OUT {out} is the checkpoint itself or holds it; give another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"OUT {out} is not empty; give another folder, or replace an earlier {what} with --overwrite")
    if not (out / mark).is_file():
        raise ValueError(
            f"OUT {out} has no {mark}, so it is no {what}, and --overwrite replaces nothing else; give another "
            "folder, or remove it yourself"
        )
    if others := find_others(out, mark):
        raise ValueError(
            f"OUT {out} holds {list_names(others)} beside the {what}, which --overwrite would remove; move it away"
        )


def find_others(out: Path, mark: str = EXPORT_FILE) -> list[str]:
    """What lies in the folder of an export and is none of it; nothing of one whose version kept no list."""
    wrote = json.loads((out / mark).read_text(encoding="utf-8")).get("files")
    known = {*(wrote or ()), mark, "__pycache__"}
    if (out / CARD).exists() and not is_generated(out / CARD):
        known.discard(CARD)  # Somebody's own by now.
    return sorted(path.name for path in out.iterdir() if path.name not in known) if wrote else []


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write to, which takes its name and its place when the block ends without an error."""
    staged = out.absolute().with_name(f".{out.absolute().name}.part-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        apply_umask(staged)
        # Contents before names: after a loss of power the folder is whole, or is not there.
        for path in [*staged.rglob("*"), staged]:
            sync(path)
        replaced = staged.with_name(f".{out.absolute().name}.old-{os.getpid()}")
        # A rename does not replace a folder that has files, so the older one steps aside first.
        if out.exists():
            out.rename(replaced)
        staged.rename(out)
        sync(out.absolute().parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def edit_json(path: Path, changes: Mapping[str, object]) -> None:
    """Set entries of a JSON file; those that are None are taken out."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {name: value for name, value in content.items() if value is not None})
