"""The files that the official pipeline writes, under its names and in its form, and what its collation counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava.eval.babylm.results import ACCURACY, TaskResult, best_candidates, first_shares
from llava.eval.babylm.tasks import TASKS, Item, Task, TaskData, read_sizes
from llava.io import write_text

PREDICTIONS = "predictions.json"
REPORT = "best_temperature_report.txt"
_FOLDERS = {
    "blimp": ("blimp_filtered", "blimp_fast"),
    "supplement": ("supplement_filtered", "supplement_fast"),
    "ewok": ("ewok_filtered", "ewok_fast"),
    "entity_tracking": ("entity_tracking", "entity_tracking_fast"),
    "comps": ("comps", None),
    "wug_adj": ("wug_adj_nominalization", "wug_adj_nominalization"),
    "wug_past": ("wug_past_tense", "wug_past_tense"),
    "winoground": ("winoground_filtered", None),
    "vqa": ("vqa_filtered", None),
}
"""The folders of full and of fast results that the collation looks for."""


def result_folder(out: Path, model: str, revision: str | None, data: TaskData, fast: bool) -> Path:
    """Where the results of a task lie.

    Args:
        out: of all results.
        model: its path or name, of which the stem is taken, as the official pipeline takes it.
        revision: of the model; None is ``main``.
        data: the task.
        fast: whether a part of the items was drawn here; the name of the folder says so. It is not that of the official
            fast data: the collation would hold the predictions against other sentences.
    """
    stem = Path(data.folder).stem
    is_whole = data.is_fast or data.task.shipped or data.name.startswith("wug_")  # Fast data of wugs are all of them.
    if fast and not is_whole:
        stem += "_drawn"
    return model_folder(out, model, revision) / "zero_shot" / "causal" / data.task.official / stem


def model_folder(out: Path, model: str, revision: str | None) -> Path:
    """The folder of all results of a model."""
    # Of "." and "..", which have no stem, the folder that is meant.
    stem = Path(model).stem if Path(model).name.strip(".") else Path(model).resolve().stem
    return out / stem / (revision or "main")


def write_official(folder: Path, items: Sequence[Item], scores: Sequence[Sequence[float]], result: TaskResult) -> None:
    """Write ``predictions.json`` and ``best_temperature_report.txt`` of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PREDICTIONS, json.dumps(list_predictions(items, scores)))
    write_text(folder / REPORT, describe_scores(result))


def list_predictions(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """For each group the chosen candidate of each item; where people's shares are known, the model's too."""
    shares = first_shares(scores).tolist() if items[0].ratio is not None else [None] * len(items)
    groups: dict[str, dict[str, Any]] = {}
    for item, told, share in zip(items, scores, shares, strict=True):
        prediction = {"id": item.id, "pred": item.predictions[best_candidates(told)[0]]}
        groups.setdefault(item.uid, {"predictions": []})["predictions"].append(
            prediction if share is None else prediction | {"prob": share}
        )
    return groups


def describe_scores(result: TaskResult) -> str:
    """The scores of a task as the official report has them, at temperature 1."""
    metric = "ACCURACY" if result.metric == ACCURACY else "SPEARMAN'S RHO"
    # The official report has a correlation as it is, ours times 100 as the leaderboard.
    scale = 1.0 if result.metric == ACCURACY else 0.01
    lines = ["TEMPERATURE: 1.00", ""]
    for kind in dict.fromkeys(row.kind for row in result.rows if row.kind != "split"):
        lines.append(f"### {kind.upper()} {metric}")
        # The means over the operations of entity tracking stand among its groups.
        shown = (kind, "split") if kind == "UID" else (kind,)
        lines += [f"{row.name}: {scale * row.score:.2f}" for row in result.rows if row.kind in shown]
        lines.append("")
    if result.metric != ACCURACY:  # A correlation has one group, which is called so there.
        lines[2:] = [f"### UID {metric}", f"avg: {_scaled(result.official, scale)}", ""]
    return "\n".join([*lines, f"### AVERAGE {metric}", _scaled(result.official, scale), "", ""])


def _scaled(score: float | None, scale: float) -> str:
    return "nan" if score is None else f"{scale * score:.2f}"


def check_results(folder: Path, fast: bool, tasks: Sequence[str] | None = None) -> list[str]:
    """What the collation would not take of the results of a model, a line each.

    Args:
        folder: of the model and its revision, such as ``results/my_model/main``.
        fast: whether fast results are checked.
        tasks: names; None for all that need no pictures.

    Raises:
        ValueError: there are no results in the folder, or the collation has no counts of a task.
    """
    root = folder / "zero_shot" / "causal"
    if not root.is_dir():
        raise ValueError(f"--check {folder}: has no zero_shot/causal; give a model's folder, such as results/NAME/main")
    sizes = read_sizes()["fast" if fast else "full"]
    if uncounted := [name for name in tasks or () if name not in sizes]:
        raise ValueError(f"--check counts the items of {', '.join(sizes)}, and not of {', '.join(uncounted)}")
    wanted = tasks or [name for name in sizes if not TASKS[name].needs_images]
    return [line for name in wanted for line in _check_task(root, TASKS[name], sizes[name], fast)]


def _check_task(root: Path, task: Task, sizes: dict[str, int], fast: bool) -> Iterator[str]:
    path = root / task.official / str(_FOLDERS[task.name][1 if fast else 0]) / PREDICTIONS
    if not path.is_file():
        line = f"{task.name}: {path}, where the collation looks, is missing"
        others = [other.parent.name for other in sorted((root / task.official).glob(f"{task.name}*/{PREDICTIONS}"))]
        yield f"{line}; there is {', '.join(others)}, which it does not take for that" if others else line
        return
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        # The collation has the names of all groups in lower case; those of the data have capitals (complex_NP_island).
        counts = {uid.lower(): len(group["predictions"]) for uid, group in groups.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield f"{task.name}: {path} is no file of predictions: {error}"
        return
    for uid, size in sizes.items():
        if uid not in counts:
            yield f"{task.name}: {uid} is missing, of {size} items"
        elif counts[uid] != size:
            yield f"{task.name}: {uid} has {counts[uid]} items; the collation expects {size}"
    for uid in sorted(counts.keys() - sizes):
        yield f"{task.name}: {uid} is not known to the collation"
