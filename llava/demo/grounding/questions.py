"""Italian questions about a place in a picture and a time in a clip."""

from __future__ import annotations

from llava.demo.captions import COLOURS, SHAPES
from llava.demo.scenes import HELD_OUT_PAIRS, Pair


def ask_where(pair: Pair, medium: str) -> str:
    """The question for a place: "dov'è la stella gialla? <image>".

    The medium comes behind it: what reads a picture from left to right has to know what it looks for.
    """
    return f"dov'è {_name(pair)}? {medium}"


def ask_when(pair: Pair, medium: str) -> str:
    """The question for a span of time: "quando si ferma la stella gialla? <video>"."""
    return f"quando si ferma {_name(pair)}? {medium}"


def ask_where_frame_by_frame() -> str:
    """The question for a shape's way through a clip that has been asked about."""
    return "e dov'è in ogni fotogramma?"


def names_held_out_pair(question: str) -> bool:
    """Whether a question is for a shape in a colour that training does not show."""
    return any(_name(pair) in question for pair in HELD_OUT_PAIRS)


def _name(pair: Pair) -> str:
    noun = SHAPES[pair[0]]
    return f"{noun.definite_article}{noun.word} {COLOURS[pair[1]].agree(noun)}"
