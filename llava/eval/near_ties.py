"""Candidates whose scores are nearer to each other than float32 can tell: scored again, until it is sure who wins.

Each of them is scored in float64; where that leaves less between them than the parts of a model that compute in float32
whatever its weights are (norms, rotations) may change, one at a time as well, as whoever checks it would. What then
differs by no more than float64's own rounding is a tie, and both get the same score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

from llava.eval.token_rows import TokenRow

Scores = dict[TokenRow, float]

START = 2.0**-20
"""What a float32 score is taken to be off by, as a share of it, before anything was compared."""

_MARGIN = 4.0
"""How many times the largest difference between float32 and float64 that was seen a score may be off by."""

_CAST = 2.0**-22
"""The same for scores in float64 of models that compute a part of them in float32."""

_ROUNDING = 2.0**-40
"""The share by which two scores differ that are a tie in float64."""

_NUM_COMPARED = 16
"""Rows that are scored in both ways, whether near or not, to see how far float32 is off with this model."""


class NearTies:
    """Settles near-ties, and learns meanwhile how far float32 is off.

    Attributes:
        share: by which share of it a score in float32 may be off.
    """

    def __init__(self) -> None:
        self.share = START
        self._has_compared = False

    def settle(
        self,
        choices: Sequence[Sequence[TokenRow]],
        scores: Scores,
        in_double: Callable[[], AbstractContextManager[bool]],
        score: Callable[[Sequence[TokenRow], bool], Iterable[float]],
    ) -> None:
        """Replace the scores of near-ties in ``scores``.

        Args:
            choices: the rows of each choice's candidates.
            scores: of all rows.
            in_double: within it, ``score`` computes in float64 where that is possible; tells whether it is.
            score: scores rows, all together or, if asked, one at a time.
        """
        wanted = self._choose_compared(choices) | find_near(choices, scores, self.share)
        if not wanted:
            return
        settled: Scores = {}
        with in_double() as possible:
            # A row that turns out to be further off widens what is near, and more rows are scored.
            while possible and (wanted := {row: None for row in wanted if row not in settled}):
                rows = list(wanted)
                # Together: what a batch changes in float64 is far below any margin.
                settled |= zip(rows, score(rows, False), strict=True)
                errors = (abs(settled[row] - scores[row]) / abs(settled[row]) for row in rows if settled[row])
                self.share = max(self.share, _MARGIN * max(errors, default=0.0))
                wanted = find_near(choices, scores, self.share)
            scores |= settled
            alone = list(find_near(choices, scores, _CAST if possible else self.share, _ROUNDING))
            scores |= zip(alone, score(alone, True), strict=True)
        # Equal as far as float64 tells: equal to the last bit, so that ties are counted as such.
        for of_choice in choices:
            best = max(scores[row] for row in of_choice)
            for row in of_choice:
                if best - scores[row] <= _ROUNDING * abs(best):
                    scores[row] = best

    def _choose_compared(self, choices: Sequence[Sequence[TokenRow]]) -> dict[TokenRow, None]:
        """Rows from all over the choices, the first time."""
        if self._has_compared or not choices:
            return {}
        self._has_compared = True
        return {choices[place][0]: None for place in range(0, len(choices), max(len(choices) // _NUM_COMPARED, 1))}


def find_near(
    choices: Sequence[Sequence[TokenRow]], scores: Scores, share: float, tie: float = -1.0
) -> dict[TokenRow, None]:
    """The rows that may be the best of their choice, where several different ones may.

    Args:
        choices: the rows of each choice's candidates.
        scores: of all rows.
        share: of it, each score may be off by.
        tie: rows whose scores differ by no more than this share are equal, and not near.
    """
    near: dict[TokenRow, None] = {}
    for rows in choices:
        best = max(rows, key=scores.__getitem__)
        others = {
            row: None
            for row in rows
            if row != best
            and tie * abs(scores[best]) < scores[best] - scores[row] <= share * (abs(scores[best]) + abs(scores[row]))
        }
        if others:
            near |= {best: None, **others}
    return near
