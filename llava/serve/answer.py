"""What a model answered: its text, and the boxes and spans of time that the text tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava.coordinates import (
    Box,
    GroundingConfig,
    TimeSpan,
    count_bins,
    parse_boxes,
    parse_spans,
    write_numbers,
)
from llava.framing import Framing


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Attributes:
        text: as it was generated, bins included, without the prompt; if the prompt ended inside a box or a
            span, from where that begins.
        boxes: in reading order, in fractions of the width and height of the request's picture or video, the last
            of several.
        spans: in reading order, in fractions of the time from the first to the last sampled frame.
    """

    text: str
    boxes: list[Box] = field(default_factory=list)
    spans: list[TimeSpan] = field(default_factory=list)

    def __str__(self) -> str:
        """The text with numbers in the place of bins, such as "the star [0.12 0.34 0.56 0.78]"."""
        return write_numbers(self.text, self.boxes, self.spans)


def read_answer(
    text: str,
    grounding: GroundingConfig | None,
    framing: Framing | None = None,
    positions: Sequence[float | None] | None = None,
) -> Answer:
    """Read the boxes and spans of a text.

    Args:
        text: as a model generated it.
        grounding: of the model; without tables of bins no text tells a box.
        framing: how the picture lies in the square that the model saw; None if they are the same.
        positions: of its bins, see ``parse_boxes``.
    """
    if grounding is None or not grounding.has_tables:
        return Answer(text)
    if positions is not None and len(positions) != count_bins(text):
        # Some bin is spelled letter by letter: which of them are tokens cannot be told from the text.
        positions = None
    boxes = parse_boxes(text, grounding, positions)
    if framing is not None:
        boxes = [Box(*framing.from_square(*box[:2]), *framing.from_square(*box[2:])) for box in boxes]
    return Answer(text, boxes, parse_spans(text, grounding, positions))
