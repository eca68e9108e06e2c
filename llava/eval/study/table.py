"""The table of a study: Markdown, CSV and JSON, of the cells that are done."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from llava.chart import Line, Point, draw_chart
from llava.draw import bare_letters, stack
from llava.eval.blind import BlindCheck
from llava.eval.study.cells import Trained, read_trained, state
from llava.eval.study.plan import Cell, Study
from llava.eval.study.scoring import FINAL, ModelScores, TaskScores, list_scored, read_scores
from llava.eval.study.statistics import Comparison, Outcomes, compare, mean_and_spread, paired_t_test
from llava.io import write_beside, write_json, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

RESULTS, MARKDOWN, TABLE, CURVE = "results.json", "table.md", "table.csv", "curve.csv"
CURVE_CHART = "curve.png"
FEW_SEEDS = 5


@dataclass(frozen=True)
class Row:
    """A line of the table: a variant on a task; scores are shares from 0 to 1, means over seeds.

    Attributes:
        words: that were trained on.
        score: as the official pipeline counts, ties as right where the right candidate comes first; None for a
            correlation that there is none of.
        spread: standard deviation over seeds.
        tie_adjusted: a tie of k counts 1/k.
        ties: share of the items.
        comparison: with the baseline; None for itself.
        hours: of all its trainings.
    """

    task: str
    variant: str
    seeds: tuple[int, ...]
    words: float | None
    score: float | None
    spread: float | None
    by_seed: tuple[float, ...]
    tie_adjusted: float | None
    ties: float
    num_items: int
    hours: float
    comparison: Comparison | None

    def to_csv(self) -> dict[str, object]:
        """All values with names of their own; the comparison's are empty for the baseline."""
        told = asdict(self)
        compared = told.pop("comparison") or {entry.name: None for entry in fields(Comparison)}
        names = {"by_seed": "difference_by_seed", "num_items": "compared_items"}
        return told | {names.get(name, name): value for name, value in compared.items()}


@dataclass(frozen=True)
class LossRow:
    """A line of the table of trainings: losses are means over seeds.

    Attributes:
        eval_loss: on ``--eval_data_path``; None without.
        difference: of the held-out loss to the baseline's, on the seeds that both have.
        p_seeds: of a paired t test of it.
    """

    variant: str
    seeds: tuple[int, ...]
    words: float | None
    steps: float | None
    loss: float | None
    eval_loss: float | None
    eval_spread: float | None
    eval_by_seed: tuple[float, ...]
    difference: float | None
    p_seeds: float | None
    hours: float


class Results(TypedDict):
    """What ``results.json`` holds."""

    study: str
    baseline: str
    rows: list[Row]
    losses: list[LossRow]
    curve: list[dict[str, object]]
    missing: list[str]
    blind: list[str]
    score: dict[str, object]
    versions: dict[str, list[str]]
    devices: list[str]
    hours: float


def build_results(study: Study) -> Results:
    """Everything that the finished cells tell.

    Raises:
        ValueError: no cell is done, or two were scored on different items.
    """
    done: dict[str, dict[int, Cell]] = {name: {} for name in study.variants}
    missing = []
    for cell in study.cells:
        if state(study, cell) == "trained" and (study.score is None or FINAL in list_scored(study, cell)):
            done[cell.variant][cell.seed] = cell
        else:
            missing.append(cell.name)
    cells = [cell for of_seeds in done.values() for cell in of_seeds.values()]
    if not cells:
        raise ValueError(f"{study.path}: no cell is done yet; nothing to make a table of")
    trained = {cell: read_trained(study, cell) for cell in cells}
    scores = {cell: read_scores(study, cell, FINAL) for cell in cells} if study.score else {}
    tasks = list(dict.fromkeys(task for told in scores.values() for task in told["tasks"]))
    versions: dict[str, set[str]] = {}
    for told in trained.values():
        for name, value in told["versions"].items():
            versions.setdefault(name, set()).add(value)
    return {
        "study": study.path.name,
        "baseline": study.baseline,
        "rows": [
            _row(study, task, variant, done, trained, scores)
            for task in tasks
            for variant in study.variants
            if done[variant]
        ],
        "losses": [_loss_row(study, variant, done, trained) for variant in study.variants if done[variant]],
        "curve": build_curve(study, cells),
        "missing": missing,
        "blind": [
            f"{cell.name}, {BlindCheck(**score['blind']).describe(task)}"
            for cell, told in scores.items()
            for task, score in told["tasks"].items()
            if "blind" in score
        ],
        "score": {} if study.score is None else {"fast": study.score.fast, "seed": study.score.seed},
        "versions": {name: sorted(values) for name, values in versions.items()},
        "devices": sorted({told["device"] for told in trained.values()}),
        "hours": round(sum(told["seconds"] for told in trained.values()) / 3600, 3),
    }


