"""Plain language modelling: no chat template, every text token supervised, no visual one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, IGNORE_INDEX, VISUAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VISUAL_TOKEN = re.compile("|".join(map(re.escape, VISUAL_TOKENS)))
_VISUAL_RUN = re.compile(f"((?:{_VISUAL_TOKEN.pattern})+)")


class ContextError(ValueError):
    """A sample whose spans alone are too long for the context."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a sample: token ids, and whether they are a visual span."""

    ids: list[int]
    visual: bool


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
        if not has_image and _VISUAL_TOKEN.search(text):
            raise ValueError("the text has visual tokens, but has_image is False")
        ids, labels = label_plain(tokenize_plain(text, tokenizer))
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
    if DEFAULT_IMAGE_TOKEN in text or DEFAULT_VIDEO_TOKEN in text:
        raise ValueError(
            f"{DEFAULT_IMAGE_TOKEN} or {DEFAULT_VIDEO_TOKEN} stands in the text unexpanded; "
            "call preprocess_multimodal first"
        )
    segments = [Segment(prefix, visual=False)] if (prefix := prefix_ids(tokenizer)) else []
    for i, piece in enumerate(_VISUAL_RUN.split(text)):
        if not piece:
            continue
        if i % 2:
            segments.append(Segment(_visual_ids(piece, tokenizer), visual=True))
        else:
            segments.append(
                Segment(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], visual=False)
            )
    if end and needs_end(segments[-1].ids if segments else [], tokenizer):
        segments.append(Segment([tokenizer.eos_token_id], visual=False))
    return segments


def label_plain(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Ids of the segments in a row, and labels that leave out visual ones."""
    ids = [i for segment in segments for i in segment.ids]
    labels = [IGNORE_INDEX if segment.visual else i for segment in segments for i in segment.ids]
    return ids, labels


def truncate_segments(segments: list[Segment], max_length: int) -> list[Segment]:
    """Cut text, from the end, until all fits; spans stay whole and the last token stays last.

    Raises:
        ContextError: the spans, one text token and the end of text are already more than ``max_length``.
    """
    total = sum(len(segment.ids) for segment in segments)
    if total <= max_length:
        return segments
    visual = sum(len(segment.ids) for segment in segments if segment.visual)
    needed = visual + min(total - visual, 2)
    if needed > max_length:
        raise ContextError(
            f"it needs at least {needed} tokens ({visual} of them visual), but the limit is {max_length}"
        )
    end = Segment(segments[-1].ids[-1:], visual=False)
    rest = [*segments[:-1], Segment(segments[-1].ids[:-1], visual=False)]
    excess = total - max_length
    kept: list[Segment] = []
    for segment in reversed(rest):
        cut = 0 if segment.visual else min(excess, len(segment.ids))
        excess -= cut
        if len(segment.ids) > cut:
            kept.append(Segment(segment.ids[: len(segment.ids) - cut], segment.visual))
    return [*reversed(kept), end]


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with: its beginning of text, or nothing."""
    begins: Any = tokenizer("")["input_ids"][:1]
    return begins if tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id] else []


def needs_end(last_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a sample whose last piece has these ids still lacks its end of text."""
    return list(last_ids[-1:]) != [tokenizer.eos_token_id]


def _visual_ids(run: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = _VISUAL_TOKEN.findall(run)
    vocabulary: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in set(tokens)}
    unknown = [token for token, i in vocabulary.items() if i is None or i == tokenizer.unk_token_id]
    if unknown:
        raise ValueError(f"the tokenizer does not know {', '.join(unknown)}; load it with llava.model.load_model")
    return [vocabulary[token] for token in tokens]
