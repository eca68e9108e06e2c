"""What ``--data_path`` names: data files, folders, patterns such as ``prefix{a,b}.json``, the hub, mixtures.

What is in the files, ``raw_samples.py`` reads.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import math
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.json_text import parse_json
from llava.data.raw_samples import TABLE_SUFFIXES, TEXT_SUFFIXES, check_data_file, suffix_of
from llava.io import is_file, is_there, read_yaml
from llava.messages import list_names, shorten, shorten_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = range | NDArray[np.int64]

logger = logging.getLogger(__name__)

MIXTURE_SUFFIXES = (".yaml", ".yml")

HUB = "hub:"
"""What stands before the name of a data set of the hub."""
_ABOUT = re.compile(r"(readme|licen[cs]e|notice|citation|requirements)\b", re.IGNORECASE)
"""Names of files that only speak of those beside them."""
_MOST_FILES = 10_000
_LONGEST_PATTERN = 100_000
_GROUP = re.compile(r"\{([^{}]*)\}")
_SAMPLING = re.compile(r"(all|(?:first|end|random):(\d+|\d+(?:\.\d+)?%))")
_ENTRY_KEYS = ("json_path", "sampling_strategy", "source", "data_folder")


# What --data_path names: entries of data files.


@dataclass(frozen=True)
class DataEntry:
    """Data files that are read and sampled together.

    Attributes:
        files: paths, in order.
        sampling: which samples of all of them are taken: "all", or "first:", "end:" or "random:" and a number or a
            share, such as "random:10%".
        source: the sub-folder of the media folder that stands in for the samples' own ``source``; "" is none.
        data_folder: what relative media paths start from, before any flag.
        name: what the entry is called in errors.
    """

    files: tuple[str, ...]
    sampling: str = "all"
    source: str | None = None
    data_folder: str | None = None
    name: str = "--data_path"


def find_entries(paths: Sequence[str], flag: str = "--data_path") -> list[DataEntry]:
    """The entries that the words behind a flag stand for.

    Raises:
        ValueError: a file is missing or of an unknown kind, or a mixture is not as ``docs/data.md`` describes.
    """
    entries: list[DataEntry] = []
    for path in map(os.path.expanduser, paths):
        if Path(path).suffix in MIXTURE_SUFFIXES:
            entries += _read_mixture(path, flag)
        else:
            entries += [DataEntry((file,), name=f"{flag} {path}") for file in _find_files(path, f"{flag} {path}")]
    # Those of a mixture say with sampling_strategy which part of a file they take.
    named = Counter(os.path.realpath(file) for one in entries if one.name.startswith(flag) for file in one.files)
    if twice := [file for file, number in named.items() if number > 1]:
        logger.warning("%s: named more than once, and trained on as often: %s", flag, list_names(twice))
    return entries


def expand_braces(pattern: str, name: str) -> list[str]:
    """The paths of a pattern, its last group varying fastest; a path without braces, or that exists, is itself.

    Raises:
        ValueError: braces that do not match, or an alternative that is empty; begins with ``name``.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"{shorten_text(name, 200)}: has {len(pattern):,} characters; give a folder, or a pattern with *"
        )
    if not ("{" in pattern or "}" in pattern) or is_there(pattern):
        return [pattern]
    pieces = _GROUP.split(pattern)  # text, group, text, group, text
    if any("{" in piece or "}" in piece for piece in pieces):
        raise ValueError(f"{name}: braces that do not match, or stand within braces; write prefix{{a,b}}.json")
    groups = [[part.strip() for part in group.split(",")] for group in pieces[1::2]]
    for group, written in zip(groups, pieces[1::2], strict=True):
        if "" in group:
            empty = f"alternative {group.index('') + 1} of {{{written}}}"
            raise ValueError(f"{name}: {empty} is empty; write prefix{{a,b}}.json")
    if (number := math.prod(map(len, groups))) > _MOST_FILES:
        raise ValueError(
            f"{name}: its braces stand for {number:,} files, and at most {_MOST_FILES:,} are read; give a folder, or a "
            "pattern with *"
        )
    return ["{}".join(pieces[::2]).format(*choice) for choice in product(*groups)]


def _find_files(pattern: str, name: str) -> list[str]:
    """The data files of a path, a folder, a pattern or a data set of the hub; each must be there."""
    if pattern.startswith(HUB):
        return _load_from_hub(pattern.removeprefix(HUB), name)
    paths = [path for braced in expand_braces(pattern, name) for path in _expand_wildcards(braced, name)]
    files = [file for path in paths for file in _open_folder(path, name)]
    for file in files:  # All are checked before the first is read.
        check_data_file(file, name if file == pattern else f"{name}: {file}")
    return files


def _expand_wildcards(pattern: str, name: str) -> list[str]:
    """The files of a pattern with ``*``, ``?`` or ``**``, in the order of their names; any other path is itself."""
    if not glob.has_magic(pattern) or is_there(pattern):
        return [pattern]
    if not (found := sorted(glob.glob(pattern, recursive=True))):  # noqa: PTH207
        raise ValueError(f"{name}: no file has such a name")
    return found


def _load_from_hub(asked: str, name: str) -> list[str]:
    """The Arrow files of a data set of the hub, which ``datasets`` keeps in its own cache.

    Args:
        asked: the data set's name, with a split behind an @ if it is not train: owner/name@validation.
        name: what the entry is called in errors.
    """
    import datasets

    path, _, split = asked.partition("@")
    try:
        loaded = datasets.load_dataset(path, split=split or "train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{name}: cannot be loaded: {said:.300}; write {HUB}OWNER/NAME or {HUB}OWNER/NAME@SPLIT"
        ) from error
    return [entry["filename"] for entry in loaded.cache_files]


