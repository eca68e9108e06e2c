"""Words that samples present to a model, as the word budgets of BabyLM count them.

A word is what white space separates in the turns of a sample, without placeholders of media and coordinates. What a
format or ``--add_time_instruction`` writes around turns is no text of the data and does not count; nor do the words of
turns that a format leaves out. Of a text that is cut, by the context or into chunks, a word belongs to the part that
has its first token; so the chunks of a text have as many words together as the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llava.constants import IGNORE_INDEX, PLACEHOLDER
from llava.grounding.syntax import COORDINATE_PLACEHOLDER
from llava.types import Exposure, Record, Turn, VisualInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llava.data.formats.base import Format, Segment

_PLACES = re.compile(rf"\[(?:{COORDINATE_PLACEHOLDER.pattern})+\]|\{{(?:{COORDINATE_PLACEHOLDER.pattern})+\}}")
"""A box or a span of time: its brackets are no word either."""


def count_words(text: str) -> int:
    """The words of a text, which white space separates, without its placeholders."""
    return _count(PLACEHOLDER.sub(" ", text) if "<" in text else text)


def _count(text: str) -> int:
    if "<" in text:
        text = COORDINATE_PLACEHOLDER.sub("", _PLACES.sub("", text))
    return len(text.split())


def words_of_turns(text_format: Format, turns: Sequence[Turn]) -> list[int]:
    """The words of each turn that a format writes."""
    return [count_words(text_format.content(turn)) for turn in turns]


def count_answers(words: Sequence[int], turns: Sequence[Turn], kept: int | None = None) -> int:
    """How many of a conversation's first ``kept`` words (by default of all) are the assistant's.

    Args:
        words: of each turn.
        turns: in reading order.
        kept: words from the beginning on.
    """
    left = sum(words) if kept is None else kept
    answers = 0
    for number, turn in zip(words, turns, strict=True):
        taken = min(number, left)
        left -= taken
        answers += taken if turn.role == "assistant" else 0
    return answers


def count_begun(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | NDArray[np.int32], start: int = 0) -> int:
    """The words of a text of tokens whose first token is at ``start`` or behind it."""
    # One token more is decoded, so that the end of a word that has begun before is not taken for a word.
    before = max(start - 1, 0)
    begun = _count(_decode(tokenizer, ids[before:]))
    # Half a character reads as a word, and as none once the other half is there, where it is white space.
    return max(begun - (_count(_decode(tokenizer, ids[before:start])) if start else 0), 0)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | NDArray[np.int32]) -> str:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(list(ids), **options)) if len(ids) else ""


def count_kept_words(
    text_format: Format, turns: Sequence[Turn], written: Sequence[Turn], segments: Sequence[Segment]
) -> int:
    """How many of a sample's words have begun in what is left of its text.

    Args:
        text_format: of the segments.
        turns: of the sample.
        written: the same turns with what was written before the text of some, see ``add_time_instruction``.
        segments: what is left.
    """
    left = sum(count_begun(text_format.tokenizer, segment.ids) for segment in segments if segment.is_content)
    kept = 0
    for own, all_words in zip(
        words_of_turns(text_format, turns), words_of_turns(text_format, written), strict=True
    ):  # What was added stands before a turn's own words.
        left = max(left - (all_words - own), 0)
        kept += min(own, left)
        left = max(left - own, 0)
    return kept


# What a sample presents, as numbers.


def expose(
    text_format: Format, record: Record, labels: Sequence[int], media: Sequence[VisualInput] = (), source: int = 0
) -> Exposure:
    """What a sample presents whose text is whole.

    Args:
        text_format: that wrote it.
        record: the sample.
        labels: of its positions.
        media: decoded; without them, clips count 0 seconds.
        source: the number of its data file.
    """
    words = words_of_turns(text_format, record.turns)
    kinds = [item.kind for item in record.media]
    # A part of a clip lasts from the first to the last of its frames.
    clips = [item for item in media if item.kind == "video"]
    seconds = [clip.duration if record.split is None else clip.times[-1] - clip.times[0] for clip in clips]
    return Exposure(
        source=source,
        words=sum(words),
        answer_words=count_answers(words, record.turns),
        tokens=len(labels),
        # The first label is predicted by nothing.
        supervised_tokens=len(labels) - 1 - labels[1:].count(IGNORE_INDEX) if labels else 0,
        images=kinds.count("image"),
        videos=kinds.count("video"),
        # In whole milliseconds, of each clip: their sum is the same in any order, on any number of ranks.
        video_ms=sum(round(1000 * length) for length in seconds),
    )


def cut_exposure(whole: Exposure, text_format: Format, turns: Sequence[Turn], kept: int, num_cut: int) -> Exposure:
    """What a sample presents of which the first ``kept`` words are left, and ``num_cut`` tokens are not."""
    words = words_of_turns(text_format, turns)
    return replace(
        whole,
        words=kept,
        answer_words=count_answers(words, turns, kept),
        cut_samples=1,
        cut_words=sum(words) - kept,
        cut_tokens=num_cut,
    )


def expose_chunk(whole: Exposure, text_format: Format, record: Record, begun: int, behind: int) -> Exposure:
    """What a chunk of a text presents in which its words from number ``begun`` to before ``behind`` begin."""
    words = words_of_turns(text_format, record.turns)
    answers = [count_answers(words, record.turns, number) for number in (begun, behind)]
    return replace(whole, words=behind - begun, answer_words=answers[1] - answers[0])
