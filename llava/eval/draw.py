"""Pictures of cases: where the answer says that something is, and where it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava.eval.metrics.grounding import Tube
from llava.grounding.syntax import Box, TimeSpan

Place = Box | TimeSpan | Tube
Colour = tuple[int, int, int]

REFERENCE_COLOUR: Colour = (0, 170, 60)
ANSWER_COLOUR: Colour = (225, 40, 40)
_PAPER: Colour = (250, 249, 246)
_INK: Colour = (32, 33, 36)
_FAINT: Colour = (128, 130, 136)
_TRACK: Colour = (222, 220, 214)
_TEXT_COLOURS = {"reference": REFERENCE_COLOUR, "answer": ANSWER_COLOUR}

_WIDTH = 920
_MARGIN = 20
_GAP = 8
_COLUMNS = 4
_LARGEST_PICTURE = (_WIDTH, 640)
_REFERENCE_LINE, _ANSWER_LINE = 5, 2
"""The answer's line is the thinner and lies on top: where the two are one box, both colours are seen."""
_BAR_HEIGHT = 12
_FONT_SIZE = 15
_LABEL_WIDTH = 96
_LINE_HEIGHT = 22
_MOST_LINES = 8


def draw_case(
    frames: Sequence[Image.Image],
    reference: Sequence[Place] = (),
    answer: Sequence[Place] = (),
    texts: Mapping[str, str] | None = None,
    times: Sequence[float] | None = None,
) -> Image.Image:
    """Draw an image, or frames of a video, with the reference in green and the answer in red.

    A box is drawn in every frame, a tube's in the frames of its span. Spans, those of tubes included, are drawn as
    stretches of a bar of time, the reference's above the answer's. What is reversed is drawn between its ends
    all the same, a box with a diagonal and a span hollow: it holds nothing, and scores 0.

    Args:
        frames: an image, or the frames of a video in the order of time; they are left as they are.
        reference, answer: places in [0, 1] of the picture and of the clip.
        texts: lines below, by their label: question, answer, score... Those labelled "reference" and "answer" have
            the colour of their places; a long one is broken into lines, and cut after eight. Accents are left out.
        times: of the frames, in [0, 1] of the clip; without them the frames are spread evenly over it.

    Returns:
        An RGB image, 960 pixels wide.

    Raises:
        ValueError: there is no frame, or there are not as many times as frames.
    """
    if not frames:
        raise ValueError("there is no frame to draw the case on; an image is one frame")
    times = np.linspace(0, 1, len(frames)).tolist() if times is None else times
    if len(times) != len(frames):
        raise ValueError(f"there are {len(frames)} frames, but {len(times)} times")
    reference_spans, answer_spans = _spans_of(reference), _spans_of(answer)
    has_time = bool(reference_spans or answer_spans)
    marked = [
        _mark_frame(_fit(frame, len(frames)), reference, answer, time)
        for frame, time in zip(frames, times, strict=True)
    ]
    panels = [_lay_out(marked, times if has_time else [])]
    if has_time:
        panels.append(_draw_bar(reference_spans, answer_spans, times))
    if texts:
        panels.append(_draw_texts(texts))
    return _stack(panels)


def _fit(frame: Image.Image, num_frames: int) -> Image.Image:
    """A copy of a frame, as large as its place in the strip, or as the page allows for a single picture."""
    width, height = _LARGEST_PICTURE
    if num_frames > 1:
        width = (_WIDTH - (_COLUMNS - 1) * _GAP) // _COLUMNS
    scale = min(width / frame.width, height / frame.height)
    size = (max(round(frame.width * scale), 1), max(round(frame.height * scale), 1))
    return frame.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _mark_frame(frame: Image.Image, reference: Sequence[Place], answer: Sequence[Place], time: float) -> Image.Image:
    """Draw into a frame the boxes that places have at its time."""
    draw = ImageDraw.Draw(frame)
    for places, colour, line in (
        (reference, REFERENCE_COLOUR, _REFERENCE_LINE),
        (answer, ANSWER_COLOUR, _ANSWER_LINE),
    ):
        for place in places:
            box = place.box_at(time) if isinstance(place, Tube) else place
            if isinstance(box, Box):
                _draw_box(draw, box, frame.size, colour, line)
    return frame


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], colour: Colour, line: int) -> None:
    right, lower = size[0] - 1, size[1] - 1
    x1, y1, x2, y2 = box.x1 * right, box.y1 * lower, box.x2 * right, box.y2 * lower
    draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=line)
    if x1 > x2 or y1 > y2:
        draw.line((x1, y1, x2, y2), fill=colour, width=line)


