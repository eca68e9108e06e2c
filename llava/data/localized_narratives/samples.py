"""A narrative's samples: its text, its text with the image, its text with the image and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.coordinates import box_text
from llava.data.localized_narratives.grounding import GroundedUtterance
from llava.data.localized_narratives.rows import Narrative
from llava.types import Coordinates

TEXT, IMAGE, GROUNDED = "t", "ti", "tim"
"""What is behind the names of the three files."""


@dataclass(frozen=True)
class NarrativeSample:
    """What the samples of a narrative are made of.

    Attributes:
        identity: the id that they share.
        narrative: whose they are.
        image: the file of the image, None for text alone in all three files.
        utterances: in the order of the caption; none without an image.
    """

    identity: str
    narrative: Narrative
    image: str | None = None
    utterances: Sequence[GroundedUtterance] = ()

    def build(self) -> dict[str, dict[str, Any]]:
        """The sample of each of the three files, in the format of ``docs/data.md``."""
        caption = self.narrative.caption
        text = _build_sample(self.identity, caption, None)
        if self.image is None:
            return {TEXT: text, IMAGE: text, GROUNDED: text}
        grounded = _build_sample(self.identity, insert_boxes(caption, self.utterances), self.image)
        grounded["variables"] = collect_coordinates(self.utterances).to_variables()
        return {TEXT: text, IMAGE: _build_sample(self.identity, caption, self.image), GROUNDED: grounded}


def _build_sample(identity: str, caption: str, image: str | None) -> dict[str, Any]:
    question = "" if image is None else DEFAULT_IMAGE_TOKEN
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": identity, **({"image": image} if image is not None else {}), "conversations": turns}


def insert_boxes(caption: str, utterances: Sequence[GroundedUtterance]) -> str:
    """The caption with the placeholders of a box, after a space, behind every utterance that has one."""
    pieces, start = [], 0
    for utterance in utterances:
        if utterance.box is not None:
            pieces.append(f"{caption[start : utterance.end]} {box_text()}")
            start = utterance.end
    return "".join([*pieces, caption[start:]])


def collect_coordinates(utterances: Sequence[GroundedUtterance]) -> Coordinates:
    """The numbers of the boxes, in the order in which ``insert_boxes`` puts their placeholders."""
    boxes = [utterance.box for utterance in utterances if utterance.box is not None]
    return Coordinates(
        spatial_height_output_locations=tuple(edge for box in boxes for edge in (box.y1, box.y2)),
        spatial_width_output_locations=tuple(edge for box in boxes for edge in (box.x1, box.x2)),
    )
