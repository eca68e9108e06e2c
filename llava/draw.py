"""Pictures with boxes, tubes, spans of time and captions: of answers beside their references, of data, of the demo.

Places are in [0, 1] of the picture and of the clip. Pillow is imported when something is drawn.
"""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from llava.geometry import Box, TimeSpan, Tube

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

Colour = tuple[int, int, int]
Place = Box | TimeSpan | Tube

REFERENCE_COLOUR: Colour = (0, 170, 60)
ANSWER_COLOUR: Colour = (225, 40, 40)
PAPER: Colour = (250, 249, 246)
INK: Colour = (32, 33, 36)
FAINT: Colour = (128, 130, 136)
_TRACK: Colour = (222, 220, 214)

_GOLDEN_RATIO = 0.618034
_FONT_SIZE = 15
_LINE_HEIGHT = 22
_GAP = 8


# A case: where the reference and the answer say that something is.

_WIDTH = 920
_MARGIN = 20
_COLUMNS = 4
_LARGEST_PICTURE = (_WIDTH, 640)
_REFERENCE_LINE, _ANSWER_LINE = 5, 2
"""The answer's line is the thinner and lies on top: where the two are one box, both colours are seen."""
_BAR_HEIGHT = 12
_LABEL_WIDTH = 96
_MOST_LINES = 8


def draw_case(
    frames: Sequence[Image],
    reference: Sequence[Place] = (),
    answer: Sequence[Place] = (),
    texts: Mapping[str, str] | None = None,
    times: Sequence[float] | None = None,
) -> Image:
    """Draw an image, or frames of a video, with the reference in green and the answer in red.

    A box is drawn in every frame, a tube's in the frames of its span. Spans, those of tubes included, are drawn as
    stretches of a bar of time, the reference's above the answer's. What is reversed is drawn between its ends
    all the same, a box with a diagonal and a span hollow: it holds nothing, and scores 0.

    Args:
        frames: an image, or the frames of a video in the order of time; they are left as they are.
        reference, answer: the places.
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
    if times is None:
        times = [i / max(len(frames) - 1, 1) for i in range(len(frames))]
    if len(times) != len(frames):
        raise ValueError(f"there are {len(frames)} frames, but {len(times)} times")
    # One picture may fill the page; several stand four a row.
    width, height = _LARGEST_PICTURE
    if len(frames) > 1:
        width = (_WIDTH - (_COLUMNS - 1) * _GAP) // _COLUMNS
    marked = [fit(frame, width, height) for frame in frames]
    for frame, time in zip(marked, times, strict=True):
        for places, colour, line in (
            (reference, REFERENCE_COLOUR, _REFERENCE_LINE),
            (answer, ANSWER_COLOUR, _ANSWER_LINE),
        ):
            for place in places:
                # None outside of a tube's span.
                box = place.box_at(time) if isinstance(place, Tube) else place
                if isinstance(box, Box):
                    draw_box(frame, box, colour, line)
    spans = [(_spans_of(reference), REFERENCE_COLOUR), (_spans_of(answer), ANSWER_COLOUR)]
    has_time = any(of_one for of_one, _ in spans)
    panels = [_lay_out(marked, times if has_time else [])]
    if has_time:
        panels.append(_draw_bar(spans, times))
    if texts:
        panels.append(_draw_texts(texts))
    return stack(panels, margin=_MARGIN)


def _spans_of(places: Sequence[Place]) -> list[TimeSpan]:
    spans = [place.span if isinstance(place, Tube) else place for place in places]
    return [span for span in spans if isinstance(span, TimeSpan)]


def _lay_out(frames: Sequence[Image], times: Sequence[float]) -> Image:
    """The frames in rows, with their times below where there are any."""
    cell_width = frames[0].width + _GAP
    cell_height = max(frame.height for frame in frames) + (_LINE_HEIGHT if times else 0) + _GAP
    # Rounded up.
    num_rows = -(-len(frames) // _COLUMNS)
    page, draw = blank_page(_WIDTH, num_rows * cell_height - _GAP)
    for number, frame in enumerate(frames):
        left, top = number % _COLUMNS * cell_width, number // _COLUMNS * cell_height
        page.paste(frame, (left, top))
        if times:
            draw.text((left, top + frame.height + 2), f"{times[number]:.2f}", FAINT, load_font())
    return page


def _draw_bar(spans: Sequence[tuple[Sequence[TimeSpan], Colour]], times: Sequence[float]) -> Image:
    """The clip's time from left to right: the reference's spans, below them the answer's, and ticks at the frames."""
    page, draw = blank_page(_WIDTH, 3 * _BAR_HEIGHT)
    for row, (of_one, colour) in enumerate(spans):
        top = row * (_BAR_HEIGHT + 2)
        bottom = top + _BAR_HEIGHT - 1
        draw.rectangle((0, top, _WIDTH - 1, bottom), fill=_TRACK)
        for span in of_one:
            # Sorted: a reversed span is drawn too, hollow.
            left, right = (round(time * (_WIDTH - 1)) for time in sorted(span))
            hollow = span.start > span.end
            draw.rectangle((left, top, right, bottom), fill=None if hollow else colour, outline=colour)
    for time in times:
        column = round(time * (_WIDTH - 1))
        draw.line((column, 2 * _BAR_HEIGHT + 4, column, 3 * _BAR_HEIGHT - 1), fill=FAINT)
    return page


