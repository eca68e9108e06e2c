"""``--add_time_instruction``: the user's turn says how long its videos are and when their frames were taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from llava.constants import DEFAULT_VIDEO_TOKEN
from llava.data.formats.base import Format
from llava.data.placeholders import placeholder_kinds
from llava.types import Turn, VisualInput

SENTENCE = "{name} lasts {duration:.2f} seconds. Frames shown: {count}, at {times} seconds."
ONE_VIDEO, ONE_OF_SEVERAL = "The video", "Video {number}"
SEPARATOR = "\n"
"""Stands between the sentences and the turn's own text."""

_STAND_IN_SECONDS = 987.65
"""Length of a video that was not opened: as many digits as most have, and none that make a common token."""

Clip = tuple[float, tuple[float, ...]]
"""Seconds that a video lasts, and those of its frames from its first one."""


def check_format(text_format: Format) -> None:
    """A ValueError if what is put into a user's turn would be learned, or left out."""
    if not (text_format.has_prompts and text_format.writes_user_text):
        raise ValueError(
            "--add_time_instruction tells the times of frames in the user's turns, but this format "
            f"{'leaves their text out' if text_format.has_prompts else 'learns all text'}; give a --version that "
            "writes and does not learn them (chat, qwen, v1, ...)"
        )


def clips_of(media: Iterable[VisualInput]) -> list[Clip]:
    """The clips that decoded media have, in order."""
    return [(medium.duration, medium.times) for medium in media if medium.kind == "video"]


def stand_in(num_frames: int) -> Clip:
    """A clip for a video that was not opened, whose sentence is about as long as its real one."""
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
