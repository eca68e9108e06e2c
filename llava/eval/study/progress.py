"""How far the cells of a study are, and what became of those that are not done: failed, stopped or not begun."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from llava.eval.study.cells import ATTEMPTS, LOG, STOPPED, list_signals, state
from llava.eval.study.plan import Cell, Study
from llava.eval.study.prepare import last_words
from llava.eval.study.scoring import FINAL, list_scored
from llava.io import read_json_lines


def format_list(study: Study, cells: Sequence[Cell]) -> str:
    """A line for each cell: number, variant, seed, how far it is."""
    width = max(len(cell.variant) for cell in cells) if cells else 0
    lines = []
    for cell in cells:
        lines.append(f"{cell.number:>3}  {cell.variant:<{width}}  seed {cell.seed}  {how_far(study, cell)}")
    return "\n".join(lines)


def how_far(study: Study, cell: Cell) -> str:
    """How far a cell has come: new, begun, trained, scored."""
    told = state(study, cell)
    if told == "trained" and study.score is not None:
        return "scored" if FINAL in list_scored(study, cell) else "trained, not scored"
    return told


def is_done(study: Study, cell: Cell) -> bool:
    """Whether nothing is left to do of a cell."""
    return how_far(study, cell) == ("trained" if study.score is None else "scored")


def has_failed(study: Study, cell: Cell, over: bool) -> bool:
    """Whether a cell's last training ended with an error, or where all are over, without an end."""
    status = _last_status(study, cell)
    return state(study, cell) == "begun" and (over if status is None else not _was_stopped(status))


def explain_unfinished(study: Study, cell: Cell, over: bool) -> str:
    """What became of a cell that is not done, in a phrase."""
    told = how_far(study, cell)
    if told != "begun":
        return "not begun" if told == "new" else told
    status = _last_status(study, cell)
    if status is None:
        began = _attempts(study, cell)
        since = f" since {datetime.fromtimestamp(began[-1]['at']):%Y-%m-%d %H:%M}" if began else ""
        # Of a process that is killed nothing is written.
        if over:
            return f"FAILED: killed, begun{since}: {last_words(study.folder(cell) / LOG)}"
        return f"running{since}, or killed"
    if _was_stopped(status):
        return "stopped; the same command goes on with it"
    return f"FAILED with status {status}: {last_words(study.folder(cell) / LOG)}"


def format_unfinished(study: Study, over: bool = False) -> str:
    """A table of the cells that are not done; empty where all are.

    Args:
        over: whether no training runs any more.
    """
    left = [cell for cell in study.cells if not is_done(study, cell)]
    if not left:
        return ""
    failed = sum(has_failed(study, cell, over) for cell in left)
    rows = [(str(cell.number), cell.variant, str(cell.seed), explain_unfinished(study, cell, over)) for cell in left]
    lines = [
        f"{len(study.cells) - len(left)} of {len(study.cells)} cells are done, {failed} failed:",
        "",
        "| cell | variant | seed | what became of it |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def _attempts(study: Study, cell: Cell) -> list[dict[str, float]]:
    path = study.folder(cell) / ATTEMPTS
    return read_json_lines(path) if path.is_file() else []


def _last_status(study: Study, cell: Cell) -> int | None:
    """The exit status of a cell's last training; None while it runs, and for one that was killed with its command."""
    attempts = _attempts(study, cell)
    return int(attempts[-1]["status"]) if attempts and "status" in attempts[-1] else None


def _was_stopped(status: int) -> bool:
    return status == STOPPED or -status in list_signals()
