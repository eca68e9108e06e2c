"""From ``<image>`` and ``<video>`` in the text to spans of visual tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.types import MediaKind, Turn

_PLACEHOLDER = re.compile(f"({DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN})")
_KINDS: dict[str, MediaKind] = {DEFAULT_IMAGE_TOKEN: "image", DEFAULT_VIDEO_TOKEN: "video"}


def placeholder_kinds(text: str) -> list[MediaKind]:
    """The kinds of the media that a text has places for, in reading order."""
    return [_KINDS[placeholder] for placeholder in _PLACEHOLDER.findall(text)]


def expand_text(text: str, vision: VisionConfig, frame_counts: Sequence[int] | None = None) -> str:
    """Replace each placeholder by the tokens of its span (two spans for a resampled video).

    Args:
        text: may hold any number of placeholders.
        vision: gives the counts.
        frame_counts: frames of each video of the text, in order; by default ``vision.num_frames`` each.
    """
    counts = iter(frame_counts if frame_counts is not None else [])

    def expand(match: re.Match[str]) -> str:
        kind = _KINDS[match.group()]
        frames = 1 if kind == "image" else next(counts, vision.num_frames)
        return "".join(span.text for span in vision.spans(kind, frames))

    return _PLACEHOLDER.sub(expand, text)


def expand_placeholders(
    turns: Sequence[Turn], vision: VisionConfig | None, frame_counts: Sequence[int] | None = None
) -> list[Turn]:
    """``expand_text`` for the turns of a conversation.

    Args:
        turns: in reading order.
        vision: None for a model without vision, which a placeholder is an error for.
        frame_counts: frames of each video of the conversation, in reading order.
    """
    counts = list(frame_counts or [])
    expanded = []
    for turn in turns:
        if not _PLACEHOLDER.search(turn.text):
            expanded.append(turn)
            continue
        if vision is None:
            raise ValueError("the text speaks of an image or a video, but the model has no vision; give --vision_tower")
        videos = turn.text.count(DEFAULT_VIDEO_TOKEN)
        expanded.append(Turn(turn.role, expand_text(turn.text, vision, counts[:videos] or None)))
        counts = counts[videos:]
    return expanded


def preprocess_multimodal(sources: list[list[dict[str, Any]]], vision: VisionConfig) -> list[list[dict[str, Any]]]:
    """Expand the placeholders of raw conversations, for ``preprocess_plain_lm``.

    Args:
        sources: conversations of ``{"from", "value"}`` turns; they are not changed.
        vision: gives the counts.
    """
    return [[{**turn, "value": expand_text(turn["value"], vision)} for turn in source] for source in sources]
