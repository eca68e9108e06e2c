"""From ``<image>`` and ``<video>`` in the text to spans of visual tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.types import MediaKind, Turn

_PLACEHOLDER = re.compile(f"{DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN}")
_KINDS: dict[str, MediaKind] = {DEFAULT_IMAGE_TOKEN: "image", DEFAULT_VIDEO_TOKEN: "video"}


def placeholder_kinds(text: str) -> list[MediaKind]:
    """The kinds of the media that a text has places for, in reading order."""
    return [_KINDS[placeholder] for placeholder in _PLACEHOLDER.findall(text)]


def split_at_placeholders(text: str) -> list[str]:
    """The pieces of text before, between and behind the placeholders: one more than there are of these."""
    return _PLACEHOLDER.split(text)


def expand_text(text: str, vision: VisionConfig, frame_counts: Sequence[int] | None = None) -> str:
    """Replace each placeholder by the tokens of its span (two spans for a resampled video).

    Args:
        text: may hold any number of placeholders.
        vision: gives the counts.
        frame_counts: frames of each video of the text, in order; by default the most that are sampled.

    Raises:
        ValueError: there are more or fewer frame counts than videos.
    """
    num_videos = text.count(DEFAULT_VIDEO_TOKEN)
    if frame_counts is None:
        frame_counts = [vision.max_frames] * num_videos
    if len(frame_counts) != num_videos:
        raise ValueError(f"the text has {num_videos} {DEFAULT_VIDEO_TOKEN}, but {len(frame_counts)} videos were given")
    counts = iter(frame_counts)

    def expand(match: re.Match[str]) -> str:
        kind = _KINDS[match.group()]
        spans = vision.spans(kind) if kind == "image" else vision.spans(kind, next(counts))
        return "".join(span.text for span in spans)

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
    expanded, seen = [], 0
    for turn in turns:
        if not _PLACEHOLDER.search(turn.text):
            expanded.append(turn)
            continue
        if vision is None:
            raise ValueError("the text speaks of an image or a video, but the model has no vision; give --vision_tower")
        first, seen = seen, seen + turn.text.count(DEFAULT_VIDEO_TOKEN)
        counts = None if frame_counts is None else frame_counts[first:seen]
        expanded.append(Turn(turn.role, expand_text(turn.text, vision, counts)))
    return expanded


def preprocess_multimodal(sources: list[list[dict[str, Any]]], vision: VisionConfig) -> list[list[dict[str, Any]]]:
    """Expand the placeholders of raw conversations, for ``preprocess_plain_lm``.

    Args:
        sources: conversations of ``{"from", "value"}`` or ``{"role", "content"}`` turns; not changed.
        vision: gives the counts.
    """

    def expand(turn: dict[str, Any]) -> dict[str, Any]:
        key = "value" if "value" in turn else "content"
        return {**turn, key: expand_text(turn[key], vision)}

    return [[expand(turn) for turn in source] for source in sources]