def _row(
    study: Study,
    task: str,
    variant: str,
    done: Mapping[str, Mapping[int, Cell]],
    trained: Mapping[Cell, Trained],
    scores: Mapping[Cell, ModelScores],
) -> Row:
    cells = list(done[variant].values())
    told = [scores[cell]["tasks"][task] for cell in cells]
    official = [score["official"] for score in told if score["official"] is not None]
    mean, spread = mean_and_spread(official) if official else (None, None)
    # Only seeds that both have: a pair is two runs with the same seed.
    shared = [seed for seed in done[variant] if seed in done[study.baseline]]
    compared: Comparison | None = None
    if variant != study.baseline and shared:
        own, base = ([scores[done[name][seed]]["tasks"][task] for seed in shared] for name in (variant, study.baseline))
        check_same_items(own, base, f"{study.path}: {task}: {variant} and {study.baseline}")
        # A correlation has none: its differences are not tested.
        if all(score["outcomes"] for score in (*own, *base)):
            compared = compare(list(map(_outcomes, own)), list(map(_outcomes, base)), own[0]["weights"])
    return Row(
        task=task,
        variant=variant,
        seeds=tuple(cell.seed for cell in cells),
        words=_mean([trained[cell]["words"] for cell in cells]),
        score=mean,
        spread=spread,
        by_seed=tuple(official),
        tie_adjusted=_mean([score["adjusted"] for score in told]),
        ties=float(np.mean([score["ties"] for score in told])),
        num_items=told[0]["num_items"],
        hours=sum(trained[cell]["seconds"] for cell in cells) / 3600,
        comparison=compared,
    )


def _loss_row(
    study: Study, variant: str, done: Mapping[str, Mapping[int, Cell]], trained: Mapping[Cell, Trained]
) -> LossRow:
    losses = {
        name: {seed: loss for seed, cell in done[name].items() if (loss := trained[cell]["eval_loss"]) is not None}
        for name in (variant, study.baseline)
    }
    own, base = losses[variant], losses[study.baseline]
    mean, spread = mean_and_spread(list(own.values())) if own else (None, None)
    differences = [own[seed] - base[seed] for seed in own if seed in base and variant != study.baseline]
    told = [trained[cell] for cell in done[variant].values()]
    return LossRow(
        variant=variant,
        seeds=tuple(done[variant]),
        words=_mean([entry["words"] for entry in told]),
        steps=_mean([entry["steps"] for entry in told]),
        loss=_mean([entry["loss"] for entry in told]),
        eval_loss=mean,
        eval_spread=spread,
        eval_by_seed=tuple(own.values()),
        difference=float(np.mean(differences)) if differences else None,
        p_seeds=paired_t_test(differences),
        hours=sum(entry["seconds"] for entry in told) / 3600,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _outcomes(score: TaskScores) -> Outcomes:
    return {group: np.asarray(values, dtype=np.float64) for group, values in score["outcomes"].items()}


def check_same_items(own: Sequence[TaskScores], base: Sequence[TaskScores], where: str) -> None:
    """A ValueError where not all scores are of the same items."""
    if len({score["items_hash"] for score in (*own, *base)}) > 1:
        raise ValueError(f"{where} were scored on different items; remove their folders 'scores' and run again")


def build_curve(study: Study, cells: Sequence[Cell]) -> list[dict[str, object]]:
    """A line for each task, variant and milestone: words, items, mean and spread over the seeds that have it."""
    found: dict[tuple[str, str, str], list[tuple[int | None, float, int]]] = {}
    for cell in cells if study.score else ():
        for name in list_scored(study, cell):
            told = read_scores(study, cell, name)
            for task, score in told["tasks"].items():
                if score["official"] is not None:
                    found.setdefault((task, cell.variant, name), []).append(
                        (told["words"], score["official"], score["num_items"])
                    )
    lines: list[dict[str, object]] = []
    for (task, variant, name), values in found.items():
        mean, spread = mean_and_spread([score for _, score, _ in values])
        lines.append(
            {
                "task": task,
                "variant": variant,
                "checkpoint": name,
                "words": _mean([number for number, _, _ in values]),
                # Milestones may be scored on a part of what the last model is.
                "items": max(items for _, _, items in values),
                "score": mean,
                "spread": spread,
                "seeds": len(values),
            }
        )
    order = list(study.variants)
    return sorted(lines, key=lambda line: (str(line["task"]), order.index(str(line["variant"])), _place(line["words"])))


def draw_curve(curve: Sequence[Mapping[str, Any]], name: str) -> Image | None:
    """A chart for each task: means over seeds, with one spread up and down, against words; None without two points."""
    panels: list[Image] = []
    for task in dict.fromkeys(row["task"] for row in curve):
        points: dict[str, list[Point]] = {}
        own = [row for row in curve if row["task"] == task and row["words"]]
        for row in own:
            mean, spread = 100 * row["score"], 100 * (row["spread"] or 0)
            points.setdefault(row["variant"], []).append(Point(row["words"], mean, mean - spread, mean + spread))
        if all(len(line) < 2 for line in points.values()):  # A line needs milestones.
            continue
        lines = [Line(variant, line) for variant, line in points.items()]
        title = bare_letters(name) if not panels else ""
        # The step up to the last point may be that to other items.
        few, most = min(row["items"] for row in own), max(row["items"] for row in own)
        of = f"{task}, percent" + (f" of {few:,} items; in the end {most:,}" if few < most else "")
        panels.append(draw_chart(lines, title, "words trained on (logarithmic)", of, log_x=True))
    return stack(panels, gap=0) if panels else None


def _place(words: object) -> float:
    return words if isinstance(words, float) else float("inf")


# Writing.


def write_tables(study: Study) -> str:
    """Write all tables into the study's folder; returns the one in Markdown."""
    results = build_results(study)
    write_json(
        study.output_dir / RESULTS,
        {**results, "rows": list(map(asdict, results["rows"])), "losses": list(map(asdict, results["losses"]))},
    )
    write_text(study.output_dir / TABLE, format_csv([row.to_csv() for row in results["rows"]]))
    if results["curve"]:
        write_text(study.output_dir / CURVE, format_csv(results["curve"]))
        if (chart := draw_curve(results["curve"], study.output_dir.name)) is not None:
            with write_beside(study.output_dir / CURVE_CHART) as beside:
                chart.save(beside, format="PNG")
    text = format_markdown(results)
    write_text(study.output_dir / MARKDOWN, text)
    return text


def format_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV; several values in one place are joined by blanks."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in row.items()}
        )
    return text.getvalue()


