"""Captions of held-out clips, with the right video and with another clip's: scores, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from llava import draw
from llava.data.media import sample_video
from llava.types import Media

if TYPE_CHECKING:
    from llava.serve.generate import Captioner

_LONGEST_CAPTION = 24
_BATCH_SIZE = 64
_FRAMES_SHOWN = 4
_HEADINGS = ("reference", "caption with the right video", "caption with another clip's video")


@dataclass(frozen=True)
class CaptionedClip:
    """A held-out clip with what the model says, and what it says when it sees ``other_video``."""

    video: str
    reference: str
    caption: str
    other_video: str
    other_caption: str

    @property
    def topic(self) -> str:
        """What is shown: "una stella gialla"."""
        return " ".join(self.reference.split()[:3])


@dataclass(frozen=True)
class Scores:
    """Shares of captions that equal the reference, word for word."""

    right_video: float
    other_video: float


def caption_clips(captioner: Captioner, data_file: Path) -> list[CaptionedClip]:
    """Caption every clip of a data file, with its own video and with another clip's."""
    samples = json.loads(data_file.read_text(encoding="utf-8"))
    videos = [str(data_file.parent / sample["video"]) for sample in samples]
    references = [sample["conversations"][-1]["value"] for sample in samples]
    # If captions are as good with another clip's video, the model does not look.
    other_videos = [videos[other] for other in choose_others(references)]
    # The same model and settings for both: only the pixels differ.
    captions, other_captions = (_describe(captioner, shown) for shown in (videos, other_videos))
    return [CaptionedClip(*row) for row in zip(videos, references, captions, other_videos, other_captions, strict=True)]


def _describe(captioner: Captioner, videos: Sequence[str]) -> list[str]:
    """What the model says about each video, without a prompt."""
    from llava.serve.generate import Request

    requests = [Request([Media("video", video)]) for video in videos]
    return captioner.generate(requests, batch_size=_BATCH_SIZE, max_new_tokens=_LONGEST_CAPTION)


def choose_others(references: Sequence[str]) -> list[int]:
    """For each clip the next one, in a circle, that is described otherwise."""
    others = []
    for index, reference in enumerate(references):
        # The next in a circle, so that every video is shown about as often.
        following = [*range(index + 1, len(references)), *range(index)]
        different = [other for other in following if references[other] != reference]
        if not different:
            raise ValueError("every held-out clip has the same caption; raise --num_held_out_clips")
        others.append(different[0])
    return others


def score(clips: Sequence[CaptionedClip]) -> Scores:
    """Exact match with the right and with another clip's video."""
    return Scores(
        right_video=sum(clip.caption == clip.reference for clip in clips) / len(clips),
        other_video=sum(clip.other_caption == clip.reference for clip in clips) / len(clips),
    )


def caption_table(clips: Sequence[CaptionedClip]) -> str:
    """Reference and captions in aligned columns; ``=`` marks a caption that equals the reference."""
    rows = [_HEADINGS] + [
        (
            clip.reference,
            *(f"{'=' if said == clip.reference else ' '} {said}" for said in (clip.caption, clip.other_caption)),
        )
        for clip in clips
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    # Below the headings.
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def score_lines(scores: Scores, num_clips: int) -> str:
    """The two figures of the demo."""
    return (
        f"exact match on {num_clips} held-out clips, whose pairs of shape and colour training never saw:\n"
        f"  with the right video          {scores.right_video:6.1%}\n"
        f"  with another clip's video     {scores.other_video:6.1%}"
    )


def draw_captions(clips: Sequence[CaptionedClip]) -> Image.Image:
    """Frames of clips, the reference below them, and what the model says: in green where it is right."""
    cards = [
        (
            [Image.fromarray(frame) for frame in sample_video(clip.video, _FRAMES_SHOWN).frames.numpy()],
            {"reference": clip.reference, "the model": clip.caption},
            clip.caption == clip.reference,
        )
        for clip in clips
    ]
    return draw.draw_captions(cards, "Clips whose shape and colour training never showed together")
