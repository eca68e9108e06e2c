"""From ``<image>`` and ``<video>`` in the text to spans of visual tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, TypeVar

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, PLACEHOLDER
from llava.types import MediaKind, Turn

T = TypeVar("T")

PLACEHOLDERS: dict[str, MediaKind] = {DEFAULT_IMAGE_TOKEN: "image", DEFAULT_VIDEO_TOKEN: "video"}
_ESCAPED = re.compile(rf"\\({'|'.join(PLACEHOLDERS)})")


def placeholder_kinds(text: str) -> list[MediaKind]:
    """The kinds of the media that a text has places for, in reading order."""
    return [PLACEHOLDERS[placeholder] for placeholder in PLACEHOLDER.findall(text)]


def split_at_placeholders(text: str, keep: bool = False) -> list[str]:
    """The pieces of text before, between and behind the placeholders: one more than there are of these.

    Args:
        text: with placeholders.
        keep: whether the placeholders stand between the pieces.
    """
    return re.split(f"({PLACEHOLDER.pattern})", text) if keep else PLACEHOLDER.split(text)


def literal_text(text: str) -> str:
    r"""A text without media as it reads: ``\<image>`` is the word ``<image>``, and no medium."""
    return _ESCAPED.sub(r"\1", text) if "\\<" in text else text


def remove_placeholders(text: str) -> str:
    """What is left of a text where its media are taken out, as it reads."""
    return literal_text(PLACEHOLDER.sub("", text))


def expand_text(
    text: str,
    vision: VisionConfig,
    frame_counts: Sequence[int] | None = None,
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> str:
    """Replace each placeholder by the tokens of its span (two spans for a resampled video).

    Args:
        text: may hold any number of placeholders.
        vision: gives the counts.
        frame_counts: frames of each video of the text, in order; by default the most that are sampled.
        image_sizes: original (height, width) of each image of the text, in order; needed for anyres alone.

    Raises:
        ValueError: there are more or fewer frame counts than videos or sizes than images, or an anyres
            image comes without its size.
    """
    return _expand([text], vision, frame_counts, image_sizes)[0]


def expand_placeholders(
    turns: Sequence[Turn],
    vision: VisionConfig | None,
    frame_counts: Sequence[int] | None = None,
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Turn]:
    """``expand_text`` for the turns of a conversation.

    Args:
        turns: in reading order.
        vision: None for a model without vision, which a placeholder is an error for.
        frame_counts: frames of each video of the conversation, in reading order.
        image_sizes: original (height, width) of each image of the conversation, in reading order.
    """
    texts = [turn.text for turn in turns]
    if vision is None:
        if any(map(placeholder_kinds, texts)):
            raise ValueError("the text speaks of an image or a video, but the model has no vision; give --vision_tower")
        return list(turns)
    expanded = _expand(texts, vision, frame_counts, image_sizes)
    return [Turn(turn.role, text) for turn, text in zip(turns, expanded, strict=True)]


def preprocess_multimodal(
    sources: list[list[dict[str, Any]]],
    vision: VisionConfig,
    image_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[list[dict[str, Any]]]:
    """Expand the placeholders of raw conversations, for ``preprocess_plain_lm``.

    Args:
        sources: conversations of ``{"from", "value"}`` or ``{"role", "content"}`` turns; not changed.
        vision: gives the counts.
        image_sizes: for each conversation the original (height, width) of its images, in reading order;
            needed for anyres alone.
    """
    sizes = [None] * len(sources) if image_sizes is None else image_sizes
    if len(sizes) != len(sources):
        raise ValueError(f"{len(sources)} conversations came with image sizes for {len(sizes)}; pass a list for each")
    expanded = []
    for source, of_source in zip(sources, sizes, strict=True):
        keys = ["value" if "value" in turn else "content" for turn in source]
        texts = _expand([turn[key] for turn, key in zip(source, keys, strict=True)], vision, None, of_source)
        expanded.append([{**turn, key: text} for turn, key, text in zip(source, keys, texts, strict=True)])
    return expanded


def _expand(
    texts: Sequence[str],
    vision: VisionConfig,
    frame_counts: Sequence[int] | None,
    image_sizes: Sequence[tuple[int, int]] | None,
) -> list[str]:
    """``expand_text`` for texts that follow one another."""
    frames = _one_for_each(DEFAULT_VIDEO_TOKEN, texts, frame_counts, vision.max_frames)
    sizes = _one_for_each(DEFAULT_IMAGE_TOKEN, texts, image_sizes, None)

    def expand(match: re.Match[str]) -> str:
        if PLACEHOLDERS[match.group()] == "image":
            spans = vision.spans("image", image_size=next(sizes))
        else:
            spans = vision.spans("video", next(frames))
        return "".join(span.text for span in spans)

    return [PLACEHOLDER.sub(expand, text) for text in texts]


def _one_for_each(placeholder: str, texts: Sequence[str], given: Sequence[T] | None, default: T) -> Iterator[T]:
    """What was given for the placeholders of one kind, in order; a ValueError if it is more or less than one each."""
    found = sum(placeholder_kinds(text).count(PLACEHOLDERS[placeholder]) for text in texts)
    if given is None:
        return repeat(default, found)
    if len(given) != found:
        raise ValueError(
            f"the text has {found} {placeholder}, but {len(given)} {PLACEHOLDERS[placeholder]}s were given"
        )
    return iter(given)
