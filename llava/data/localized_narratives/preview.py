"""Pictures of some samples, to judge their boxes by eye: image, trace, boxes and what was said."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava import draw
from llava.data.localized_narratives.samples import NarrativeSample
from llava.data.media_files import DEFAULT_LIMITS, MediaError, MediaLimits

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
        """The picture of a sample with an image: image, traces and boxes on the left, what was said on the right.

        The whole trace is grey, the part of each utterance with a box has a colour of its own, and so has its box.

        Raises:
            MediaError: the image cannot be decoded.
        """
        from PIL import Image

        from llava.data.media import load_image

        assert sample.image is not None
        photograph = Image.fromarray(load_image(str(self.images / sample.image), self.limits).numpy())
        photograph = draw.fit(photograph, _PICTURE_SIDE, _PICTURE_SIDE)
        utterances = sample.utterances
        colours = [draw.choose_colour(i) if utterance.box else None for i, utterance in enumerate(utterances)]
        draw.draw_trace(photograph, [point[:2] for point in sample.narrative.points], draw.FAINT, 1)
        for utterance, colour in zip(utterances, colours, strict=True):
            draw.draw_trace(photograph, [point[:2] for point in utterance.points], colour or draw.FAINT, 2)
        for number, (utterance, colour) in enumerate(zip(utterances, colours, strict=True), start=1):
            if utterance.box is not None and colour is not None:
                draw.draw_box(photograph, utterance.box, colour, 3, label=str(number))
        entries = [
            (f"{number}  {utterance.text}{'' if utterance.box else ' (no box)'}", colour)
            for number, (utterance, colour) in enumerate(zip(utterances, colours, strict=True), start=1)
        ]
        legend = draw.draw_legend(sample.identity, entries, _LEGEND_WIDTH)
        return draw.side_by_side([photograph, legend], _MARGIN, _MARGIN)
