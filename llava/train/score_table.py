"""The scores of a run in its folder: tables in CSV and a chart, which are whole after a kill and a resume."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from llava.chart import Line, Point, draw_chart
from llava.draw import bare_letters, stack
from llava.eval.babylm.results import ACCURACY, GroupResult, TaskResult
from llava.eval.blind import BlindCheck
from llava.io import write_beside, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SCORES, SCORE_GROUPS, SCORE_CHART = "scores.csv", "scores_by_group.csv", "scores.png"
BLIND_CHECKS = "scores_blind_check.csv"
"""Only of a run that is scored on tasks with pictures."""
SCORE_FILES = (SCORES, SCORE_GROUPS, BLIND_CHECKS, SCORE_CHART)
"""What scoring leaves in a run's folder."""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The score of a task at a step.

    Attributes:
        step: of training, whose weights were scored.
        words: that were trained on until then; None where they are not counted.
        task: its name.
        score: the task's official score; None where there is none, see ``TaskResult``.
        adjusted: the same with ties as chance makes them.
        ties: items whose best candidates are equally probable.
        items: that were scored.
        low, high: ends of the interval of ``score`` at 95 %, by bootstrap over items.
        chance: the score of guessing.
        metric: what ``score`` is.
    """

    step: int
    words: int | None
    task: str
    score: float | None
    adjusted: float | None
    ties: int
    items: int
    low: float | None
    high: float | None
    chance: float
    metric: str


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The score of some items of a task at a step, those of one paradigm or one field: ``name`` of a ``kind``."""

    step: int
    words: int | None
    task: str
    kind: str
    name: str
    score: float
    adjusted: float
    ties: int
    items: int


@dataclass(frozen=True, slots=True)
class BlindRow:
    """The blind check of a task at a step, see ``BlindCheck``; ``is_blind`` is 1 or 0."""

    step: int
    words: int | None
    task: str
    score: float
    other_score: float
    drop: float
    low: float
    high: float
    is_blind: int


Row = TypeVar("Row", ScoreRow, GroupRow, BlindRow)


@dataclass
class ScoreTable:
    """The tables of a run, read and written by its first rank alone.

    Attributes:
        folder: of the run.
        rows, groups, checks: in the order in which they were scored.
    """

    folder: Path
    rows: list[ScoreRow] = field(default_factory=list)
    groups: list[GroupRow] = field(default_factory=list)
    checks: list[BlindRow] = field(default_factory=list)

    def check(self) -> None:
        """A ValueError where a file of the tables' names is none that a run has written."""
        self.read_all()

    def begin(self, step: int) -> None:
        """Take up the tables of a run that goes on behind a step: what was scored later will be scored again.

        At step 0 nothing is kept.
        """
        rows, groups, checks = self.read_all()
        self.rows = [row for row in rows if row.step <= step and step]
        # These are written first: without the row of their task, the process ended between the two.
        known = {(row.step, row.task) for row in self.rows}
        self.groups = [group for group in groups if (group.step, group.task) in known]
        self.checks = [check for check in checks if (check.step, check.task) in known]
        if [len(rows), len(groups), len(checks)] != [len(self.rows), len(self.groups), len(self.checks)]:
            self._write()
        if not self.rows:
            for name in SCORE_FILES:
                (self.folder / name).unlink(missing_ok=True)

    def tasks_at(self, step: int) -> set[str]:
        """The tasks that were scored at a step."""
        return {row.task for row in self.rows if row.step == step}

    def add(self, step: int, words: int | None, result: TaskResult, blind: BlindCheck | None = None) -> ScoreRow:
        """Add a task's score and its blind check, and write the tables and the chart, each whole or not at all."""
        row = ScoreRow(
            step, words, result.task, result.official, result.adjusted, result.ties, result.num_items, result.low,
            result.high, result.chance, result.metric,
        )  # fmt: skip
        before = next((old for old in reversed(self.rows) if old.task == row.task), None)
        if before is not None and before.items != row.items:
            logger.warning(
                "%s: %s has %d items at step %d, and %d at step %d: the data or --score_fast changed, and the two "
                "scores are not of the same items", SCORES, row.task, before.items, before.step, row.items, row.step
            )  # fmt: skip
        before_all = self.rows, self.groups, self.checks
        # New lists: where the disk is full the old ones are put back.
        self.rows = [*self.rows, row]
        self.groups = [*self.groups, *(_group_row(step, words, result.task, group) for group in result.rows)]
        if blind is not None:
            told = blind.score, blind.other_score, blind.drop, blind.low, blind.high, int(blind.is_blind)
            self.checks = [*self.checks, BlindRow(step, words, result.task, *told)]
        try:
            self._write()
        except OSError:
            self.rows, self.groups, self.checks = before_all
            raise
        return row

    def read_all(self) -> tuple[list[ScoreRow], list[GroupRow], list[BlindRow]]:
        groups, checks = _read(self.folder / SCORE_GROUPS, GroupRow), _read(self.folder / BLIND_CHECKS, BlindRow)
        return _read(self.folder / SCORES, ScoreRow), groups, checks

    def _write(self) -> None:
        _write_csv(self.folder / SCORE_GROUPS, GroupRow, self.groups)
        if self.checks or (self.folder / BLIND_CHECKS).exists():
            _write_csv(self.folder / BLIND_CHECKS, BlindRow, self.checks)
        _write_csv(self.folder / SCORES, ScoreRow, self.rows)
        if drawn := [row for row in self.rows if row.score is not None]:
            chart = draw_scores(drawn, self.folder.name)
            with write_beside(self.folder / SCORE_CHART) as beside:
                chart.save(beside, format="PNG")


