"""``--pairs``: files of one's own, with a column for each candidate (MultiBLiMP, BLiMP-IT) or with labels (ItaCoLA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.eval.babylm.sources import SourceFile
from llava.eval.babylm.tasks import TASKS, Parsed, Row, Task, TaskData
from llava.eval.choices import Candidate

OFFICIAL = "pairs"
"""The folder of their results, beside those of the official tasks."""
KNOWN_COLUMNS = (("sentence_good", "sentence_bad"), ("good", "bad"), ("sen", "wrong_sen"))
"""Of BLiMP, BLiMP-IT and MultiBLiMP: taken where no columns are given."""


@dataclass(frozen=True)
class PairColumns:
    """Which columns of a file say what.

    Attributes:
        candidates: a column for each candidate, the right one first; None for the ``KNOWN_COLUMNS`` that are there.
            A single one has sentences with a label.
        prefix: of what stands before every candidate and is not scored; None scores the candidates as a whole.
        groups: the first one's groups are averaged over, the others are shown beside; none makes one group. Those of
            sentences with a label are all shown beside.
        label: of which candidate is right: its number, from 0, or the name of its column; None for the first. Of a
            single sentence, whether it is acceptable: 1 or 0.
    """

    candidates: tuple[str, ...] | None = None
    prefix: str | None = None
    groups: tuple[str, ...] = ()
    label: str | None = None

    def parse(self, row: Row) -> Parsed:
        """A row's meaning."""
        if self.candidates and len(self.candidates) == 1:
            return self._parse_sentence(row, self.candidates[0])
        names = self.candidates or self._known(row)
        texts = [row.text(name) for name in names]
        right = self._find_right(row, names)
        # Official files, and all that is computed from scores, have the right candidate first.
        texts = [texts[right], *texts[:right], *texts[right + 1 :]]
        prefix = "" if self.prefix is None else row.text(self.prefix)
        candidates = [_behind(prefix, text) for text in texts]
        uid = row.label(self.groups[0]) if self.groups else row.file.stem
        return Parsed(uid, candidates, texts, fields={name: row.label(name) for name in self.groups[1:]})

    def _parse_sentence(self, row: Row, name: str) -> Parsed:
        """A sentence with a label."""
        assert self.label is not None
        label = row.label(self.label)
        if label not in ("0", "1"):
            raise ValueError(
                f"{row.source}: {self.label!r} is {label!r}; expected 1 (acceptable) or 0, as --pair_columns names a "
                "single column"
            )
        candidate = _behind("" if self.prefix is None else row.text(self.prefix), row.text(name))
        fields = {column: row.label(column) for column in self.groups}
        return Parsed(row.file.stem, [candidate], fields=fields, acceptable=label == "1")

    def _known(self, row: Row) -> tuple[str, ...]:
        for names in KNOWN_COLUMNS:
            if all(name in row.values for name in names):
                return names
        raise ValueError(
            f"{row.source}: has the columns {', '.join(map(repr, row.values))}; say with --pair_columns which hold the "
            "sentences, the right one first"
        )

    def _find_right(self, row: Row, names: Sequence[str]) -> int:
        if self.label is None:
            return 0
        label = row.label(self.label)
        # A column may be called "0": its name goes before its number.
        if label in names:
            return names.index(label)
        if label.isdecimal() and int(label) < len(names):
            return int(label)
        raise ValueError(
            f"{row.source}: {self.label!r} is {label!r}; expected a number below {len(names)}, or one of "
            f"{', '.join(names)}"
        )


def _behind(prefix: str, text: str) -> Candidate:
    """A text behind a prefix, with a space between them where neither has one."""
    if not prefix:
        return Candidate(text)
    space = "" if prefix[-1].isspace() or text[0].isspace() else " "
    return Candidate(f"{prefix}{space}{text}", len(prefix))


def build_pair_tasks(paths: Sequence[str], columns: PairColumns) -> list[TaskData]:
    """A task for each file, named as the file without its ending.

    Args:
        paths: of files of JSON lines (.jsonl), or with a line of names at their head: .tsv, .csv.

    Raises:
        ValueError: a file is not there, or two would have one name.
    """
    found: list[TaskData] = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"--pairs {path}: there is no such file")
        if path.suffix not in (".jsonl", ".tsv", ".csv"):
            raise ValueError(f"--pairs {path}: expected a file that ends in .jsonl, .tsv or .csv")
        # Results lie in folders of these names.
        if path.stem in TASKS or path.stem in [data.name for data in found]:
            raise ValueError(f"--pairs {path}: another task is called {path.stem!r}; rename the file")
        task = Task(path.stem, (), frozenset(), columns.parse, OFFICIAL)
        found.append(TaskData(task, path.stem, (SourceFile(path),)))
    return found
