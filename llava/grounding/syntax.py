"""Places and times in text: their tokens, and how boxes and spans of time are written with them.

A coordinate is a number in [0, 1]. In a data file it stands in a sample's ``variables``, and its place in the
text is held by a placeholder such as ``<WIDTH-OUTPUT>``; a model answers with bins, ``<WIDTH-042>``. A box is
``[<WIDTH-...><HEIGHT-...><WIDTH-...><HEIGHT-...>]`` (x1 y1 x2 y2), a span of time ``{<TEMP-...><TEMP-...>}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from llava.types import Coordinates

Axis = Literal["TEMP", "HEIGHT", "WIDTH"]
Direction = Literal["INPUT", "OUTPUT"]

AXES: tuple[Axis, ...] = ("TEMP", "HEIGHT", "WIDTH")
"""The order in which bins join a vocabulary."""
BOX_AXES: tuple[Axis, ...] = ("WIDTH", "HEIGHT", "WIDTH", "HEIGHT")
SPAN_AXES: tuple[Axis, ...] = ("TEMP", "TEMP")

LAPE, PLACEHOLDER, NONE = "lape", "placeholder", "none"
GROUNDING_MODES = (LAPE, PLACEHOLDER, NONE)

DEFAULT_BINS = 100
_MOST_BINS = 1000
"""Bins are numbered with three digits."""

_PLACEHOLDER = re.compile(r"<(TEMP|HEIGHT|WIDTH)-(INPUT|OUTPUT)>")
_BIN = re.compile(r"<(TEMP|HEIGHT|WIDTH)-(\d{3})>")
_LOCATED = re.compile(
    r"\[\s*(?:<WIDTH-\d{3}>\s*<HEIGHT-\d{3}>\s*){2}\]|\{\s*(?:<TEMP-\d{3}>\s*){2}\}"
)  # fmt: skip

Positions = Sequence[float | None]
"""Of the bins of a text, in reading order: where each is exactly, None for one of which only its number is known."""


class Box(NamedTuple):
    """A box in a picture, each number in [0, 1]: (x1, y1) is its upper left corner, (x2, y2) its lower right."""

    x1: float
    y1: float
    x2: float
    y2: float


class TimeSpan(NamedTuple):
    """A stretch of a video, from start to end, each in [0, 1] of its length."""

    start: float
    end: float


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


@dataclass(frozen=True)
class GroundingConfig:
    """How a model reads and writes coordinates.

    A model's ``config.json`` holds it under ``grounding``, ``num_temporal_tokens``, ``num_spatial_tokens``,
    ``coordinate_token_ids`` and ``first_coordinate_bin``.

    Where a field is a flag too, the text under it is the flag's help.
    """

    mode: str = LAPE
    """``lape`` (tables of bins, which text and pictures share) or ``placeholder`` (a placeholder is a word like others,
    and says nothing of where)."""
    num_temporal: int = DEFAULT_BINS
    """Bins of time in new tables."""
    num_spatial: int = DEFAULT_BINS
    """Bins of height, and of width, in new tables."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """Ids of the placeholders."""
    first_bin: int | None = None
    """Id of the first bin; all others follow it, time, height, width. None with ``placeholder``."""

    def __post_init__(self) -> None:
        if self.mode not in (LAPE, PLACEHOLDER):
            raise ValueError(f"--grounding is {self.mode!r}; known: {', '.join(GROUNDING_MODES)}")
        for name in ("num_temporal", "num_spatial"):
            if not 2 <= getattr(self, name) <= _MOST_BINS:
                raise ValueError(f"--{name}_tokens is {getattr(self, name)}; it must be 2 to {_MOST_BINS}")

    @property
    def has_tables(self) -> bool:
        return self.mode == LAPE

    def num_bins(self, axis: Axis) -> int:
        return self.num_temporal if axis == "TEMP" else self.num_spatial

    @property
    def total_bins(self) -> int:
        return sum(map(self.num_bins, AXES)) if self.has_tables else 0

    def bin_tokens(self) -> list[str]:
        """The names of all bins, in the order of their ids."""
        return [bin_token(axis, i) for axis in AXES for i in range(self.num_bins(axis))] if self.has_tables else []

    def first_bin_of(self, axis: Axis) -> int:
        """Id of the first bin of an axis."""
        assert self.first_bin is not None
        return self.first_bin + sum(map(self.num_bins, AXES[: AXES.index(axis)]))

    @property
    def filled_token_ids(self) -> list[int]:
        """Ids of the placeholders where these are filled with coordinates, and so are never an answer."""
        return list(self.token_ids.values()) if self.has_tables else []

    @property
    def new_tokens(self) -> list[str]:
        """The tokens that join a vocabulary, in order."""
        return [*COORDINATE_PLACEHOLDERS, *self.bin_tokens()]

    @classmethod
    def from_model_config(cls, config: Any) -> GroundingConfig | None:
        """Read the entries of a Hugging Face config; None for a model without coordinates."""
        if getattr(config, "grounding", NONE) == NONE:
            return None
        return cls(
            config.grounding,
            config.num_temporal_tokens,
            config.num_spatial_tokens,
            config.coordinate_token_ids,
            config.first_coordinate_bin,
        )

    def to_model_config(self) -> dict[str, Any]:
        """The entries that ``from_model_config`` reads, as plain values."""
        return {
            "grounding": self.mode,
            "num_temporal_tokens": self.num_temporal,
            "num_spatial_tokens": self.num_spatial,
            "coordinate_token_ids": dict(self.token_ids),
            "first_coordinate_bin": self.first_bin,
        }


def choose_grounding(
    trained: GroundingConfig | None, mode: str | None, num_temporal: int | None, num_spatial: int | None
) -> GroundingConfig | None:
    """What coordinates are to a model: what they are to its checkpoint, or what flags ask for where that is new.

    Args:
        trained: of the checkpoint; None without coordinates.
        mode: of ``GROUNDING_MODES``; None asks for nothing.
        num_temporal, num_spatial: bins; None asks for nothing.

    Raises:
        ValueError: what is asked for is not what the checkpoint was trained with.
    """
    if mode is not None and mode not in GROUNDING_MODES:
        raise ValueError(f"--grounding is {mode!r}; known: {', '.join(GROUNDING_MODES)}")
    if trained is None or (trained.mode == PLACEHOLDER and mode == LAPE):
        if mode in (None, NONE):
            return None
        return GroundingConfig(str(mode), num_temporal or DEFAULT_BINS, num_spatial or DEFAULT_BINS)
    for flag, asked, has in (
        ("--grounding", mode, trained.mode),
        ("--num_temporal_tokens", num_temporal, trained.num_temporal),
        ("--num_spatial_tokens", num_spatial, trained.num_spatial),
    ):
        if asked is not None and asked != has:
            raise ValueError(f"{flag} is {asked}, but the checkpoint was trained with {has}; leave the flag out")
    return trained


def bin_token(axis: Axis, index: int) -> str:
    return f"<{axis}-{index:03d}>"


def box_text(direction: Direction = "OUTPUT") -> str:
    """The text of a box whose numbers stand in ``variables``."""
    return f"[{''.join(f'<{axis}-{direction}>' for axis in BOX_AXES)}]"


def span_text(direction: Direction = "OUTPUT") -> str:
    """The text of a span of time whose numbers stand in ``variables``."""
    return f"{{{''.join(f'<{axis}-{direction}>' for axis in SPAN_AXES)}}}"


def find_placeholders(text: str) -> list[str]:
    """The coordinate placeholders of a text, in reading order."""
    return [match.group() for match in _PLACEHOLDER.finditer(text)]


def nearest_bin(position: float, num_bins: int) -> int:
    """The bin whose position, index / (number - 1), is nearest to a position in [0, 1]."""
    return min(max(round(position * (num_bins - 1)), 0), num_bins - 1)


def write_bins(text: str, coordinates: Coordinates, grounding: GroundingConfig) -> str:
    """Put the nearest bin in the place of each placeholder, as a model would write the text.

    Raises:
        ValueError: there are fewer coordinates than placeholders.
    """
    waiting = {placeholder: iter(getattr(coordinates, name)) for placeholder, name in LOCATIONS.items()}

    def write(match: re.Match[str]) -> str:
        position = next(waiting[match.group()], None)
        if position is None:
            raise ValueError(f"{LOCATIONS[match.group()]} is shorter than the text's {match.group()}")
        axis: Any = match.group(1)
        return bin_token(axis, nearest_bin(position, grounding.num_bins(axis)))

    return _PLACEHOLDER.sub(write, text)


def count_bins(text: str) -> int:
    """How many bins stand in a text."""
    return len(_BIN.findall(text))


def parse_places(text: str, grounding: GroundingConfig, positions: Positions | None = None) -> list[Box | TimeSpan]:
    """The boxes and spans of time that a text of bins tells, in reading order; what is no whole one is passed over.

    Args:
        text: such as "the star [<WIDTH-010><HEIGHT-020><WIDTH-030><HEIGHT-040>]".
        grounding: of the model that wrote it.
        positions: where they are known more precisely than bins tell, see ``llava.model.coordinates``.
    """
    places: list[Box | TimeSpan] = []
    for opening, numbers in _parse(text, grounding, positions):
        places.append(Box(*numbers) if opening == "[" else TimeSpan(*numbers))
    return places


def parse_boxes(text: str, grounding: GroundingConfig, positions: Positions | None = None) -> list[Box]:
    """The boxes that a text of bins tells; see ``parse_places``."""
    return [place for place in parse_places(text, grounding, positions) if isinstance(place, Box)]


def parse_spans(text: str, grounding: GroundingConfig, positions: Positions | None = None) -> list[TimeSpan]:
    """The spans of time that a text tells; see ``parse_places``."""
    return [place for place in parse_places(text, grounding, positions) if isinstance(place, TimeSpan)]


def write_numbers(text: str, boxes: Sequence[Box], spans: Sequence[TimeSpan]) -> str:
    """Put numbers in the place of bins, to be read by people: "the star [0.12 0.34 0.56 0.78]".

    Args:
        text: of bins.
        boxes, spans: one for each that ``parse_boxes`` and ``parse_spans`` find in the text, in reading order.
    """
    waiting: dict[str, Iterator[Sequence[float]]] = {"[": iter(boxes), "{": iter(spans)}

    def write(match: re.Match[str]) -> str:
        opening, closing = match.group()[0], match.group()[-1]
        return f"{opening}{' '.join(f'{number:.2f}' for number in next(waiting[opening]))}{closing}"

    return _LOCATED.sub(write, text)


def strip_coordinates(text: str) -> str:
    """A text without its boxes and spans, loose bins and placeholders, and the spaces that these leave doubled."""
    for coordinates in (_LOCATED, _BIN, _PLACEHOLDER):
        text = coordinates.sub(" ", text)
    return " ".join(text.split())


def _parse(text: str, grounding: GroundingConfig, positions: Positions | None) -> Iterator[tuple[str, list[float]]]:
    """The opening bracket and the numbers of each box and span."""
    places = [match.start() for match in _BIN.finditer(text)]
    if positions is not None and len(positions) != len(places):
        raise ValueError(f"the text has {len(places)} bins, but {len(positions)} positions were given")
    for located in _LOCATED.finditer(text):
        numbers = []
        for match in _BIN.finditer(text, located.start(), located.end()):
            axis: Any = match.group(1)
            known = None if positions is None else positions[places.index(match.start())]
            numbers.append(int(match.group(2)) / (grounding.num_bins(axis) - 1) if known is None else known)
        yield located.group()[0], numbers