def _spans_of(places: Sequence[Place]) -> list[TimeSpan]:
    spans = [place.span if isinstance(place, Tube) else place for place in places]
    return [span for span in spans if isinstance(span, TimeSpan)]


def _lay_out(frames: Sequence[Image.Image], times: Sequence[float]) -> Image.Image:
    """The frames in rows, with their times below where there are any."""
    label_height = _LINE_HEIGHT if times else 0
    cell_width = frames[0].width + _GAP
    cell_height = max(frame.height for frame in frames) + label_height + _GAP
    num_rows = -(-len(frames) // _COLUMNS)
    page = Image.new("RGB", (_WIDTH, num_rows * cell_height - _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    for number, frame in enumerate(frames):
        left, top = number % _COLUMNS * cell_width, number // _COLUMNS * cell_height
        page.paste(frame, (left, top))
        if times:
            draw.text((left, top + frame.height + 2), f"{times[number]:.2f}", _FAINT, _font())
    return page


def _draw_bar(reference: Sequence[TimeSpan], answer: Sequence[TimeSpan], times: Sequence[float]) -> Image.Image:
    """The clip's time from left to right: the reference's spans, below them the answer's, and ticks at the frames."""
    page = Image.new("RGB", (_WIDTH, 3 * _BAR_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(page)
    for top, spans, colour in (
        (0, reference, REFERENCE_COLOUR),
        (_BAR_HEIGHT + 2, answer, ANSWER_COLOUR),
    ):
        bottom = top + _BAR_HEIGHT - 1
        draw.rectangle((0, top, _WIDTH - 1, bottom), fill=_TRACK)
        for span in spans:
            left, right = (_column(time) for time in sorted(span))
            hollow = span.start > span.end
            draw.rectangle((left, top, right, bottom), fill=None if hollow else colour, outline=colour)
    for time in times:
        draw.line((_column(time), 2 * _BAR_HEIGHT + 4, _column(time), 3 * _BAR_HEIGHT - 1), fill=_FAINT)
    return page


def _column(time: float) -> int:
    """The bar's pixel of a time."""
    return round(time * (_WIDTH - 1))


def _draw_texts(texts: Mapping[str, str]) -> Image.Image:
    """Texts beside their labels."""
    paragraphs = {label: _break_lines(text) for label, text in texts.items()}
    page = Image.new("RGB", (_WIDTH, sum(map(len, paragraphs.values())) * _LINE_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(page)
    top = 0
    for label, lines in paragraphs.items():
        draw.text((0, top), _bare_letters(label), _FAINT, _font())
        for line in lines:
            draw.text((_LABEL_WIDTH, top), line, _TEXT_COLOURS.get(label, _INK), _font())
            top += _LINE_HEIGHT
    return page


def _break_lines(text: str) -> list[str]:
    """Lines as wide as the page has room for, one at least; a word too long for a line is broken itself."""
    lines = [""]
    for word in _bare_letters(text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if _fits(longer):
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            lines += [] if _fits(lines[-1] + character) else [""]
            lines[-1] += character
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "..."]


def _bare_letters(text: str) -> str:
    """A text without accents: the font that comes with Pillow has none, and would draw empty boxes."""
    return "".join(
        character for character in unicodedata.normalize("NFKD", text) if not unicodedata.combining(character)
    )


def _fits(line: str) -> bool:
    return _font().getlength(line) <= _WIDTH - _LABEL_WIDTH


def _stack(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels one below the other, with a margin around each."""
    height = sum(panel.height + _MARGIN for panel in panels) + _MARGIN
    page = Image.new("RGB", (_WIDTH + 2 * _MARGIN, height), _PAPER)
    top = _MARGIN
    for panel in panels:
        page.paste(panel, (_MARGIN, top))
        top += panel.height + _MARGIN
    return page


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)