def format_markdown(results: Results) -> str:
    """The table as people read it: percent, and points of a percent for differences."""
    lines = []
    for task in dict.fromkeys(row.task for row in results["rows"]):
        rows = [row for row in results["rows"] if row.task == task]
        lines += [
            f"**{task}** ({rows[0].num_items:,} items)",
            "",
            f"| variant | seeds | words | score, mean ± sd | ties | minus {results['baseline']} [95 %] | p | "
            "p over seeds | higher in | hours |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_line(row) for row in rows),
            "",
        ]
    lines += format_losses(results)
    lines += _notes(results)
    return "\n".join(lines) + "\n"


def format_losses(results: Results) -> list[str]:
    """The table of trainings, for each variant once."""
    lines = [
        f"| variant | seeds | words | steps | loss | held-out loss, mean ± sd | minus {results['baseline']} | "
        "p over seeds | hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["losses"]:
        held_out = "" if row.eval_loss is None else f"{row.eval_loss:.4f}"
        held_out += "" if row.eval_spread is None else f" ± {row.eval_spread:.4f}"
        cells = (
            row.variant, len(row.seeds), _number(row.words, ",.0f"), _number(row.steps, ",.0f"),
            _number(row.loss, ".4f"), held_out, _number(row.difference, "+.4f"), _number(row.p_seeds, ".3f"),
            f"{row.hours:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _line(row: Row) -> str:
    score = "" if row.score is None else f"{100 * row.score:.2f}"
    score += "" if row.spread is None else f" ± {100 * row.spread:.2f}"
    difference, p_value, p_seeds, higher = "", "", "", ""
    if (found := row.comparison) is not None:
        difference = f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        p_value, p_seeds = f"{found.p_value:.3f}", _number(found.p_seeds, ".3f")
        higher = f"{sum(value > 0 for value in found.by_seed)} of {len(found.by_seed)}"
    cells = (
        row.variant, len(row.seeds), _number(row.words, ",.0f"), score, f"{100 * row.ties:.1f} %", difference, p_value,
        p_seeds, higher, f"{row.hours:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _notes(results: Results) -> list[str]:
    notes = []
    if compared := [row.comparison for row in results["rows"] if row.comparison is not None]:
        # With so few seeds a bootstrap draws the same ones again and again.
        fewest = min(len(found.by_seed) for found in compared)
        few = "" if fewest >= FEW_SEEDS else f", and may be too narrow with {fewest} seed{'s' * (fewest > 1)}"
        notes.append(
            "Differences are in points, of tie-adjusted scores on the same seeds and items. Intervals and p are of a "
            f"bootstrap over seeds and items{few}; p over seeds is a paired t test. No p is corrected for the number "
            "of comparisons."
        )
    if results["score"].get("fast"):
        notes.append(f"Fast sizes of the tasks, chosen with seed {results['score']['seed']}.")
    versions = ", ".join(f"{name} {' and '.join(values)}" for name, values in results["versions"].items())
    notes.append(f"Trained with {versions} on {' and '.join(results['devices'])}, {results['hours']:.2f} hours in all.")
    mixed = [name for name, values in results["versions"].items() if len(values) > 1]
    if mixed or len(results["devices"]) > 1:
        notes.append(f"Cells differ in {', '.join([*mixed, *['device'] * (len(results['devices']) > 1)])}.")
    notes += [f"Blind check of {line}." for line in results["blind"]]
    if results["missing"]:
        notes.append(f"Not done yet: {'; '.join(results['missing'])}.")
    return [line for note in notes for line in (note, "")][:-1]
