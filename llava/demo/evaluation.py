"""Captions of held-out clips, with the right video and with another clip's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.types import Media

if TYPE_CHECKING:
    from llava.serve.generate import Captioner

_LONGEST_CAPTION = 24
_BATCH_SIZE = 64


@dataclass(frozen=True)
class CaptionedClip:
    """A held-out clip with what the model says, and what it says when it sees `other_video`."""

    video: str
    reference: str
    caption: str
    other_video: str
    other_caption: str


@dataclass(frozen=True)
class Scores:
    """Shares of captions that equal the reference, word for word."""

    right_video: float
    other_video: float


def caption_clips(captioner: Captioner, data_file: Path) -> list[CaptionedClip]:
    """Caption every clip of a data file, with its own video and with another clip's."""
    records = json.loads(data_file.read_text(encoding="utf-8"))
    videos = [str(data_file.parent / record["video"]) for record in records]
    references = [record["conversations"][-1]["value"] for record in records]
    other_videos = [videos[other] for other in choose_others(references)]
    columns = zip(
        videos,
        references,
        generate_captions(captioner, videos),
        other_videos,
        generate_captions(captioner, other_videos),
        strict=True,
    )
    return [CaptionedClip(*row) for row in columns]


def generate_captions(captioner: Captioner, videos: Sequence[str]) -> list[str]:
    """What the model says about each video, without a prompt."""
    from llava.serve.generate import Request

    requests = [Request([Media("video", video)]) for video in videos]
    return captioner.generate(requests, batch_size=_BATCH_SIZE, max_new_tokens=_LONGEST_CAPTION)


def choose_others(references: Sequence[str]) -> list[int]:
    """For each clip the next one, in a circle, that is described otherwise."""
    others = []
    for index, reference in enumerate(references):
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


def choose_examples(clips: Sequence[CaptionedClip], num_examples: int) -> list[CaptionedClip]:
    """The first clip of each thing that is shown ("una stella gialla"), then the second of each.

    What the model said plays no part in the choice.
    """
    seen: Counter[str] = Counter()
    ranks = []
    for clip in clips:
        thing = " ".join(clip.reference.split()[:3])
        ranks.append(seen[thing])
        seen[thing] += 1
    order = sorted(range(len(clips)), key=ranks.__getitem__)
    return [clips[index] for index in order[:num_examples]]


def write_captions(path: Path, clips: Sequence[CaptionedClip], seconds: dict[str, float]) -> None:
    """Write scores, times and every caption as JSON."""
    content = {
        "exact_match": asdict(score(clips)),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "clips": [asdict(clip) for clip in clips],
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