def _open_folder(path: str, name: str) -> list[str]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote, the corpora in another folder, or a file."""
    state = Path(path, "state.json")
    if is_file(Path(path, "dataset_dict.json")):
        splits = sorted(file.parent.name for file in Path(path).glob("*/state.json"))
        raise ValueError(f"{name}: holds several splits; give one of them: {', '.join(f'{path}/{s}' for s in splits)}")
    if not is_file(state):
        return _list_corpora(path, name) if os.path.isdir(path) else [path]
    try:
        files = [str(Path(path, entry["filename"])) for entry in parse_json(state.read_bytes(), "JSON")["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: its state.json is not one of datasets' save_to_disk: {error!r}") from error
    if outside := [file for file in files if Path(file).parent != Path(path)]:
        raise ValueError(f"{name}: its state.json names {outside[0]}, which lies outside of it")
    return files


def _list_corpora(folder: str, name: str) -> list[str]:
    """The text files and tables in a folder and those in it, in the order of their paths.

    Files that only speak of the others (README.txt, LICENSE.txt) or are of other kinds are left out, with a word, and
    so are hidden ones, without.
    """
    kinds = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), *TABLE_SUFFIXES)
    found = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    files = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    kept = [str(file) for file in files if suffix_of(file) in kinds and not _ABOUT.match(file.name)]
    if left := sorted({*map(str, files)}.difference(kept)):
        logger.warning("%s: left out, by their names no corpora: %s", name, list_names(left))
    if not kept:
        raise ValueError(f"{name}: is a folder without a corpus in it; known kinds: {', '.join(kinds)}")
    return kept


def _read_mixture(path: str, flag: str) -> Iterator[DataEntry]:
    """The entries of a YAML mixture."""
    file = Path(path)
    if not is_file(file):
        raise ValueError(f"{flag} {path}: {'not a file' if is_there(file) else 'no such file'}")
    content = read_yaml(file, path)
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise ValueError(
            f"{path}: expected datasets, a list of entries with a json_path each, found {shorten(content)}"
        )
    _check_keys(content, ("datasets",), path)
    for number, entry in enumerate(content["datasets"], start=1):
        yield _parse_entry(entry, file.absolute().parent, f"{path}, entry {number}")


def _parse_entry(entry: object, home: Path, name: str) -> DataEntry:
    """An entry of a mixture whose relative paths start from ``home``."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected json_path and its settings, found {shorten(entry)}")
    _check_keys(entry, _ENTRY_KEYS, name)
    given = entry.get("json_path")
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{name}: json_path must be a path or a list of paths, found {shorten(given)}")
    for key in ("source", "data_folder"):
        if not isinstance(entry.get(key), str | None):
            raise ValueError(f"{name}: {key} must be the name of a folder, found {shorten(entry[key])}")
    # "first:10%" matches as ("first:10%", "10%"), "all" as ("all", None).
    sampling = entry.get("sampling_strategy", "all")
    match = _SAMPLING.fullmatch(sampling) if isinstance(sampling, str) else None
    amount = (match[2] or "1") if match else "0"
    if not Fraction(amount.rstrip("%")) > 0 or (amount.endswith("%") and Fraction(amount[:-1]) > 100):
        raise ValueError(
            f"{name}: sampling_strategy must be all, first:N, end:N or random:N, where N is at least 1 or up to 100%, "
            f"found {shorten(sampling)}"
        )

    def place(path: str) -> str:
        if path.startswith(HUB):
            return path
        return os.path.join(home, os.path.expanduser(path))  # noqa: PTH111

    folder = entry.get("data_folder")
    return DataEntry(
        files=tuple(file for p in patterns for file in _find_files(place(p), f"{name}: json_path {p}")),
        sampling=sampling,
        source=entry.get("source"),
        data_folder=os.path.normpath(place(folder)) if folder else None,
        name=name,
    )


def _check_keys(found: Mapping[object, object], known: Collection[str], name: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{name}: unknown key {shorten(key)}; {hint}")


def count_samples(sampling: str, available: int) -> int:
    """How many of ``available`` samples a sampling takes; shares are rounded up.

    Raises:
        ValueError: more than there are.
    """
    amount = sampling.partition(":")[2] or "100%"
    if amount.endswith("%"):
        return math.ceil(available * Fraction(amount[:-1]) / 100)
    if int(amount) > available:
        raise ValueError(f"sampling_strategy {sampling} asks for more than the {available} samples there are")
    return int(amount)


def choose_rows(sampling: str, counts: Sequence[int], seed: str) -> list[Rows]:
    """The rows that a sampling takes of each of several files with so many samples, ascending.

    A random choice depends on the seed and on nothing else, and of two with one seed the larger holds the
    smaller: each row draws a 64-bit number, and those with the lowest are taken.

    Raises:
        ValueError: it asks for more than there are.
    """
    available = sum(counts)
    count = count_samples(sampling, available)
    rows: Rows = range(available - count, available) if sampling.startswith("end") else range(count)
    if sampling.startswith("random"):
        import numpy as np

        # NumPy keeps the stream of a bit generator forever, but not what its other functions make of it.
        generator = np.random.PCG64(int(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest(), 16))
        rows = np.sort(np.argsort(generator.random_raw(available), kind="stable")[:count])
    return [cut_rows(rows, end - of_file, end) for end, of_file in zip(accumulate(counts), counts, strict=True)]


def cut_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Those of ascending rows from ``start`` to before ``stop``, counted from ``start``."""
    cut = rows[bisect_left(rows, start) : bisect_left(rows, stop)]
    return range(cut.start - start, cut.stop - start) if isinstance(cut, range) else cut - start
