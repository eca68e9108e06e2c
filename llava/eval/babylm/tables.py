"""Tables of scores: Markdown for people, CSV for spreadsheets, JSON with everything."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval import list_versions
from llava.eval.babylm.results import GroupResult, TaskResult
from llava.eval.blind import BlindCheck
from llava.io import write_json, write_text

COLUMNS = ("model", "revision", "task", "kind", "group", "score", "low", "high", "adjusted", "ties", "items", "metric")


@dataclass
class ModelResults:
    """What was found of a model.

    Attributes:
        model: its path or name.
        revision: ``main`` or another.
        results: of each task.
        blind: of tasks with pictures, where other pictures could be shown.
        settings: with which it was scored.
    """

    model: str
    revision: str
    results: dict[str, TaskResult] = field(default_factory=dict)
    blind: dict[str, BlindCheck] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What ``scores.json`` holds."""
        return {
            "model": self.model,
            "revision": self.revision,
            "tasks": {name: result.to_json() for name, result in self.results.items()},
            "blind_check": {name: check.to_json() for name, check in self.blind.items()},
            "settings": dict(self.settings),
            "versions": list_versions(),
        }

    def keep_others(self, path: Path) -> None:
        """Take up the tasks of an earlier ``scores.json`` of the same model and settings that are not scored now."""
        if not path.is_file():
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if any(before[name] != getattr(self, name) for name in ("model", "revision", "settings")):
                return
            results = {name: TaskResult.from_json(values) for name, values in before["tasks"].items()}
            blind = {name: BlindCheck(**values) for name, values in before["blind_check"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no table of scores ({error!r}); remove it, or give another --out") from error
        # Earlier tasks first, as they stood; what is scored now replaces its own.
        others = [name for name in results if name not in self.results]
        self.results = {name: results[name] for name in others} | self.results
        self.blind = {name: blind[name] for name in others if name in blind} | self.blind


def write_tables(folder: Path, models: Sequence[ModelResults]) -> str:
    """Write ``scores.md``, ``scores.csv`` and ``scores.json`` of some models; returns the first's text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = describe_markdown(models)
    write_text(folder / "scores.md", text)
    write_text(folder / "scores.csv", describe_csv(models))
    write_json(
        folder / "scores.json", [model.to_json() for model in models] if len(models) > 1 else models[0].to_json()
    )
    return text


def describe_csv(models: Sequence[ModelResults]) -> str:
    """A line for each task, and for each group within it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for model in models:
        for name, result in model.results.items():
            head, metric = (model.model, model.revision, name), result.metric
            writer.writerow(
                [
                    *head, "all", "all", *map(_number, (result.official, result.low, result.high, result.adjusted)),
                    result.ties, result.num_items, metric,
                ]
            )  # fmt: skip
            for row in result.rows:
                writer.writerow(
                    [
                        *head, row.kind, row.name, *map(_number, (row.score, row.low, row.high, row.adjusted)),
                        row.ties, row.num_items, row.metric or metric,
                    ]
                )  # fmt: skip
    return file.getvalue()


def describe_markdown(models: Sequence[ModelResults]) -> str:
    """Tasks with the models side by side, then ties, groups and the blind check."""
    names = list(dict.fromkeys(name for model in models for name in model.results))
    heads = _heads(models)
    lines = [
        "# Scores",
        "",
        *_table(["task", *heads], ([name, *(describe_score(m, name) for m in models)] for name in names)),
    ]
    lines += [
        "", "Official score, with its 95 % interval (items drawn anew within their groups). Accuracies are means over "
        "groups, in %; of wug_adj and wug_past it is Spearman's rho, of sentences with a label the area under the ROC "
        "curve, times 100.", "",
    ]  # fmt: skip
    rows = (
        [head, name, str(result.num_items), str(result.ties), f"{result.official:.2f}", f"{result.adjusted:.2f}",
         f"{result.chance:.1f}"]
        for head, model in zip(heads, models, strict=True)
        for name, result in model.results.items()
        if result.official is not None and result.adjusted is not None
    )  # fmt: skip
    lines += ["## Ties", "", *_table(["model", "task", "items", "ties", "official", "tie-adjusted", "chance"], rows)]
    lines += [
        "",
        "The official score gives a tie to the first candidate, the right one; adjusted for ties it counts 1/k.",
    ]
    if blind := [
        f"- {head}, {check.describe(name)}"
        for head, m in zip(heads, models, strict=True)
        for name, check in m.blind.items()
    ]:
        lines += ["", "## Blind check", "", *blind]
    for name in names:
        lines += _describe_groups(name, heads, [model.results.get(name) for model in models])
    return "\n".join([*lines, ""])


def _describe_groups(name: str, heads: Sequence[str], results: Sequence[TaskResult | None]) -> list[str]:
    keys = dict.fromkeys((row.kind, row.name) for result in results if result is not None for row in result.rows)
    if len(keys) < 2:
        return []
    scores = [{} if r is None else {(row.kind, row.name): _with_interval(row) for row in r.rows} for r in results]
    rows = ([kind, group, *(told.get((kind, group), "") for told in scores)] for kind, group in keys)
    return ["", f"## {name}", "", *_table(["kind", "group", *heads], rows)]


def _heads(models: Sequence[ModelResults]) -> list[str]:
    """Short names of the models, which are told apart by their paths where they must."""
    heads = [Path(model.model).name + ("" if model.revision == "main" else f" {model.revision}") for model in models]
    return heads if len(set(heads)) == len(heads) else [f"{model.model} {model.revision}" for model in models]


def describe_score(model: ModelResults, name: str) -> str:
    """The official score of a task with its interval; empty where the model has none."""
    result = model.results.get(name)
    if result is None:
        return ""
    if result.official is None:
        return "none: the model's shares are all the same"
    return f"{result.official:.2f} [{_shown(result.low)}, {_shown(result.high)}]"


def _with_interval(row: GroupResult) -> str:
    return _shown(row.score) + ("" if row.low is None else f" [{_shown(row.low)}, {_shown(row.high)}]")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
