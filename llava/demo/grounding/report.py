"""What the demo of grounding prints at its end."""

from __future__ import annotations

from collections.abc import Sequence

from llava.demo.grounding.evaluation import Case, Place, summarise
from llava.demo.grounding.questions import names_held_out_pair


def case_lines(cases: Sequence[Case]) -> str:
    """One line a case: the question, where or when it is, what the model says, and their IoU."""
    width = max(len(case.question) for case in cases)
    return "\n".join(
        f"{case.question:<{width}} is {_numbers(case.reference)}, "
        f"said {'nothing' if case.found is None else _numbers(case.found)}, IoU {case.scores['mIoU']:.2f}"
        for case in cases
    )


def score_lines(mode: str, pictures: Sequence[Case], clips: Sequence[Case]) -> str:
    """The figures of a model with a kind of coordinates."""
    lines = [
        f"--grounding {mode}, on {len(pictures)} held-out pictures and {len(clips)} held-out clips:",
        f"  where in the picture   {_scores(pictures)}",
        f"  when in the clip       {_scores(clips)}",
    ]
    new = [case for case in pictures if names_held_out_pair(case.question)]
    if new:
        lines.insert(2, f"    in a colour in which it never was in training   {_scores(new)}")
    return "\n".join(lines)


def _scores(cases: Sequence[Case]) -> str:
    summary = summarise(cases)
    score = summary["mIoU"]
    half = next(value["value"] for name, value in summary.items() if name in ("IoU>=0.5", "R@1 IoU>0.5"))
    return (
        f"mIoU {score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f}; the best fixed answer "
        f"{summary['best fixed answer, mIoU']['value']:.3f}), {half:.1%} at IoU 0.5 or more, "
        f"{summary['unparsable']['value']:.1%} unparsable"
    )


def _numbers(place: Place) -> str:
    return "(" + " ".join(f"{number:.2f}" for number in place) + ")"
