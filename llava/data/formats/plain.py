"""Plain language modelling: no chat template, every text token supervised, no visual one.

A conversation "<span> una", "stella" becomes::

    piece      <span>    una stella    end of text
    ids        7 8 9     5 6           0
    labels     -100 ...  5 6           0
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llava.constants import (
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
    ESCAPED_PLACEHOLDER,
    PLACEHOLDER,
    VISUAL_TOKENS,
)
from llava.data.formats.base import FORMATS, PLAIN_LM, Format, Segment, label_segments
from llava.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VISUAL_TOKEN = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))
_VISUAL_RUN = re.compile(f"((?:{VISUAL_TOKEN.pattern}|{PLACEHOLDER.pattern})+)")


@FORMATS.register(PLAIN_LM)
class PlainFormat(Format):
    """All turns joined by single spaces, whatever their roles."""

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
            segments.append(Segment([self.tokenizer.eos_token_id]))
        return segments

    def encode_prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        segments = [Segment(self.prefix_ids)] if self.prefix_ids else []
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
            needs_end = [self.prefix_ids, *ids][-1][-1:] != [self.tokenizer.eos_token_id]
            counts.append(len(self.prefix_ids) + sum(map(len, ids)) + needs_end)
        return counts

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


# Pieces of a text, which every format tokenises apart from the spans between them.


def split_at_spans(text: str) -> list[tuple[str, bool]]:
    """The pieces of a text that are not empty, as they read, each with whether it is visual (spans or placeholders)."""
    pieces = enumerate(_VISUAL_RUN.split(text))
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
    tokens = VISUAL_TOKEN.findall(run)
    vocabulary: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(tokens)}
    unknown = [token for token, i in vocabulary.items() if i is None or i == tokenizer.unk_token_id]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(unknown)}; load it with llava.model.load_model")
    return [vocabulary[token] for token in tokens]
