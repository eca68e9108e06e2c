"""What an evaluation has found: ``scores.json``, and a table of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llava
from llava.eval.store import Row

UNPARSABLE = "unparsable"
"""The score that every task has: the share of answers that do not hold what was asked for."""


def write_report(
    path: Path, settings: dict[str, Any], report: dict[str, dict[str, float]], rows: Sequence[Row], **bootstrap: Any
) -> dict[str, Any]:
    """Write ``scores.json`` and return what it holds.

    Args:
        path: the file.
        settings: of the evaluation, see ``PredictionStore``.
        report: for each score its value and the ends of its interval.
        rows: of all samples; those of bad ones are listed with their reasons.
        **bootstrap: how the intervals were found.
    """
    content = {
        **{name: settings[name] for name in ("task", "model", "data")},
        "num_samples": len(rows),
        UNPARSABLE: report[UNPARSABLE]["value"],
        "scores": {name: score for name, score in report.items() if name != UNPARSABLE},
        "bootstrap": bootstrap,
        "bad_samples": [{"id": row["id"], "source": row["source"], **row["bad"]} for row in rows if "bad" in row],
        "settings": settings,
        "versions": {
            "llava": llava.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }
    waiting = path.with_suffix(".json.new")
    waiting.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    waiting.replace(path)
    return content


def format_report(content: dict[str, Any]) -> str:
    """The scores as lines of a table."""
    scores = {**content["scores"]}
    width = max(map(len, [*scores, UNPARSABLE]))
    lines = [f"{content['task']}: {content['num_samples']} samples"]
    for name, score in scores.items():
        lines.append(f"  {name:<{width}}  {score['value']:.4f}  [{score['low']:.4f}, {score['high']:.4f}]")
    lines.append(f"  {UNPARSABLE:<{width}}  {content[UNPARSABLE]:.4f}")
    if content["bad_samples"]:
        lines.append(f"  bad samples: {len(content['bad_samples'])} (unparsable, counted 0; listed in scores.json)")
    return "\n".join(lines)
