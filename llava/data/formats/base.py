"""What a preprocessing format is and makes, the table of all formats, and the plainest of them, ``plain_lm``."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from llava.constants import (
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
    ESCAPED_PLACEHOLDER,
    IGNORE_INDEX,
    PLACEHOLDER,
    VISUAL_TOKEN,
)
from llava.registry import Registry
from llava.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_LM = "plain_lm"
CHAT = "chat"
_VISUAL_RUN = re.compile(f"((?:{VISUAL_TOKEN.pattern}|{PLACEHOLDER.pattern})+)")


class ContextError(ValueError):
    """A sample that does not fit the context however much of its text is cut."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a sample: its token ids, whether they are a visual span, whether they are supervised.

    A visual span is never learned, whatever ``supervised`` says. Markup is what a format writes around the text.
    """

    ids: list[int]
    visual: bool = False
    supervised: bool = True
    markup: bool = False

    @property
    def learned(self) -> bool:
        return self.supervised and not self.visual

    @property
    def is_content(self) -> bool:
        """Whether it is text of the data."""
        return not self.visual and not self.markup


class Format(ABC):
    """A way to write conversations as tokens.

    Args:
        tokenizer: of the model; knows the visual tokens if there is vision.
    """

    media_separator: ClassVar[str] = "\n"
    """What stands between media and the words of a user who shows them."""

    has_prompts: ClassVar[bool] = True
    """Whether there is text that is given and not learned."""

    writes_user_text: bool = True
    """Whether the words of user turns are written, and not only their media."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prefix_ids = prefix_ids(tokenizer)
        # Another one for a format that writes conversations otherwise; the tokenizer aside.
        self.fingerprint = f"{type(self).__module__}.{type(self).__qualname__}"

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.tokenizer.eos_token_id]

    @abstractmethod
    def check(self, turns: Sequence[Turn]) -> None:
        """A ValueError if this format cannot write a conversation of these roles."""

    @abstractmethod
    def has_target(self, turns: Sequence[Turn]) -> bool:
        """Whether there is anything in a conversation that this format supervises, but for its end, in every answer.

        Raises:
            ValueError: as ``check``.
        """

    @abstractmethod
    def encode(self, turns: Sequence[Turn]) -> list[Segment]:
        """A whole sample, placeholders expanded; its last token is the end of text, supervised."""

    def encode_sample(self, turns: Sequence[Turn], max_length: int) -> tuple[list[Segment], int]:
        """A whole sample, its text cut to a length, and how many tokens were cut."""
        segments = self.encode(turns)
        # Counted before the cut: the report says how much text was lost.
        num_cut = max(sum(len(segment.ids) for segment in segments) - max_length, 0)
        return truncate_segments(segments, max_length), num_cut

    def content(self, turn: Turn) -> str:
        """What is written of a turn's text."""
        return turn.text.strip()

    def encode_all(self, conversations: Sequence[Sequence[Turn]]) -> list[list[int]]:
        """The ids that ``encode`` makes of each conversation."""
        return [[i for segment in self.encode(turns) for i in segment.ids] for turns in conversations]

    @abstractmethod
    def encode_prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        """A conversation up to where the assistant's next answer begins, as ``encode`` would write it."""

    @abstractmethod
    def count_tokens(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        """How many tokens ``encode`` makes of each conversation, its media (placeholders here) left out."""


FORMATS: Registry[Callable[[PreTrainedTokenizerBase], Format]] = Registry("--version (preprocessing format)")
"""Formats by name; each is called with the tokenizer."""


def build_format(name: str, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The format of a name for a tokenizer.

    Raises:
        ValueError: an unknown name, or a tokenizer that lacks what the format needs.
    """
    return FORMATS.get(name)(tokenizer)


def label_segments(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Ids of the segments in a row, and labels that are -100 wherever nothing is learned."""
    ids = [i for segment in segments for i in segment.ids]
    # Where a label becomes -100: prompts and visual spans. The model shifts labels, so each stands at its own id.
    labels = [i if segment.learned else IGNORE_INDEX for segment in segments for i in segment.ids]
    return ids, labels


def encode_answer(text_format: Format, turns: Sequence[Turn], answer: str) -> tuple[list[int], list[int]]:
    """The ids of a conversation up to an answer, and those of the answer without what ends it.

    Args:
        text_format: that has prompts.
        turns: placeholders expanded; the last one is not the assistant's.
        answer: what is then said.
    """
    segments = text_format.encode([*turns, Turn("assistant", answer)])
    # An answer is ended by markup: by an end of text alone, or by that of its turn and one more.
    while segments and segments[-1].markup:
        segments.pop()
    ids = [i for segment in segments for i in segment.ids]
    given = [i for segment in text_format.encode_prompt(turns) for i in segment.ids]
    return given, ids[len(given) :]


def truncate_segments(segments: list[Segment], max_length: int) -> list[Segment]:
    """Cut text, from the end, until all fits; spans stay whole and the last token stays last.

    Raises:
        ContextError: what must stay is more than ``max_length``: the spans, the text up to the first
            supervised token, and the end of text.
    """
    total = sum(len(segment.ids) for segment in segments)
    if total <= max_length:
        return segments
    # Every sample ends with the end of text, one that is cut too.
    end = replace(segments[-1], ids=segments[-1].ids[-1:])
    rest = [*segments[:-1], replace(segments[-1], ids=segments[-1].ids[:-1])]
    # Half a span would be features without a place, and a prompt without an answer teaches nothing.
    visual = sum(len(segment.ids) for segment in rest if segment.visual)
    prompt, target = _text_to_first_target(rest)
    needed = visual + prompt + target + 1
    if needed > max_length:
        before = f", {prompt} of the prompt" if prompt else ""
        raise ContextError(
            f"it needs at least {needed} tokens ({visual} of them visual{before}), but the limit is {max_length}"
        )
    excess = total - max_length
    kept: list[Segment] = []
    for segment in reversed(rest):  # From the end: what a cut text begins with is still its beginning.
        cut = 0 if segment.visual else min(excess, len(segment.ids))
        excess -= cut
        if len(segment.ids) > cut:
            kept.append(replace(segment, ids=segment.ids[: len(segment.ids) - cut]))
    return [*reversed(kept), end]


def _text_to_first_target(segments: Sequence[Segment]) -> tuple[int, int]:
    """Text tokens before the first supervised one, and 1 for that one; (0, 0) if there is none."""
    prompt = 0
    for segment in segments:
        if segment.learned and segment.ids:
            return prompt, 1
        prompt += 0 if segment.visual else len(segment.ids)
    return 0, 0


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with: its beginning of text, or nothing."""
    # Some tokenizers have a token for the beginning of text and never write it (GPT-2's).
    begins: list[int] = tokenizer("").input_ids[:1]
    return begins if tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id] else []


def split_at_spans(text: str) -> list[tuple[str, bool]]:
    """The pieces of a text that are not empty, as they read, each with whether it is visual (spans or placeholders)."""
    pieces = enumerate(_VISUAL_RUN.split(text))  # The pattern has a group: odd pieces are what it matched.
    return [(ESCAPED_PLACEHOLDER.sub(r"\1", piece), i % 2 == 1) for i, piece in pieces if piece]


def visual_ids(run: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a run of visual tokens.

    Raises:
        ValueError: a placeholder is among them, or the tokenizer does not know them.
    """
    if DEFAULT_IMAGE_TOKEN in run or DEFAULT_VIDEO_TOKEN in run:
        raise ValueError(
            f"{DEFAULT_IMAGE_TOKEN} or {DEFAULT_VIDEO_TOKEN} stands in the text unexpanded; "
            "call preprocess_multimodal first"
        )
    tokens = VISUAL_TOKEN.findall(run)  # Spans have hundreds of patch tokens: each is looked up once.
    vocabulary: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(tokens)}
    unknown = [token for token, i in vocabulary.items() if i is None or i == tokenizer.unk_token_id]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(unknown)}; load it with llava.model.load_model")
    return [vocabulary[token] for token in tokens]


