"""The scores of a study's models, with what each item counted, so that models can be compared item by item."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from llava.eval.study.cells import read_trained
from llava.eval.study.plan import Cell, ScorePlan, Study
from llava.eval.study.prepare import hash_path
from llava.io import hash_json, write_json

if TYPE_CHECKING:
    from typing_extensions import NotRequired

    from llava.eval.babylm.results import TaskResult
    from llava.eval.babylm.tasks import Item, TaskData

logger = logging.getLogger(__name__)

FINAL = "final"
"""The name of a trained model's scores; those of milestones are named as their folders."""
_MILESTONE = re.compile(r"chck_(\d+(?:\.\d+)?)([kKMG]?)")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


class TaskScores(TypedDict):
    """A model's scores on a task; shares from 0 to 1, or a correlation.

    ``outcomes`` has for each group of items what each counted: 1 right, 0 wrong, 1/k where k candidates tied; none for
    a correlation. ``weights`` are the groups' in the score. ``items_hash`` tells whether two models were scored on the
    same items. ``official`` is None for a correlation with what is the same for every item. ``blind`` is the blind
    check of a task with pictures, see ``BlindCheck``.
    """

    official: float | None
    adjusted: float | None
    ties: float
    num_items: int
    groups: dict[str, float]
    outcomes: dict[str, list[float]]
    weights: dict[str, float]
    items_hash: str
    blind: NotRequired[dict[str, Any]]


class ModelScores(TypedDict):
    """What a file of scores holds; ``settings`` are those that they were made with."""

    words: int | None
    settings: dict[str, object]
    tasks: dict[str, TaskScores]


def score_cell(study: Study, cell: Cell, show: Callable[[str], None]) -> None:
    """Score a trained cell, and its milestones if asked for; what is scored with these settings stays."""
    assert study.score is not None
    run = study.run_folder(cell)
    words = read_trained(study, cell)["words"]
    todo: list[tuple[str, Path, int | None]] = [(FINAL, run, words)]
    if study.score.milestones:
        todo = [*((path.name, path, count) for count, path in find_milestones(run)), *todo]
    for name, folder, count in todo:
        # Milestones first, and each is written when it is done: a study that is ended goes on behind it.
        if name in list_scored(study, cell):
            continue
        show(f"scoring {name}")
        plan = plan_for(study.score, name)
        tasks = score_model(study, plan, folder, _labelled(f"scoring {name}", show))
        content: ModelScores = {"words": count, "settings": settings(study, plan), "tasks": tasks}
        path = scores_file(study, cell, name)
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)