def _draw_texts(texts: Mapping[str, str]) -> Image:
    """Texts beside their labels."""
    paragraphs = {}
    for label, text in texts.items():
        # Models say long nonsense: words are broken and lines counted.
        lines = wrap_text(bare_letters(text), _WIDTH - _LABEL_WIDTH, break_words=True)
        paragraphs[label] = lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "..."]
    page, draw = blank_page(_WIDTH, sum(map(len, paragraphs.values())) * _LINE_HEIGHT)
    top = 0
    for label, lines in paragraphs.items():
        draw.text((0, top), bare_letters(label), FAINT, load_font())
        colour = {"reference": REFERENCE_COLOUR, "answer": ANSWER_COLOUR}.get(label, INK)
        for line in lines:
            draw.text((_LABEL_WIDTH, top), line, colour, load_font())
            top += _LINE_HEIGHT
    return page


# Captions of clips: each in a card of its own, frames above, what is said of them below.

_CARD_COLUMNS = 2
_CARD_FRAME = 132
_CARD_GAP = 36


def draw_captions(cards: Sequence[tuple[Sequence[Image], Mapping[str, str], bool]], title: str) -> Image:
    """Draw clips with what is said of them, two a row.

    Args:
        cards: of each clip its frames, lines by their label, the last of which is the model's, and whether that is
            right.
        title: above them all.
    """
    # As wide as the text: the page grows to its widest part.
    heading, draw = blank_page(round(load_font(22).getlength(title)) + 1, 28)
    draw.text((0, 0), title, INK, load_font(22))
    drawn = [_draw_card(*card) for card in cards]
    rows = [side_by_side(drawn[i : i + _CARD_COLUMNS], _CARD_GAP) for i in range(0, len(drawn), _CARD_COLUMNS)]
    return stack([heading, *rows], margin=_CARD_GAP - _GAP)


def _draw_card(frames: Sequence[Image], lines: Mapping[str, str], is_right: bool) -> Image:
    strip = side_by_side([fit(frame, _CARD_FRAME, _CARD_FRAME) for frame in frames], _GAP)
    texts, draw = blank_page(strip.width, len(lines) * 26)
    indent = max(round(load_font(14).getlength(label)) for label in lines) + 14
    for number, (label, text) in enumerate(lines.items()):
        # The model's line comes last and says by its colour whether it is right.
        last = number == len(lines) - 1
        draw.text((0, number * 26 + 3), label, FAINT, load_font(14))
        colour = INK if not last else REFERENCE_COLOUR if is_right else ANSWER_COLOUR
        draw.text((indent, number * 26), bare_letters(text), colour, load_font(17))
    return stack([strip, texts], gap=10)


# Parts of pictures.


def draw_box(picture: Image, box: Box, colour: Colour | str, line: int, label: str = "") -> None:
    """Draw a box into a picture, one that is reversed with a diagonal, its label inside of its upper left corner."""
    # Edges at 1 lie on the last pixel, not behind it.
    right, lower = picture.width - 1, picture.height - 1
    x1, y1, x2, y2 = box.x1 * right, box.y1 * lower, box.x2 * right, box.y2 * lower
    draw = _on(picture)
    draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=line)
    if x1 > x2 or y1 > y2:
        draw.line((x1, y1, x2, y2), fill=colour, width=line)
    if label:
        # A stroke of paper around the letters: they are read on any picture.
        draw.text((x1 + 5, y1 + 3), label, colour, load_font(), stroke_width=2, stroke_fill=PAPER)


