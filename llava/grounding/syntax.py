"""Places and times in text: their tokens, and how boxes and spans of time are written with them.

A coordinate is a number in [0, 1]. In a data file it stands in a sample's ``variables``, and its place in the
text is held by a placeholder such as ``<WIDTH-OUTPUT>``; a model answers with bins, ``<WIDTH-042>``. A box is
``[<WIDTH-...><HEIGHT-...><WIDTH-...><HEIGHT-...>]`` (x1 y1 x2 y2), a span of time ``{<TEMP-...><TEMP-...>}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from llava.config import GroundingConfig
from llava.constants import AXES, Axis
from llava.geometry import Box, TimeSpan

Direction = Literal["INPUT", "OUTPUT"]

BOX_AXES: tuple[Axis, ...] = ("WIDTH", "HEIGHT", "WIDTH", "HEIGHT")
SPAN_AXES: tuple[Axis, ...] = ("TEMP", "TEMP")

COORDINATE_PLACEHOLDER = re.compile(r"<(TEMP|HEIGHT|WIDTH)-(INPUT|OUTPUT)>")
"""Any placeholder of a coordinate; its first group is the axis."""
_BIN = re.compile(r"<(TEMP|HEIGHT|WIDTH)-([0-9]{3})>")
_LOCATED = re.compile(
    r"\[\s*(?:<WIDTH-[0-9]{3}>\s*<HEIGHT-[0-9]{3}>\s*){2}\]|\{\s*(?:<TEMP-[0-9]{3}>\s*){2}\}"
)  # fmt: skip

Positions = Sequence[float | None]
"""The exact position of each bin of a text, in reading order; None where only the number of the bin is known."""

LOCATIONS: dict[str, str] = {
    "<TEMP-INPUT>": "temporal_input_locations",
    "<TEMP-OUTPUT>": "temporal_output_locations",
    "<HEIGHT-INPUT>": "spatial_height_input_locations",
    "<HEIGHT-OUTPUT>": "spatial_height_output_locations",
    "<WIDTH-INPUT>": "spatial_width_input_locations",
    "<WIDTH-OUTPUT>": "spatial_width_output_locations",
}
"""Each placeholder, in the order in which they join a vocabulary, and the list of ``Coordinates`` that fills it."""
COORDINATE_PLACEHOLDERS = tuple(LOCATIONS)


def bin_token(axis: str, index: int) -> str:
    return f"<{axis}-{index:03d}>"


def bin_tokens(grounding: GroundingConfig) -> list[str]:
    """The names of all bins, in the order of their ids; none without tables."""
    # This order is that of their ids, and so of the rows of all tables.
    axes = AXES if grounding.has_tables else ()
    return [bin_token(axis, i) for axis in axes for i in range(grounding.num_bins(axis))]


def box_text(direction: Direction = "OUTPUT") -> str:
    """The text of a box whose numbers stand in ``variables``."""
    return f"[{''.join(f'<{axis}-{direction}>' for axis in BOX_AXES)}]"


def span_text(direction: Direction = "OUTPUT") -> str:
    """The text of a span of time whose numbers stand in ``variables``."""
    return f"{{{''.join(f'<{axis}-{direction}>' for axis in SPAN_AXES)}}}"


def find_placeholders(text: str) -> list[str]:
    """The coordinate placeholders of a text, in reading order."""
    return [match.group() for match in COORDINATE_PLACEHOLDER.finditer(text)]


def stand_in_bins(text: str) -> str:
    """A text with some bin in the place of each placeholder, as ``parse_places`` reads it."""
    return COORDINATE_PLACEHOLDER.sub(lambda match: bin_token(match[1], 0), text)


def count_bins(text: str) -> int:
    """How many bins stand in a text."""
    return len(_BIN.findall(text))


def parse_places(text: str, grounding: GroundingConfig, positions: Positions | None = None) -> list[Box | TimeSpan]:
    """The boxes and spans of time that a text of bins tells, in reading order; incomplete ones are left out.

    Args:
        text: such as "the star [<WIDTH-010><HEIGHT-020><WIDTH-030><HEIGHT-040>]".
        grounding: of the model that wrote it.
        positions: exact positions of the bins, where they are known, see ``llava.model.coordinates``.

    Raises:
        ValueError: there are not as many positions as bins.
    """
    # Bins are counted over all of the text, loose ones too: positions are given for each.
    order = {match.start(): i for i, match in enumerate(_BIN.finditer(text))}
    if positions is not None and len(positions) != len(order):
        raise ValueError(f"the text has {len(order)} bins, but {len(positions)} positions were given")
    places: list[Box | TimeSpan] = []
    for located in _LOCATED.finditer(text):
        numbers = []
        for match in _BIN.finditer(text, located.start(), located.end()):
            known = None if positions is None else positions[order[match.start()]]
            # Bin i of N stands for i / (N - 1), the inverse of ``coordinates.locate``. A bin that is none of the N,
            # which a model can only spell letter by letter, counts as the last: nothing lies outside of the picture.
            last = grounding.num_bins(match[1]) - 1
            numbers.append(min(int(match[2]) / last, 1.0) if known is None else known)
        # In the text's order, which is x1 y1 x2 y2, and start, end.
        places.append(Box(*numbers) if located.group()[0] == "[" else TimeSpan(*numbers))
    return places


def parse_boxes(text: str, grounding: GroundingConfig, positions: Positions | None = None) -> list[Box]:
    """The boxes that a text of bins tells; see ``parse_places``."""
    return [place for place in parse_places(text, grounding, positions) if isinstance(place, Box)]


def parse_spans(text: str, grounding: GroundingConfig, positions: Positions | None = None) -> list[TimeSpan]:
    """The spans of time that a text tells; see ``parse_places``."""
    return [place for place in parse_places(text, grounding, positions) if isinstance(place, TimeSpan)]


def write_numbers(text: str, boxes: Sequence[Box], spans: Sequence[TimeSpan]) -> str:
    """Put numbers in the place of bins, for people to read: "the star [0.12 0.34 0.56 0.78]".

    Args:
        text: of bins.
        boxes, spans: one for each that ``parse_boxes`` and ``parse_spans`` find in the text, in reading order.
    """
    waiting: dict[str, Iterator[Sequence[float]]] = {"[": iter(boxes), "{": iter(spans)}

    def write(match: re.Match[str]) -> str:
        opening, closing = match.group()[0], match.group()[-1]
        return f"{opening}{' '.join(f'{number:.2f}' for number in next(waiting[opening]))}{closing}"

    # Loose bins stay as they are: they are part of no box.
    return _LOCATED.sub(write, text)


def strip_coordinates(text: str) -> str:
    """A text without its boxes and spans, loose bins and placeholders, and the spaces that these leave doubled."""
    for coordinates in (_LOCATED, _BIN, COORDINATE_PLACEHOLDER):
        text = coordinates.sub(" ", text)
    return " ".join(text.split())
