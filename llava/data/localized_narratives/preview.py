"""Pictures of some samples, to judge their boxes by eye: image, trace, boxes and what was said."""

from __future__ import annotations

import colorsys
import hashlib
import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.localized_narratives.rows import Point
from llava.data.localized_narratives.samples import GroundedUtterance, NarrativeSample
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

_PICTURE_SIDE = 720
_LEGEND_WIDTH = 380
_MARGIN = 24
_SWATCH = 14
_LINE_HEIGHT = 21
_LONGEST_NAME = 200
_FONT_SIZE, _SMALL_FONT_SIZE = 15, 13

_PAPER = (250, 249, 246)
_INK = (32, 33, 36)
_FAINT = (128, 130, 136)
_GOLDEN_RATIO = 0.618034


class PreviewChoice:
    """Keeps the samples that will be drawn, so many of all that are offered.

    Samples with boxes come first, and among them those whose ids have the smallest SHA-256: the same samples
    for the same rows, from anywhere in the file, whatever their order.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"--preview is {size}; it must be at least 0")
        self._size = size
        self._kept: list[tuple[bool, int, NarrativeSample]] = []

    def offer(self, sample: NarrativeSample) -> None:
        """Keep a sample if it has an image and is one of the first so far."""
        if self._size and sample.image is not None:
            digest = int.from_bytes(hashlib.sha256(sample.identity.encode()).digest(), "big")
            # The heap's smallest entry is the one to go.
            entry = (any(utterance.box for utterance in sample.utterances), -digest, sample)
            if len(self._kept) < self._size:
                heapq.heappush(self._kept, entry)
            else:
                heapq.heappushpop(self._kept, entry)

    @property
    def samples(self) -> list[NarrativeSample]:
        """Those that were kept, first the one that would have been the last to go."""
        return [sample for *_, sample in sorted(self._kept, key=lambda entry: entry[:2], reverse=True)]


@dataclass(frozen=True)
class Preview:
    """Draws samples.

    Attributes:
        images: the folder of the images.
        folder: where the PNGs go.
        limits: how large an image may be.
    """

    images: Path
    folder: Path
    limits: MediaLimits = DEFAULT_LIMITS

    def write(self, samples: Sequence[NarrativeSample]) -> tuple[list[Path], list[MediaError]]:
        """Draw samples, each as a PNG named after its id.

        Returns:
            The files, and what is wrong with the images that could not be read.
        """
        written: list[Path] = []
        failed: list[MediaError] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for sample in samples:
            path = self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', sample.identity)[:_LONGEST_NAME]}.png"
            try:
                self.draw(sample).save(path)
            except MediaError as error:
                failed.append(error)
            else:
                written.append(path)
        return written, failed

    def draw(self, sample: NarrativeSample) -> Image.Image:
        """The picture of a sample with an image: image and boxes on the left, what was said on the right.

        Raises:
            MediaError: the image cannot be decoded.
        """
        from PIL import Image

        from llava.data.media import load_image

        assert sample.image is not None
        photograph = Image.fromarray(load_image(str(self.images / sample.image), self.limits).numpy())
        scale = _PICTURE_SIDE / max(photograph.size)
        size = (max(round(photograph.width * scale), 1), max(round(photograph.height * scale), 1))
        photograph = photograph.resize(size, Image.Resampling.LANCZOS)
        _draw_traces(photograph, sample)
        legend = _draw_legend(sample)
        width, height = photograph.width + legend.width, max(photograph.height, legend.height)
        page = Image.new("RGB", (width + 3 * _MARGIN, height + 2 * _MARGIN), _PAPER)
        page.paste(photograph, (_MARGIN, _MARGIN))
        page.paste(legend, (photograph.width + 2 * _MARGIN, _MARGIN))
        return page


def choose_colours(utterances: Sequence[GroundedUtterance]) -> list[tuple[int, int, int]]:
    """A colour for each utterance: hues far apart for neighbours, grey for one without a box."""
    colours = []
    for number, utterance in enumerate(utterances):
        red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, 0.85, 0.9)
        colours.append((int(red * 255), int(green * 255), int(blue * 255)) if utterance.box else _FAINT)
    return colours


def _draw_traces(photograph: Image.Image, sample: NarrativeSample) -> None:
    """The whole trace in grey, over it the points of each utterance in its colour, and the boxes on top."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(photograph)
    _draw_line(draw, photograph.size, sample.narrative.points, _FAINT, 1)
    colours = choose_colours(sample.utterances)
    for utterance, colour in zip(sample.utterances, colours, strict=True):
        _draw_line(draw, photograph.size, utterance.points, colour, 2)
    width, height = photograph.size
    for number, (utterance, colour) in enumerate(zip(sample.utterances, colours, strict=True), start=1):
        if (box := utterance.box) is not None:
            corners = (box.x1 * width, box.y1 * height, box.x2 * width - 1, box.y2 * height - 1)
            draw.rectangle(corners, outline=colour, width=3)
            corner = (corners[0] + 5, corners[1] + 3)
            draw.text(corner, str(number), colour, _font(_FONT_SIZE), stroke_width=2, stroke_fill=_PAPER)


def _draw_line(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], points: Sequence[Point], colour: tuple[int, int, int], width: int
) -> None:
    places = [(point.x * size[0], point.y * size[1]) for point in points]
    if len(places) > 1:
        draw.line(places, colour, width)
    for x, y in places[:1]:
        draw.ellipse((x - width, y - width, x + width, y + width), colour)


def _draw_legend(sample: NarrativeSample) -> Image.Image:
    """The id, and the utterances in their colours with the numbers of their boxes."""
    from PIL import Image, ImageDraw

    indent = _SWATCH + 8
    rows = []
    for number, utterance in enumerate(sample.utterances, start=1):
        text = f"{number}  {utterance.text}" if utterance.box else f"{number}  {utterance.text} (no box)"
        rows.append(wrap_text(text, _LEGEND_WIDTH - indent, _font(_FONT_SIZE)))
    head = wrap_text(sample.identity, _LEGEND_WIDTH, _font(_SMALL_FONT_SIZE))
    num_lines = len(head) + 1 + sum(map(len, rows))
    legend = Image.new("RGB", (_LEGEND_WIDTH, num_lines * _LINE_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(legend)
    for line, text in enumerate(head):
        draw.text((0, line * _LINE_HEIGHT), text, _FAINT, _font(_SMALL_FONT_SIZE))
    line = len(head) + 1
    for lines, utterance, colour in zip(rows, sample.utterances, choose_colours(sample.utterances), strict=True):
        top = line * _LINE_HEIGHT + 2
        draw.rectangle((0, top, _SWATCH, top + _SWATCH), colour if utterance.box else None, colour)
        for text in lines:
            draw.text((indent, line * _LINE_HEIGHT), text, _INK if utterance.box else _FAINT, _font(_FONT_SIZE))
            line += 1
    return legend


def wrap_text(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The lines of a text, each no wider than so many pixels unless one word is."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)
