"""What a preprocessing format is, what it makes, and the table of all formats."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, IGNORE_INDEX, VISUAL_TOKENS
from llava.data.placeholders import PLACEHOLDER, literal_text
from llava.registry import Registry
from llava.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_LM = "plain_lm"
CHAT = "chat"


class ContextError(ValueError):
    """A sample that does not fit the context however much of its text is cut."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a sample: its token ids, whether they are a visual span, whether they are learned.

    A visual span is never learned, whatever ``supervised`` says.
    """

    ids: list[int]
    visual: bool = False
    supervised: bool = True

    @property
    def learned(self) -> bool:
        return self.supervised and not self.visual


class Format(ABC):
    """A way to write conversations as tokens.

    Args:
        tokenizer: of the model; knows the visual tokens if there is vision.
    """

    media_separator: ClassVar[str] = "\n"
    """What stands between media and the words of a user who shows them."""

    has_prompts: ClassVar[bool] = True
    """Whether there is text that is given and not learned."""

    @property
    def writes_user_text(self) -> bool:
        """Whether the words of user turns are written, and not only their media."""
        return True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        """Another one for a format that writes conversations otherwise; the tokenizer aside."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.tokenizer.eos_token_id]

    @abstractmethod
    def check(self, turns: Sequence[Turn]) -> None:
        """A ValueError if this format cannot write a conversation of these roles."""

    @abstractmethod
    def has_target(self, turns: Sequence[Turn]) -> bool:
        """Whether there is anything in a conversation that this format supervises, but for its end, in every answer."""

    @abstractmethod
    def encode(self, turns: Sequence[Turn]) -> list[Segment]:
        """A whole sample, placeholders expanded; its last token is the end of text, supervised."""

    @abstractmethod
    def encode_prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        """A conversation up to where the assistant's next answer begins, as ``encode`` would write it."""

    @abstractmethod
    def count_tokens(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        """How many tokens ``encode`` makes of each conversation, its media (placeholders here) left out."""


BUILT_IN = ("chat", "gemma", "llama_2", "llama_v3", "mpt", "plain", "plain_lm", "qwen", "v1")
"""Formats that come with the library, for ``--help``, which loads none of them."""

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
    labels = [i if segment.learned else IGNORE_INDEX for segment in segments for i in segment.ids]
    return ids, labels


def truncate_segments(segments: list[Segment], max_length: int) -> list[Segment]:
    """Cut text, from the end, until all fits; spans stay whole and the last token stays last.

    Raises:
        ContextError: what must stay is more than ``max_length``: the spans, the text up to the first
            supervised token, and the end of text.
    """
    total = sum(len(segment.ids) for segment in segments)
    if total <= max_length:
        return segments
    end = replace(segments[-1], ids=segments[-1].ids[-1:])
    rest = [*segments[:-1], replace(segments[-1], ids=segments[-1].ids[:-1])]
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
    for segment in reversed(rest):
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


# From stretches of text to ids, when a sample is tokenised piece by piece.

VISUAL_TOKEN = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))
_VISUAL_RUN = re.compile(f"((?:{VISUAL_TOKEN.pattern}|{PLACEHOLDER.pattern})+)")
_NEWLINE = "\n"


class PieceEncoder:
    """Tokenises pieces of a sample so that they read as parts of one text.

    Tokenizers of SentencePiece's kind put a space before whatever they are given; within a text that
    space would be wrong. Such a tokenizer gets the piece behind a newline, whose ids are taken off again.

    Args:
        tokenizer: of the model.
        markup: the text that a format writes around turns; no content becomes a control token of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markup: str) -> None:
        self.tokenizer = tokenizer
        newline, letter, both = tokenizer([_NEWLINE, "a", _NEWLINE + "a"], add_special_tokens=False)["input_ids"]
        self._newline_ids = newline if both != newline + letter else []
        self._breaks = _break_points([token for token in _plain_added_tokens(tokenizer) if token in markup])

    def encode_start(self, text: str) -> list[int]:
        """Ids of the text that a sample begins with: exactly one beginning of text, where the tokenizer has that."""
        ids: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin = prefix_ids(self.tokenizer)
        return ids if ids[:1] == begin else begin + ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of a format's own text, within a sample; control tokens are recognised."""
        return self._encode([text], [True])[0] if text else []

    def encode_contents(self, texts: Sequence[str], inside: Sequence[bool]) -> list[list[int]]:
        """Ids of what people wrote; a control token that they typed is plain text, and so is an escaped placeholder.

        Args:
            texts: any number, tokenised in one call.
            inside: for each whether text stands before it.
        """
        texts = [literal_text(text) for text in texts]
        pieces = [self._breaks.split(text) if self._breaks else [text] for text in texts]
        flags = [within or i > 0 for of_text, within in zip(pieces, inside, strict=True) for i in range(len(of_text))]
        encoded = iter(self._encode([piece for of_text in pieces for piece in of_text], flags, typed=True))
        return [[i for _ in of_text for i in next(encoded)] for of_text in pieces]

    def _encode(self, texts: Sequence[str], inside: Sequence[bool], typed: bool = False) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": typed, "verbose": False}
        begin = self._newline_ids
        if not begin:
            return self.tokenizer(list(texts), **options)["input_ids"]
        shielded = [_NEWLINE + text if within else text for text, within in zip(texts, inside, strict=True)]
        encoded: list[list[int]] = self.tokenizer(shielded, **options)["input_ids"]
        return [
            ids[len(begin) :] if within and ids[: len(begin)] == begin else self.tokenizer(text, **options)["input_ids"]
            for ids, text, within in zip(encoded, texts, inside, strict=True)
        ]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the tokenizer's own tokens, but for visual ones and white space; None if it has none."""
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - set(VISUAL_TOKENS)
    longest_first = sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _plain_added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that were added without being declared special: splitting special ones leaves them whole."""
    return [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special and len(t.content.strip()) > 1]


def _break_points(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Matches, with no width, behind the first character of each token in a text."""
    points = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokens]
    return re.compile("|".join(points)) if points else None


def split_at_spans(text: str) -> list[tuple[str, bool]]:
    """The pieces of a text that are not empty, each with whether it is visual (spans or placeholders)."""
    return [(piece, i % 2 == 1) for i, piece in enumerate(_VISUAL_RUN.split(text)) if piece]


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
    tokens = VISUAL_TOKEN.findall(run)
    vocabulary: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in set(tokens)}
    unknown = [token for token, i in vocabulary.items() if i is None or i == tokenizer.unk_token_id]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(unknown)}; load it with llava.model.load_model")
    return [vocabulary[token] for token in tokens]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with: its beginning of text, or nothing."""
    begins: Any = tokenizer("")["input_ids"][:1]
    return begins if tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id] else []
