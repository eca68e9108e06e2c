"""Plain language modelling: no chat template, every text token supervised, no visual one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava.data.formats.base import (
    FORMATS,
    PLAIN_LM,
    VISUAL_TOKEN,
    Format,
    Segment,
    label_segments,
    prefix_ids,
    split_at_spans,
    visual_ids,
)
from llava.data.placeholders import literal_text, split_at_placeholders
from llava.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        return tokenize_plain(_join(turns), self.tokenizer)

    def encode_prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        return tokenize_plain(_join(turns), self.tokenizer, end=False)

    def count_tokens(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        pieces = [split_at_placeholders(_join(turns)) for turns in conversations]
        flat = [literal_text(piece) for of_conversation in pieces for piece in of_conversation]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
        prefix = prefix_ids(self.tokenizer)
        counts = []
        for of_conversation in pieces:
            ids = [next(encoded) for _ in of_conversation]
            last = ids[-1] if len(ids) > 1 else prefix + ids[0]
            counts.append(len(prefix) + sum(map(len, ids)) + needs_end(last, self.tokenizer))
        return counts


def _join(turns: Sequence[Turn]) -> str:
    return join_turns([turn.text for turn in turns])


def preprocess_plain_lm(
    sources: Sequence[Sequence[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, has_image: bool = False
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
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for source in sources:
        text = join_turns([turn["value"] if "value" in turn else turn["content"] for turn in source])
        if not has_image and VISUAL_TOKEN.search(text):
            raise ValueError("the text has visual tokens, but has_image is False")
        ids, labels = label_segments(tokenize_plain(text, tokenizer))
        encoded["input_ids"].append(ids)
        encoded["labels"].append(labels)
    return encoded


def join_turns(texts: Sequence[str]) -> str:
    """The turns' texts, joined by single spaces; empty ones leave no gap."""
    return " ".join(stripped for text in texts if (stripped := text.strip()))


def tokenize_plain(text: str, tokenizer: PreTrainedTokenizerBase, end: bool = True) -> list[Segment]:
    """Tokenise text and visual spans, piece by piece.

    Args:
        text: placeholders expanded.
        tokenizer: one that begins texts with a token of its own (as Llama's do) keeps that habit.
        end: whether the end-of-text token is added, unless the text ends with it already.
    """
    segments = [Segment(prefix)] if (prefix := prefix_ids(tokenizer)) else []
    for piece, visual in split_at_spans(text):
        if visual:
            segments.append(Segment(visual_ids(piece, tokenizer), visual=True))
        else:
            segments.append(
                Segment(tokenizer(literal_text(piece), add_special_tokens=False, verbose=False)["input_ids"])
            )
    if end and needs_end(segments[-1].ids if segments else [], tokenizer):
        segments.append(Segment([tokenizer.eos_token_id]))
    return segments


def needs_end(last_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a sample whose last piece has these ids still lacks its end of text."""
    return list(last_ids[-1:]) != [tokenizer.eos_token_id]
