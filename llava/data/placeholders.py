"""From ``<image>`` and ``<video>`` in the text to spans of visual tokens, and to sentences with the times of frames."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TypeVar

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, ESCAPED_PLACEHOLDER, PLACEHOLDER, VISUAL_TOKEN
from llava.types import Media, MediaKind, Turn, VisualInput

_MOST_TOKENS = 1 << 20

T = TypeVar("T")
Shown = TypeVar("Shown", Media, VisualInput)

PLACEHOLDERS: dict[str, MediaKind] = {DEFAULT_IMAGE_TOKEN: "image", DEFAULT_VIDEO_TOKEN: "video"}


def placeholder_kinds(text: str) -> list[MediaKind]:
    """The kinds of the images and videos that a text shows, in reading order."""
    return [PLACEHOLDERS[placeholder] for placeholder in PLACEHOLDER.findall(text)] if "<" in text else []


def literal_text(text: str) -> str:
    r"""A text as it reads: ``\<image>`` is the word ``<image>``, and no image."""
    return ESCAPED_PLACEHOLDER.sub(r"\1", text)


def escape_placeholders(text: str) -> str:
    r"""What ``literal_text`` reads as this text: somebody's ``<image>`` becomes ``\<image>``, which shows nothing.

    Raises:
        ValueError: it has visual tokens, which nothing but media may put into a prompt.
    """
    if reserved := VISUAL_TOKEN.search(text):
        raise ValueError(f"the text has {reserved.group()!r}, which only images and videos are made of; leave it out")
    return PLACEHOLDER.sub(lambda match: "\\" + match.group(), text)


def remove_placeholders(text: str) -> str:
    """A text without its placeholders, as it reads."""
    return literal_text(PLACEHOLDER.sub("", text))


def in_reading_order(media: Sequence[Shown], texts: Iterable[str]) -> list[Shown]:
    """Media of both kinds in the order of their placeholders in texts; those of one kind are in order already."""
    waiting = {kind: iter([medium for medium in media if medium.kind == kind]) for kind in PLACEHOLDERS.values()}
    return [next(waiting[kind]) for text in texts for kind in placeholder_kinds(text)]


def expand_placeholders(
    turns: Sequence[Turn],
    vision: VisionConfig | None,
    frame_counts: Sequence[int] | None = None,
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Turn]:
    """Replace each placeholder by the tokens of its span, or of its two for a video with a fast and a slow one.

    Args:
        turns: of a conversation, in reading order, with any number of placeholders.
        vision: says how many tokens; None for a model without vision, for which a placeholder is an error.
        frame_counts: frames of each video, in reading order; by default the most that are sampled.
        image_sizes: original (height, width) of each image, in reading order; needed for anyres alone.

    Raises:
        ValueError: there are more or fewer frame counts than videos or sizes than images, or an anyres
            image comes without its size.
    """
    shown = [kind for turn in turns for kind in placeholder_kinds(turn.text)]
    if vision is None:
        if shown:
            raise ValueError("the text speaks of an image or a video, but the model has no vision; give --vision_tower")
        return list(turns)
    layout = vision.layout
    frames = _one_for_each(DEFAULT_VIDEO_TOKEN, shown, frame_counts, vision.max_frames)
    # Both are used up from left to right as placeholders are met, over all turns.
    sizes = _one_for_each(DEFAULT_IMAGE_TOKEN, shown, image_sizes, None)

    written = 0

    def write_spans(match: re.Match[str]) -> str:
        nonlocal written
        is_image = match.group() == DEFAULT_IMAGE_TOKEN
        spans = layout.spans("image", image_size=next(sizes)) if is_image else layout.spans("video", next(frames))
        written += sum(span.length for span in spans)
        if written > _MOST_TOKENS:  # Before they are written, which would take gigabytes.
            raise ValueError(f"its images and videos take more than {_MOST_TOKENS:,} tokens, which no context holds")
        return "".join(span.text for span in spans)

    return [Turn(turn.role, PLACEHOLDER.sub(write_spans, turn.text)) for turn in turns]


def _one_for_each(placeholder: str, shown: Sequence[MediaKind], given: Sequence[T] | None, default: T) -> Iterator[T]:
    """What was given for the placeholders of one kind, in order; a ValueError if it is more or less than one each."""
    kind = PLACEHOLDERS[placeholder]
    found = shown.count(kind)
    # Lengths are counted before any video is opened: then each has the most frames.
    if given is None:
        return repeat(default, found)
    if len(given) != found:
        raise ValueError(f"the text has {found} {placeholder}, but {len(given)} {kind}s were given")
    return iter(given)


def preprocess_multimodal(
    sources: Sequence[Sequence[Mapping[str, str]]],
    vision: VisionConfig,
    image_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[list[dict[str, str]]]:
    """Expand the placeholders of raw conversations, for ``preprocess_plain_lm``.

    Args:
        sources: conversations of ``{"from", "value"}`` or ``{"role", "content"}`` turns; not changed.
        vision: says how many tokens.
        image_sizes: for each conversation the original (height, width) of its images, in reading order;
            needed for anyres alone.
    """
    sizes = [None] * len(sources) if image_sizes is None else image_sizes
    if len(sizes) != len(sources):
        raise ValueError(f"{len(sources)} conversations came with image sizes for {len(sizes)}; pass a list for each")
    expanded = []
    for source, of_source in zip(sources, sizes, strict=True):
        # Both spellings of the field; each turn keeps its own.
        keys = ["value" if "value" in turn else "content" for turn in source]
        turns = [Turn("user", turn[key]) for turn, key in zip(source, keys, strict=True)]
        written = expand_placeholders(turns, vision, image_sizes=of_source)  # Roles are not looked at.
        expanded.append([{**raw, key: turn.text} for raw, key, turn in zip(source, keys, written, strict=True)])
    return expanded


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
    return [(item.duration, item.times) for item in media if item.kind == "video"]


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
    waiting = iter(clips)  # Turns take the clips that they show, in reading order.
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
        # Two digits, as LLaVA-NeXT writes times: a hundredth of a second is less than a frame.
        name = ONE_VIDEO if len(clips) == 1 else ONE_OF_SEVERAL.format(number=number)
        listed = ", ".join(f"{time:.2f}" for time in times)
        sentences.append(SENTENCE.format(name=name, duration=duration, count=len(times), times=listed))
    return sentences