# Plain language modelling.


@FORMATS.register(PLAIN_LM)
class PlainFormat(Format):
    """All turns joined by single spaces, whatever their roles; every text token is learned, no visual one.

    A conversation "<span> una", "stella" becomes::

        piece      <span>    una stella    end of text
        ids        7 8 9     5 6           0
        labels     -100 ...  5 6           0
    """

    media_separator = " "
    has_prompts = False

    def check(self, turns: Sequence[Turn]) -> None:
        """Any roles in any order will do."""

    def has_target(self, turns: Sequence[Turn]) -> bool:
        pieces = split_at_spans(_join(turns))
        has_text = any(piece.strip() for piece, visual in pieces if not visual)
        # What is asked about a picture is text too, but no answer: the end of text would stand for it.
        is_answered = all(turn.text.strip() for turn in turns if turn.role == "assistant")
        return has_text and (is_answered or not any(visual for _, visual in pieces))

    def encode(self, turns: Sequence[Turn]) -> list[Segment]:
        segments = self.encode_prompt(turns)
        # A text may end with the end of text itself.
        if not segments or segments[-1].ids[-1:] != [self.tokenizer.eos_token_id]:
            segments.append(Segment([self.tokenizer.eos_token_id], markup=True))
        return segments

    def encode_prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        segments = [Segment(self.prefix_ids, markup=True)] if self.prefix_ids else []
        for piece, visual in split_at_spans(_join(turns)):
            ids = visual_ids(piece, self.tokenizer) if visual else self._tokenize([piece])[0]
            segments.append(Segment(ids, visual))
        return segments

    def count_tokens(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        pieces = [split_at_spans(_join(turns)) for turns in conversations]
        encoded = iter(self._tokenize([piece for of_one in pieces for piece, visual in of_one if not visual]))
        counts = []
        for of_one in pieces:
            ids = [[] if visual else next(encoded) for _, visual in of_one]
            # As in encode: a text that ends with the end of text gets no second one.
            needs_end = [self.prefix_ids, *ids][-1][-1:] != [self.tokenizer.eos_token_id]
            counts.append(len(self.prefix_ids) + sum(map(len, ids)) + needs_end)
        return counts

    def encode_all(self, conversations: Sequence[Sequence[Turn]]) -> list[list[int]]:
        pieces = [split_at_spans(_join(turns)) for turns in conversations]
        # A fast tokenizer shares the texts of one call among its threads.
        encoded = iter(self._tokenize([piece for of_one in pieces for piece, visual in of_one if not visual]))
        end = self.tokenizer.eos_token_id
        rows = []
        for of_one in pieces:
            parts = [visual_ids(piece, self.tokenizer) if visual else next(encoded) for piece, visual in of_one]
            ids = [*self.prefix_ids, *(i for part in parts for i in part)]
            rows.append(ids if [self.prefix_ids, *parts][-1][-1:] == [end] else [*ids, end])
        return rows

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []


def _join(turns: Sequence[Turn]) -> str:
    """The turns' texts, joined by single spaces; empty ones leave no gap."""
    return " ".join(text for turn in turns if (text := turn.text.strip()))


def preprocess_plain_lm(
    sources: Sequence[Sequence[Mapping[str, str]]], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
) -> dict[str, list[list[int]]]:
    """Ids and labels of conversations whose placeholders are expanded.

    Turns are joined by single spaces and end with the end-of-text token. Labels equal the ids, except
    over visual spans, where they are -100.

    Args:
        sources: conversations of ``{"from", "value"}`` (or ``{"role", "content"}``) turns.
        tokenizer: knows the visual tokens if the texts have any.
        has_image: whether the conversations have media; if not, visual tokens in them are an error.

    Returns:
        ``{"input_ids": [[int]], "labels": [[int]]}``, one list a conversation.
    """
    text_format = PlainFormat(tokenizer)
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for source in sources:
        turns = [Turn("user", turn["value"] if "value" in turn else turn["content"]) for turn in source]
        if not has_image and any(VISUAL_TOKEN.search(turn.text) for turn in turns):
            raise ValueError("the text has visual tokens, but has_image is False")
        ids, labels = label_segments(text_format.encode(turns))
        encoded["input_ids"].append(ids)
        encoded["labels"].append(labels)
    return encoded
