"""From ``<image>`` and ``<video>`` in the text to spans of visual tokens, and to sentences with the times of frames."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, TypeVar

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, ESCAPED_PLACEHOLDER, PLACEHOLDER
from llava.types import MediaKind, Turn, VisualInput

T = TypeVar("T")

PLACEHOLDERS: dict[str, MediaKind] = {DEFAULT_IMAGE_TOKEN: "image", DEFAULT_VIDEO_TOKEN: "video"}


def placeholder_kinds(text: str) -> list[MediaKind]:
    """The kinds of the media that a text has places for, in reading order."""
    return [PLACEHOLDERS[placeholder] for placeholder in PLACEHOLDER.findall(text)]


def literal_text(text: str) -> str:
    r"""A text as it reads: ``\<image>`` is the word ``<image>``, and no image."""
    return ESCAPED_PLACEHOLDER.sub(r"\1", text)


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
            return vision.layout.text("image", image_size=next(sizes))
        return vision.layout.text("video", next(frames))

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


# --add_time_instruction: the user's turn says how long its videos are and when their frames were taken.

SENTENCE = "{name} lasts {duration:.2f} seconds. Frames shown: {count}, at {times} seconds."
ONE_VIDEO, ONE_OF_SEVERAL = "The video", "Video {number}"
SEPARATOR = "\n"
"""Stands between the sentences and the turn's own text."""

_STAND_IN_SECONDS = 987.65
"""Length of a video that was not opened: as many digits as most have, and none that make a common token."""

Clip = tuple[float, tuple[float, ...]]
"""Seconds that a video lasts, and those of its frames from its first one."""


def clips_of(media: Iterable[VisualInput]) -> list[Clip]:
    """The clips that decoded media have, in order."""
    return [(medium.duration, medium.times) for medium in media if medium.kind == "video"]


def stand_in(num_frames: int) -> Clip:
    """A clip for a video that was not opened, whose sentence is about as long as its real one."""
    import numpy as np

    return _STAND_IN_SECONDS, tuple(np.linspace(0, _STAND_IN_SECONDS, num_frames).tolist())


def add_time_instruction(turns: Sequence[Turn], clips: Sequence[Clip]) -> list[Turn]:
    """Put the sentences of the videos that a turn shows before its text.

    Args:
        turns: with placeholders, in reading order.
        clips: one for each video, in the order of the placeholders.

    Raises:
        ValueError: the assistant shows a video, or the times of one are not known.
    """
    waiting = iter(clips)
    written = []
    for turn in turns:
        shown = [next(waiting) for _ in range(placeholder_kinds(turn.text).count("video"))]
        if shown and turn.role == "assistant":
            raise ValueError(
                f"a turn of the assistant has {DEFAULT_VIDEO_TOKEN}, where --add_time_instruction would be learned; "
                "move it to the user's"
            )
        written.append(replace(turn, text=SEPARATOR.join([*_sentences(shown), turn.text])))
    return written


def _sentences(clips: Sequence[Clip]) -> list[str]:
    """A sentence for each video of a turn."""
    sentences = []
    for number, (duration, times) in enumerate(clips, start=1):
        if not times:
            raise ValueError("the times of a video's frames are not known, which --add_time_instruction tells")
        name = ONE_VIDEO if len(clips) == 1 else ONE_OF_SEVERAL.format(number=number)
        listed = ", ".join(f"{time:.2f}" for time in times)
        sentences.append(SENTENCE.format(name=name, duration=duration, count=len(times), times=listed))
    return sentences
