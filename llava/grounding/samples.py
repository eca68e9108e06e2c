"""Coordinates of samples: read from ``variables``, checked against the text, moved into the tower's square."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from llava.config import VisionConfig
from llava.constants import PLACEHOLDER
from llava.grounding.syntax import COORDINATE_PLACEHOLDER, COORDINATE_PLACEHOLDERS, LOCATIONS
from llava.types import NO_COORDINATES, Coordinates, Turn

_NAMES = [field.name for field in fields(Coordinates)]
_MEDIA_OR_PLACE = re.compile("|".join([PLACEHOLDER.pattern, *COORDINATE_PLACEHOLDERS]))


def parse_variables(variables: object, text: str, where: str) -> Coordinates:
    """Validate the ``variables`` of a raw sample.

    Args:
        variables: the parsed JSON; None, and a missing list, are empty.
        text: of all turns, with a placeholder for each number.
        where: the sample, for errors.
    """
    if variables is None and not COORDINATE_PLACEHOLDER.search(text):
        return NO_COORDINATES
    # Columns of Parquet files have null where a sample has none.
    variables = {} if variables is None else variables
    if not isinstance(variables, dict):
        raise ValueError(f'{where}: "variables" must be an object of lists, found {type(variables).__name__}')
    if unknown := sorted(name for name in set(variables) - set(_NAMES) if variables[name]):
        raise ValueError(f'{where}: "variables" has the unknown list {unknown[0]!r}; known: {", ".join(_NAMES)}')
    found = Coordinates(**{name: _parse_list(variables.get(name), name, where) for name in _NAMES})
    check_coordinates(found, text, where)
    return found


def _parse_list(numbers: object, name: str, where: str) -> tuple[float, ...]:
    numbers = [] if numbers is None else numbers
    if not isinstance(numbers, list):
        raise ValueError(f'{where}: "variables.{name}" must be a list of numbers, found {type(numbers).__name__}')
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f'{where}: "variables.{name}" has {number!r}, which is no number')
        # Not math.isfinite, which fails over a whole number of hundreds of digits.
        if not 0 <= number <= 1:
            raise ValueError(
                f'{where}: "variables.{name}" has {str(number)[:40]}; a coordinate is a fraction, from 0 to 1, of the '
                "picture's width or height or of the clip's length"
            )
    return tuple(float(number) for number in numbers)


def check_coordinates(coordinates: Coordinates, text: str, where: str) -> None:
    """A ValueError unless each coordinate has its placeholder in the text, and each placeholder its own."""
    for placeholder, name in LOCATIONS.items():
        found, given = text.count(placeholder), len(getattr(coordinates, name))
        if found != given:
            raise ValueError(
                f'{where}: its text has {found} {placeholder}, but "variables.{name}" has {given} '
                f"number{'' if given == 1 else 's'}; there must be one for each"
            )


def move_to_square(
    turns: Sequence[Turn], coordinates: Coordinates, sizes: Sequence[tuple[int, int]], vision: VisionConfig
) -> Coordinates:
    """Coordinates of pictures as coordinates of the squares that the tower sees.

    Places speak of the image or video before them in the text, or of the first one. Times stay as they are.

    Args:
        turns: placeholders not expanded.
        coordinates: in order of appearance.
        sizes: original (height, width) of the media, in reading order.
        vision: how pictures are fitted to the square.
    """
    if not coordinates or not sizes:
        return coordinates
    # Each picture lies in its square in its own way.
    squares = [vision.letterbox(size) for size in sizes]
    # Numbers are taken from the front, as their placeholders are met in the text.
    waiting = {name: iter(numbers) for name, numbers in coordinates.to_variables().items()}
    moved: dict[str, list[float]] = {name: [] for name in waiting}
    seen = -1  # The number of the image or video that was read last.
    for found in _MEDIA_OR_PLACE.findall(" ".join(turn.text for turn in turns)):
        name = LOCATIONS.get(found)
        if name is None:
            seen += 1
            continue
        number, letterbox = next(waiting[name]), squares[max(seen, 0)]
        if "width" in name:
            number, _ = letterbox.to_square(number, 0)
        elif "height" in name:
            _, number = letterbox.to_square(0, number)
        moved[name].append(number)
    return Coordinates.from_variables(moved)
