"""Annotation files of all tasks, as samples to ask a model about; ``docs/evaluation.md`` shows the layouts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from llava.data.files import MIXTURE_SUFFIXES, expand_braces
from llava.data.raw_samples import read_samples as read_raw_samples
from llava.eval.annotations.captions import read_captions, read_conversations
from llava.eval.annotations.entries import MediaFolders, read_entries
from llava.eval.annotations.expressions import AUTO, BOX_FORMATS, read_expressions
from llava.eval.annotations.videos import is_st_align, read_moments, read_tubes
from llava.eval.store import EvalSample
from llava.io import is_file, is_there

__all__ = ["BOX_FORMATS", "MediaFolders", "read_annotations"]

NO_FOLDERS = MediaFolders()
"""Media lie beside the file that names them."""

_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", *MIXTURE_SUFFIXES)
_PICKLES = (".p", ".pkl", ".pickle")


def read_annotations(
    layout: str,
    paths: Sequence[str],
    folders: MediaFolders = NO_FOLDERS,
    box_format: str = AUTO,
    split: str | None = None,
) -> list[EvalSample]:
    """Read what a task is scored on.

    Args:
        layout: what annotation files hold: ``expressions``, ``moments``, ``tubes`` or ``captions``. Data files of the
            library are known by their conversations and may serve any.
        paths: of files, or patterns such as ``prefix{a,b}.json``.
        folders: where the media lie.
        box_format, split: see ``read_expressions``.

    Raises:
        ValueError: names the file and the entry that cannot be read, or there is no sample.
    """
    # All files are looked at before the first is read: a typo in the last is told at once.
    files = [file for path in paths for file in expand_braces(path, f"--data {path}")]
    for file in files:
        _check_file(file)
    # By content, not by name: benchmarks and data files are .json alike.
    if all(Path(file).suffix in MIXTURE_SUFFIXES or _has_conversations(file) for file in files):
        samples = read_conversations(paths, folders)
    elif layout == "expressions":
        samples = read_expressions(files, folders, box_format, split)
    elif layout == "moments":
        samples = read_moments(files, folders)
    elif layout == "tubes":
        samples = read_tubes([entry for file in files for entry in read_entries(file)], folders)
    else:
        samples = read_captions(files, folders)
    if not samples:
        only = f" whose split is {split!r}" if split else ""
        raise ValueError(f"--data {' '.join(paths)}: no samples{only}, there is nothing to score")
    return samples


def _check_file(file: str) -> None:
    path = Path(file)
    if not is_file(path):
        raise ValueError(f"--data {file}: {'not a file' if is_there(path) else 'no such file'}")
    if path.suffix in _PICKLES:
        raise ValueError(
            f"--data {file}: a pickle runs whatever code it holds and is not read; where you trust it, write what it "
            "holds to a .json file first"
        )
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"--data {file}: unknown kind of file {path.suffix!r}; known: {', '.join(_SUFFIXES)}")


def _has_conversations(file: str) -> bool:
    """Whether a file is one of the library's own data files."""
    if Path(file).suffix not in (".json", ".jsonl") or _is_object(file):
        return False
    # One sample is read, not the file, which may be of gigabytes.
    first = next(iter(islice(read_raw_samples(file), 1)), (None, ""))[0]
    return isinstance(first, dict) and "conversations" in first and not is_st_align(first)


def _is_object(file: str) -> bool:
    with Path(file).open("rb") as stream:
        return Path(file).suffix == ".json" and stream.read(64).lstrip().startswith(b"{")
