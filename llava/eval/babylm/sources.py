"""Where items stand: JSON lines in folders and in zips, which are read without being unpacked."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from llava.messages import list_names, shorten, shorten_text

SUFFIX = ".jsonl"
_TABLES = (".tsv", ".csv")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_LONGEST_LINE = 2**24
"""Characters. A zip of some kilobytes may hold a line of gigabytes."""


_PACKED = re.compile(r"(\.zip|\.jsonl\.\w+|\.(?!jsonl$)(?i:jsonl))$")
"""Names of files in a folder that may hold items, and are not read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """A file of JSON lines, in a folder or in a zip.

    Attributes:
        path: of the file, or of the zip that holds it.
        member: its name within the zip; None for a file of its own.
    """

    path: Path
    member: str | None = None

    @property
    def stem(self) -> str:
        return PurePosixPath(self.member).stem if self.member is not None else self.path.stem

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member is not None else str(self.path)

    def read_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each line's number, from 1, and its object; empty lines are left out.

        Raises:
            ValueError: a line is no JSON object, or has not as many cells as the line of names at the head of a table;
                the text is not UTF-8; the zip is damaged or needs a password; or there is no line at all.
        """
        empty, number = True, 0
        read = self._read_table if self.path.suffix in _TABLES else self._read_json
        with self._open() as file:
            try:
                for number, row in read(io.TextIOWrapper(file, encoding="utf-8-sig", errors="strict", newline="")):
                    empty = False
                    yield number, row
            except UnicodeDecodeError as error:
                raise ValueError(f"{self}, behind line {number}: is no text in UTF-8: {error}") from error
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(
                    f"{self}, behind line {number}: the zip is damaged ({error}); fetch it anew"
                ) from error
        if empty:
            raise ValueError(f"{self}: has no line; take the file away, or fetch it anew")

    def _read_json(self, file: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any]]]:
        # With a limit: what a zip unpacks to is not known before it is read.
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"{self}, line {number}: has more than {_LONGEST_LINE} characters")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self}, line {number}: no JSON, but {shorten_text(line)!r}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{self}, line {number}: expected a JSON object, got {shorten(row)}")
            if "\\u" in line and _HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False)):
                raise ValueError(f"{self}, line {number}: has half of a character (\\ud800 to \\udfff) by itself")
            yield number, row

    def _read_table(self, file: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.path.suffix == ".tsv":  # There quotes are marks of the text; between commas they hold a cell together.
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        else:
            reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise ValueError(f"{self}, line 1: names a column twice: {', '.join(names)}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ValueError(
                        f"{self}, line {reader.line_num}: has {len(cells)} cells; line 1 names {len(names)}"
                    )
                yield reader.line_num, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{self}, line {reader.line_num}: {error}") from error

    def _open(self) -> IO[bytes]:
        if self.member is None:
            return self.path.open("rb")
        try:
            return zipfile.ZipFile(self.path).open(self.member)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
            # A RuntimeError is what a member with a password raises, as the official fast data of EWoK have one.
            raise ValueError(f"{self}: cannot be read in the zip ({error}); unpack it, and give the folder") from error


@dataclass(frozen=True)
class Collection:
    """The files of JSON lines of one folder, which official data have a task in.

    Attributes:
        name: of the folder; of the zip or of the file where there is none around them.
        files: by their names.
        folder: where pictures are looked for; None within a zip.
    """

    name: str
    files: tuple[SourceFile, ...]
    folder: Path | None

    @property
    def is_fast(self) -> bool:
        """Whether this is a part of the official fast data, of which some folders are called as the full ones are."""
        file = self.files[0]
        parents = PurePosixPath(file.path.as_posix() if file.member is None else file.member).parent.parts
        return self.name.endswith("_fast") or "fast_eval" in parents


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def find_collections(path: str) -> list[Collection]:
    """What a folder, with those within it, a zip or a single file holds; a ValueError where that is nothing."""
    root = Path(path)
    if not root.exists():
        raise ValueError(f"--data {shorten_text(path)}: there is no such file or folder")
    groups: dict[PurePosixPath | Path, list[SourceFile]] = {}
    if root.is_dir():
        shown = [file for file in sorted(root.rglob("*")) if file.is_file() and not _is_hidden(file, root)]
        for file in shown:
            if file.suffix == SUFFIX:
                groups.setdefault(file.parent, []).append(SourceFile(file))
        if packed := [str(file) for file in shown if _PACKED.search(file.name)]:
            logger.warning(
                "--data %s: not read, as they are packed or end otherwise than in %s: %s",
                path, SUFFIX, list_names(packed),
            )  # fmt: skip
    elif zipfile.is_zipfile(root):
        # Names such as __MACOSX are what archivers add, and hold no items.
        with zipfile.ZipFile(root) as archive:
            for name in sorted(archive.namelist()):
                member = PurePosixPath(name)
                if member.suffix == SUFFIX and not any(part.startswith((".", "__")) for part in member.parts):
                    groups.setdefault(member.parent, []).append(SourceFile(root, name))
    elif root.suffix == SUFFIX:
        groups[root.parent] = [SourceFile(root)]
    elif root.suffix == ".zip":
        raise ValueError(f"--data {shorten_text(path)}: is no whole zip, it is cut short or damaged; copy it again")
    else:
        raise ValueError(f"--data {shorten_text(path)}: expected a folder, a zip or a file of JSON lines ({SUFFIX})")
    if not groups:
        raise ValueError(f"--data {shorten_text(path)}: holds no file of JSON lines ({SUFFIX})")
    return [
        Collection(
            parent.name if root.is_dir() or parent.name else root.stem,
            tuple(files),
            Path(parent) if root.is_dir() or root.suffix == SUFFIX else None,
        )
        for parent, files in groups.items()
    ]


def choose_collection(collections: list[Collection], name: str, fast: bool) -> Collection:
    """The one of several folders of a task: of the official fast data or of the full ones."""
    fitting = [one for one in collections if one.is_fast == fast] or collections
    if len(fitting) > 1:
        raise ValueError(f"--data: {name} is there twice, in {' and '.join(str(one.files[0]) for one in fitting)}")
    (chosen,) = fitting
    if chosen.is_fast and not fast:
        logger.warning("%s: only its official fast data are there, a part of its items: %s", name, chosen.name)
    return chosen