def _labelled(label: str, show: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: show(f"{label}, {text}")


def plan_for(plan: ScorePlan, name: str) -> ScorePlan:
    """How the final model or a milestone is scored."""
    return plan if name == FINAL else replace(plan, fast=plan.milestones_fast)


def settings(study: Study, plan: ScorePlan) -> dict[str, object]:
    """What scores depend on beside the model; data by a hash of their content, so that they may move."""
    files = [_hash_items(Path(study.fill(path))) for path in plan.data]
    return {"data": list(plan.data), "files": files, "tasks": list(plan.tasks), "fast": plan.fast, "seed": plan.seed}


def _hash_items(path: Path) -> str:
    """A hash of a file's content; of a folder that of its items, and of the names and sizes of its pictures."""
    if not path.is_dir():
        return hash_path(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    told = [[str(file.relative_to(path)), _hash_items(file) if file.suffix == ".jsonl" else file.stat().st_size]
            for file in files]  # fmt: skip
    return hash_json(told, 16)


def find_milestones(run: Path) -> list[tuple[int, Path]]:
    """The milestones of a run, with the words that they were trained on, fewest first."""
    found = []
    for path in run.glob("chck_*"):
        if match := _MILESTONE.fullmatch(path.name):
            # A step goes beyond what the name says, in small runs by several percent.
            counts = path / "exposure.json"
            sources = json.loads(counts.read_text(encoding="utf-8"))["sources"].values() if counts.is_file() else ()
            number = sum(source["words"] for source in sources)
            found.append((number or round(float(match[1]) * _UNITS[match[2]]), path))
    return sorted(found)


def scores_file(study: Study, cell: Cell, name: str) -> Path:
    return study.folder(cell) / "scores" / f"{name}.json"


def list_scored(study: Study, cell: Cell) -> list[str]:
    """Names of the scores that a cell has, made with the settings of the study as it is now."""
    assert study.score is not None
    names = [path.stem for path in sorted((study.folder(cell) / "scores").glob("*.json"))]
    plans = {plan: settings(study, plan) for plan in {plan_for(study.score, name) for name in names}}
    return [
        name
        for name in names
        if _is_same(read_scores(study, cell, name)["settings"], plans[plan_for(study.score, name)])
    ]


def _is_same(before: dict[str, object], now: dict[str, object]) -> bool:
    """Whether scores were made with these settings; data that are there no more, or of an old version, tell nothing."""
    known = [] if not isinstance(found := before.get("files"), list) else found
    files = now["files"] if isinstance(now["files"], list) else []
    changed = any(old != new for old, new in zip(known, files, strict=False) if new)
    return not changed and {**before, "files": None} == {**now, "files": None}


def read_scores(study: Study, cell: Cell, name: str) -> ModelScores:
    content: ModelScores = json.loads(scores_file(study, cell, name).read_text(encoding="utf-8"))
    return content


def read_tasks(study: Study, plan: ScorePlan) -> list[tuple[TaskData, list[Item]]]:
    """The tasks of a plan and their items.

    Raises:
        ValueError: a task is not known or not found, or a line of it is broken.
    """
    from llava.eval.babylm.tasks import describe_repeats, find_tasks, read_items

    try:
        found = find_tasks([study.fill(path) for path in plan.data], plan.tasks, plan.fast)
        if found.missing or not found.tasks:
            raise ValueError((found.missing or ["the data have no task"])[0])
        tasks = [(data, read_items(data, plan.fast, plan.seed)) for data in found.tasks]
    except ValueError as error:
        raise ValueError(f"{study.path}: score: {error}") from error
    for line in (line for data, items in tasks for line in describe_repeats(data.name, items)):
        logger.warning("%s", line)
    return tasks


def check_scoring(study: Study, cells: Sequence[Cell]) -> None:
    """Read what cells will be scored on: a fault in it is an error before hours of training."""
    if study.score is not None and any(FINAL not in list_scored(study, cell) for cell in cells):
        read_tasks(study, study.score)


def score_model(study: Study, plan: ScorePlan, folder: Path, show: Callable[[str], None]) -> dict[str, TaskScores]:
    """Score one model on all tasks; those with pictures with other items' pictures, too.

    Args:
        folder: of the model.
        show: gets the lines of the progress.

    Raises:
        ValueError: a task is not found, or the model cannot be scored.
    """
    from llava.eval.babylm.results import check_pictures, summarize
    from llava.eval.blind import swap_media
    from llava.eval.likelihood import LikelihoodScorer
    from llava.registry import import_plugins

    if study.plugins:
        sys.path[:0] = [str(folder) for folder in study.folders if str(folder) not in sys.path]
        import_plugins(study.plugins)
    tasks = read_tasks(study, plan)
    scorer = LikelihoodScorer.from_folder(str(folder))
    scores: dict[str, TaskScores] = {}
    for data, items in tasks:
        choices = [item.choice for item in items]
        told = scorer.score(choices, _Counter(data.name, len(items), show))
        scores[data.name] = sum_up(items, told, summarize(data, items, told))
        swapped = swap_media(choices, plan.seed) if data.task.needs_images else None
        if swapped is not None:
            other = scorer.score(swapped, _Counter(f"{data.name}, other pictures", len(items), show))
            scores[data.name]["blind"] = check_pictures(told, other, plan.seed).to_json()
    return scores


def sum_up(items: Sequence[Item], scores: Sequence[Sequence[float]], result: TaskResult) -> TaskScores:
    """The scores of a task as a study keeps them."""
    from llava.eval.babylm.results import UID, average_groups

    groups = {row.name: row.score / 100 for row in result.rows if row.kind == UID}
    # A correlation is of all items together; single ones count nothing.
    outcomes = {} if items[0].ratio is not None else group_outcomes([(item.uid, item.gold) for item in items], scores)
    uids = list(outcomes)
    # The weight of each group, from unit vectors: how groups are averaged is said in one place alone.
    shares = average_groups(result.task, dict(zip(uids, np.eye(len(uids)), strict=True))) if uids else []
    return {
        "official": None if result.official is None else result.official / 100,
        "adjusted": None if result.adjusted is None else result.adjusted / 100,
        "ties": result.ties / result.num_items,
        "num_items": result.num_items,
        "groups": groups,
        "outcomes": outcomes,
        "weights": dict(zip(uids, map(float, shares), strict=True)),
        "items_hash": hash_json([[item.id, [one.text for one in item.choice.candidates]] for item in items], 16),
    }


class _Counter:
    """Tells every tenth of the items."""

    def __init__(self, name: str, total: int, show: Callable[[str], None]) -> None:
        self.name, self.total, self.show, self.done, self.told = name, total, show, 0, 0

    def __call__(self, number: int) -> None:
        self.done += number
        if (tenth := 10 * self.done // max(self.total, 1)) > self.told:
            self.told = tenth
            self.show(f"{self.name} {self.done:,} of {self.total:,}")


def group_outcomes(items: Sequence[tuple[str, int]], scores: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """What each item counts, by group: 1 right, 0 wrong, 1/k where the right one is among k that tie.

    Args:
        items: group and index of the right candidate.
        scores: of the candidates of each.
    """
    outcomes: dict[str, list[float]] = {}
    for (group, gold), told in zip(items, scores, strict=True):
        best = [index for index, score in enumerate(told) if score == max(told)]
        outcomes.setdefault(group, []).append(1 / len(best) if gold in best else 0.0)
    return outcomes
