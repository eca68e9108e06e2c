"""What ``--data_path`` names: data files, brace patterns, and YAML mixtures of both."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from llava.data.files import expand_home
from llava.data.raw_samples import check_data_file
from llava.io import read_yaml

MIXTURE_SUFFIXES = (".yaml", ".yml")

_GROUP = re.compile(r"\{([^{}]*)\}")
_SAMPLING = re.compile(r"(all|(?:first|end|random):(\d+|\d+(?:\.\d+)?%))")
_ENTRY_KEYS = ("json_path", "sampling_strategy", "source", "data_folder")


@dataclass(frozen=True)
class Sampling:
    """Which samples of an entry are taken: ``all``, or its ``first``, its ``end`` or ``random`` ones.

    ``amount`` is a number of samples, or a share of them as in "10%"; "" with ``all``.
    """

    kind: str = "all"
    amount: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount}" if self.amount else self.kind

    def count(self, available: int) -> int:
        """How many of ``available`` samples are taken; shares are rounded up.

        Raises:
            ValueError: more than there are.
        """
        if self.kind == "all":
            return available
        if self.amount.endswith("%"):
            return math.ceil(available * Fraction(self.amount[:-1]) / 100)
        if int(self.amount) > available:
            raise ValueError(f"sampling_strategy {self} asks for more than the {available} samples there are")
        return int(self.amount)


@dataclass(frozen=True)
class DataEntry:
    """Data files that are read and sampled together.

    Attributes:
        files: paths, in order.
        sampling: which samples of all of them are taken.
        source: the sub-folder of the media folder that stands in for the samples' own ``source``; "" is none.
        data_folder: what relative media paths start from, before any flag.
        name: what the entry is called in errors.
    """

    files: tuple[str, ...]
    sampling: Sampling = Sampling()
    source: str | None = None
    data_folder: str | None = None
    name: str = "--data_path"


def find_entries(paths: Sequence[str], flag: str = "--data_path") -> list[DataEntry]:
    """The entries that the words behind a flag stand for.

    Args:
        paths: data files, folders of ``datasets``, patterns such as ``prefix{a,b}.json``, YAML mixtures.
        flag: its name, for errors.

    Raises:
        ValueError: a file is missing or of an unknown kind, or a mixture is not as ``docs/data.md`` describes.
    """
    entries: list[DataEntry] = []
    for path in map(expand_home, paths):
        if Path(path).suffix in MIXTURE_SUFFIXES:
            entries += _read_mixture(path, flag)
        else:
            entries += [DataEntry((file,), name=f"{flag} {path}") for file in _find_files(path, f"{flag} {path}")]
    return entries


def expand_braces(pattern: str, name: str) -> list[str]:
    """The paths of a pattern, its last group varying fastest; a path without braces, or that exists, is itself.

    Raises:
        ValueError: braces that do not match, or an alternative that is empty; begins with ``name``.
    """
    if not ("{" in pattern or "}" in pattern) or Path(pattern).exists():
        return [pattern]
    pieces = _GROUP.split(pattern)
    if any("{" in piece or "}" in piece for piece in pieces):
        raise ValueError(f"{name}: braces that do not match, or stand within braces; write prefix{{a,b}}.json")
    groups = [[part.strip() for part in group.split(",")] for group in pieces[1::2]]
    for group, written in zip(groups, pieces[1::2], strict=True):
        if "" in group:
            raise ValueError(
                f"{name}: alternative {group.index('') + 1} of {{{written}}} is empty; write prefix{{a,b}}.json"
            )
    return [
        "".join(text for pair in zip(pieces[::2], (*choice, ""), strict=True) for text in pair)
        for choice in product(*groups)
    ]


def _find_files(pattern: str, name: str) -> list[str]:
    """The data files of a path, a folder of ``datasets`` or a brace pattern; each must be there."""
    files = [file for path in expand_braces(pattern, name) for file in _open_folder(path, name)]
    for file in files:
        check_data_file(file, name if file == pattern else f"{name}: {file}")
    return files


def _open_folder(path: str, name: str) -> list[str]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote; any other path is itself."""
    state = Path(path, "state.json")
    if Path(path, "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in Path(path).glob("*/state.json"))
        raise ValueError(f"{name}: holds several splits; give one of them: {', '.join(f'{path}/{s}' for s in splits)}")
    if not state.is_file():
        return [path]
    try:
        files = [str(Path(path, entry["filename"])) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: its state.json is not one of datasets' save_to_disk: {error!r}") from error
    if outside := [file for file in files if Path(file).parent != Path(path)]:
        raise ValueError(f"{name}: its state.json names {outside[0]}, which lies outside of it")
    return files


def _read_mixture(path: str, flag: str) -> Iterator[DataEntry]:
    """The entries of a YAML mixture."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{flag} {path}: {'not a file' if file.exists() else 'no such file'}")
    content = read_yaml(file, path)
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise ValueError(f"{path}: expected datasets, a list of entries with a json_path each, found {content!r:.80}")
    _check_keys(content, ("datasets",), path)
    for number, entry in enumerate(content["datasets"], start=1):
        yield _parse_entry(entry, file.absolute().parent, f"{path}, entry {number}")


def _parse_entry(entry: Any, home: Path, name: str) -> DataEntry:
    """An entry of a mixture whose relative paths start from ``home``."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name}: expected json_path and its settings, found {entry!r:.80}")
    _check_keys(entry, _ENTRY_KEYS, name)
    given = entry.get("json_path")
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{name}: json_path must be a path or a list of paths, found {given!r}")
    for key in ("source", "data_folder"):
        if not isinstance(entry.get(key), str | None):
            raise ValueError(f"{name}: {key} must be the name of a folder, found {entry[key]!r}")
    files = [
        file for p in patterns for file in _find_files(os.path.join(home, expand_home(p)), f"{name}: json_path {p}")
    ]
    folder = entry.get("data_folder")
    return DataEntry(
        files=tuple(files),
        sampling=_parse_sampling(entry.get("sampling_strategy", "all"), name),
        source=entry.get("source"),
        data_folder=os.path.normpath(os.path.join(home, expand_home(folder))) if folder else None,
        name=name,
    )


def _parse_sampling(value: Any, name: str) -> Sampling:
    match = _SAMPLING.fullmatch(value) if isinstance(value, str) else None
    kind, _, amount = match.group().partition(":") if match else ("", "", "")
    number = Fraction(amount.rstrip("%") or 1)
    if not match or number == 0 or (amount.endswith("%") and number > 100):
        raise ValueError(
            f"{name}: sampling_strategy must be all, first:N, end:N or random:N, where N is at least 1 or up to 100%, "
            f"found {value!r}"
        )
    return Sampling(kind, amount)


def _check_keys(found: dict[Any, Any], known: Sequence[str], name: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{name}: unknown key {key!r}; {hint}")
