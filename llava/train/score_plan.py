"""What scores a model while it trains, and when: read and checked before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llava.eval.likelihood import Choice, Scorer

Scores = Sequence[tuple[float, ...]]
"""Of each choice, one a candidate."""


class TaskToScore(Protocol):
    """A task that is read: what of it is scored, and what its scores come to."""

    name: str
    choices: Sequence[Choice]

    def summarize(self, scores: Scores) -> tuple[dict[str, object], list[dict[str, object]]]:
        """The fields of a ``ScoreRow`` behind ``task``, and of ``GroupRow``s."""
        ...


@dataclass(frozen=True)
class ScorePlan:
    """What scores a model while it trains, and when.

    Attributes:
        tasks: that are scored.
        scorer: scores them, with the model that trains.
        intervals: of steps, after each of which they are.
        at_milestones: whether they are at milestones.
    """

    tasks: Sequence[TaskToScore]
    scorer: Scorer
    intervals: Sequence[int]
    at_milestones: bool

    def is_due(self, step: int, at_milestone: bool, is_last: bool) -> bool:
        return is_last or (at_milestone and self.at_milestones) or any(step % number == 0 for number in self.intervals)
