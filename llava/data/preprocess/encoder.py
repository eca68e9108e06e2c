"""From stretches of text to ids, when a sample is tokenised piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, VISUAL_TOKENS
from llava.data.placeholders import PLACEHOLDER, literal_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
