"""Pictures of some samples, to judge their boxes by eye: image, trace, boxes and what was said."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava import draw
from llava.data.localized_narratives.boxes import NarrativeSample
from llava.data.media_files import MediaError

if TYPE_CHECKING:
    from PIL import Image

_PICTURE_SIDE = 720
_LEGEND_WIDTH = 380
_MARGIN = 24
_LONGEST_NAME = 200


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
            # A hash for chance: no generator whose state depends on the rows before.
            digest = int.from_bytes(hashlib.sha256(sample.identity.encode("utf-8", "surrogatepass")).digest(), "big")
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


def write_previews(
    samples: Sequence[NarrativeSample], images: Path, folder: Path
) -> tuple[list[Path], list[MediaError]]:
    """Draw samples, each as a PNG named after its id.

    Args:
        samples: with images.
        images: the folder of the images.
        folder: where the PNGs go.

    Returns:
        The files, and what is wrong with the images that could not be read.
    """
    written: list[Path] = []
    failed: list[MediaError] = []
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', sample.identity)[:_LONGEST_NAME]}.png"
        try:
            draw_sample(sample, images).save(path)
        except MediaError as error:
            failed.append(error)
        else:
            written.append(path)
    return written, failed


def draw_sample(sample: NarrativeSample, images: Path) -> Image.Image:
    """The picture of a sample with an image: image, traces and boxes on the left, what was said on the right.

    The whole trace is grey, the part of each utterance with a box has a colour of its own, and so has its box.

    Raises:
        MediaError: the image cannot be decoded.
    """
    from PIL import Image

    from llava.data.media import load_image

    assert sample.image is not None
    photograph = Image.fromarray(load_image(str(images / sample.image)).numpy())
    photograph = draw.fit(photograph, _PICTURE_SIDE, _PICTURE_SIDE)
    coloured = [
        (number, utterance, draw.choose_colour(number - 1) if utterance.box else None)
        for number, utterance in enumerate(sample.utterances, start=1)
    ]
    # From the whole to its parts: grey trace, coloured stretches, boxes.
    draw.draw_trace(photograph, [point[:2] for point in sample.narrative.points], draw.FAINT, 1)
    for _, utterance, colour in coloured:
        draw.draw_trace(photograph, [point[:2] for point in utterance.points], colour or draw.FAINT, 2)
    for number, utterance, colour in coloured:  # Boxes lie on top of all traces.
        if utterance.box is not None and colour is not None:
            draw.draw_box(photograph, utterance.box, colour, 3, label=str(number))
    entries = [(f"{n}  {utterance.text}{'' if colour else ' (no box)'}", colour) for n, utterance, colour in coloured]
    legend = draw.draw_legend(sample.identity, entries, _LEGEND_WIDTH)
    return draw.side_by_side([photograph, legend], _MARGIN, _MARGIN)