def draw_scores(rows: Sequence[ScoreRow], name: str) -> Image:
    """The chart: a panel for each metric, against words on a logarithmic axis or, uncounted, against steps."""
    # A logarithmic axis has no 0, and one of words no points without them.
    counted = all(row.words for row in rows)
    panels: list[Image] = []
    for metric in dict.fromkeys(row.metric for row in rows):
        mine = [row for row in rows if row.metric == metric]
        lines = [
            Line(task, [_point(row, counted) for row in sorted(mine, key=lambda row: row.step) if row.task == task])
            for task in dict.fromkeys(row.task for row in mine)
        ]
        chances: dict[float, list[str]] = {}
        for row in mine:
            if row.task not in chances.setdefault(row.chance, []):
                chances[row.chance].append(row.task)
        # One for all is named by its height alone.
        levels = [
            (chance, f"chance, {chance:g}" + (f": {', '.join(tasks)}" if len(tasks) < len(lines) else ""))
            for chance, tasks in chances.items()
        ]
        title = f"Scores of {bare_letters(name)}" if not panels else ""
        x_label = "words trained on (logarithmic)" if counted else "steps (logarithmic)"
        limits = (0.0 if metric == ACCURACY else -100.0, 100.0)
        panels.append(draw_chart(lines, title, x_label, metric, log_x=True, levels=levels, y_limits=limits))
    return stack(panels, gap=0)


def _point(row: ScoreRow, counted: bool) -> Point:
    assert row.score is not None
    return Point(float(row.words or 1) if counted else row.step, row.score, row.low, row.high)


def _group_row(step: int, words: int | None, task: str, group: GroupResult) -> GroupRow:
    numbers = group.score, group.adjusted, group.ties, group.num_items
    return GroupRow(step, words, task, group.kind, group.name, *numbers)


def _write_csv(path: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in fields(kind)])
    writer.writerows(["" if value is None else value for value in astuple(row)] for row in rows)
    write_text(path, text.getvalue())


def read_scores(folder: Path) -> list[ScoreRow]:
    """The scores in a run's folder, in the order in which they were scored; errors as of ``ScoreTable.check``."""
    return _read(folder / SCORES, ScoreRow)


def _read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a table that a run has written; none where there is no file.

    Raises:
        ValueError: it is another file of that name, or a row of it was changed.
    """
    if not path.exists():
        return []
    columns = get_type_hints(kind)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *lines = csv.reader(file)
            if head != list(columns):
                raise ValueError(f"its columns are {', '.join(head)}")
            kinds = list(columns.values())
            return [kind(*(_parse(*pair) for pair in zip(line, kinds, strict=True))) for line in lines]
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is none that a run's scores were written to, or was changed ({error}); move it away, or give "
            "another --output_dir"
        ) from error


def _parse(cell: str, kind: object) -> Any:
    if kind is str:
        return cell
    if not cell and kind in (int | None, float | None):
        return None
    return int(cell) if kind in (int, int | None) else float(cell)
