"""What likelihood scoring is given and gives: candidates, of which the most probable is a model's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llava.types import Media


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text that a model may prefer, and the part of it that counts.

    Attributes:
        text: the whole of it.
        start: the character at which the completion begins, of which a token counts that ends behind it; 0: all of it.
    """

    text: str
    start: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Candidates of which the most probable wins.

    Attributes:
        id: names it in errors and in files.
        candidates: two or more.
        media: images and clips that are shown before each candidate's text.
        source: where it stands ("wh_island.jsonl, line 12"), for errors.
    """

    id: str
    candidates: tuple[Candidate, ...]
    media: tuple[Media, ...] = ()
    source: str = ""


class Scorer(Protocol):
    """What scores choices: ``LikelihoodScorer``, or something that answers as one."""

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        """The score of each candidate of each choice, in order.

        Args:
            choices: in any order; the scorer sorts them as is fastest.
            on_scored: is called with the number of choices that were scored since its last call.

        Raises:
            ValueError: a choice cannot be scored; names it by its source.
        """
        ...