def draw_trace(picture: Image, points: Sequence[tuple[float, float]], colour: Colour, width: int) -> None:
    """Draw a line through points into a picture, with a dot where it begins."""
    places = [(x * picture.width, y * picture.height) for x, y in points]
    draw = _on(picture)
    if len(places) > 1:
        draw.line(places, colour, width)
    for x, y in places[:1]:
        draw.ellipse((x - width, y - width, x + width, y + width), colour)


def draw_legend(heading: str, entries: Sequence[tuple[str, Colour | None]], width: int) -> Image:
    """A list of texts with a square in the colour of each; one without a colour is faint, its square empty."""
    swatch, line_height = 14, 21
    indent = swatch + 8
    # Text is wrapped first: the height of the page depends on it.
    head = wrap_text(heading, width, 13)
    paragraphs = [wrap_text(text, width - indent) for text, _ in entries]
    page, draw = blank_page(width, (len(head) + 1 + sum(map(len, paragraphs))) * line_height)
    for number, line in enumerate(head):
        draw.text((0, number * line_height), line, FAINT, load_font(13))
    top = (len(head) + 1) * line_height
    for lines, (_, colour) in zip(paragraphs, entries, strict=True):
        draw.rectangle((0, top + 2, swatch, top + 2 + swatch), colour, colour or FAINT)
        for line in lines:
            draw.text((indent, top), line, INK if colour else FAINT, load_font())
            top += line_height
    return page


def choose_colour(number: int) -> Colour:
    """The colour of one of several things; hues of neighbours are far apart."""
    # Steps of the golden ratio never come near an earlier hue soon.
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, 0.85, 0.9)
    return int(red * 255), int(green * 255), int(blue * 255)


def fit(picture: Image, width: int, height: int) -> Image:
    """An RGB copy of a picture, as large as it can be within so many pixels."""
    from PIL.Image import Resampling

    # The side that is too long decides; a small picture is enlarged.
    scale = min(width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.convert("RGB").resize(size, Resampling.BICUBIC)


def side_by_side(pictures: Sequence[Image], gap: int = 0, margin: int = 0) -> Image:
    """Pictures in a row, aligned at their tops, with a gap between them and a margin around."""
    width = sum(picture.width for picture in pictures) + (len(pictures) - 1) * gap
    page, _ = blank_page(width + 2 * margin, max(picture.height for picture in pictures) + 2 * margin)
    left = margin
    for picture in pictures:
        page.paste(picture, (left, margin))
        left += picture.width + gap
    return page


def stack(pictures: Sequence[Image], *, gap: int | None = None, margin: int = 0) -> Image:
    """Pictures below one another, aligned at their left; the gap between them is the margin unless it is given."""
    gap = margin if gap is None else gap
    height = sum(picture.height for picture in pictures) + (len(pictures) - 1) * gap
    page, _ = blank_page(max(picture.width for picture in pictures) + 2 * margin, height + 2 * margin)
    top = margin
    for picture in pictures:
        page.paste(picture, (margin, top))
        top += picture.height + gap
    return page


def wrap_text(text: str, width: int, font_size: int = _FONT_SIZE, *, break_words: bool = False) -> list[str]:
    """The lines of a text, one at least, each no wider than so many pixels.

    A word too long for a line has one to itself, or with ``break_words`` is broken.
    """
    font = load_font(font_size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        # A new line, unless this one is empty still.
        lines += [""] if lines[-1] else []
        if not break_words:
            lines[-1] = word
            continue
        for character in word:
            lines += [] if font.getlength(lines[-1] + character) <= width else [""]
            lines[-1] += character
    return lines


def bare_letters(text: str) -> str:
    """A text without accents: the font that comes with Pillow has none, and would draw empty boxes."""
    return "".join(
        # NFKD splits an accented letter into the letter and its accent.
        character
        for character in unicodedata.normalize("NFKD", text)
        if not unicodedata.combining(character)
    )


@cache
def load_font(size: int = _FONT_SIZE) -> Font:
    """The font that comes with Pillow; it has no accents (see ``bare_letters``)."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _on(picture: Image) -> ImageDraw:
    from PIL import ImageDraw

    return ImageDraw.Draw(picture)


def blank_page(width: int, height: int) -> tuple[Image, ImageDraw]:
    """Paper, and what draws on it."""
    from PIL import Image

    page = Image.new("RGB", (width, height), PAPER)
    return page, _on(page)
