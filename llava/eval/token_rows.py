"""From candidates to rows of tokens: what a model reads, and which of its tokens are scored.

Text alone is tokenised whole, with the tokenizer's own special tokens. A token is scored if it ends behind the
candidate's ``start``; the first one of all is given, as nothing predicts it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava.messages import shorten_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llava.eval.choices import Choice


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A candidate as the model reads it.

    Attributes:
        keys: a token id each, or, where a feature of an image or video stands, a negative number of its own.
        scored: positions of the tokens whose log-probabilities are summed, in order, none of them 0.
    """

    keys: tuple[int, ...]
    scored: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The keys that the model reads: behind the last scored token nothing is of interest, nor is that itself."""
        return self.keys[: self.scored[-1]]


def name_choice(choice: Choice) -> str:
    """How errors call a choice: by where it stands, else by its id."""
    return choice.source or f"item {choice.id!r}"


def find_context(config: PretrainedConfig) -> int | None:
    """The most tokens that a model of a configuration reads; None where it does not say."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        # Some configurations have the name with -1 or None, which is no limit.
        if isinstance(limit := getattr(text, name, None), int) and limit > 0:
            return limit
    return None


class TextEncoder:
    """Turns the candidates of choices without media into rows.

    Args:
        tokenizer: of the model; a fast one, which says which characters a token stands for.
        context: the most tokens that the model reads, None for no limit.
        model_name: what errors call the model.
        visual_ids: of tokens that stand for images and videos, which no text may have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        model_name: str,
        visual_ids: Collection[int] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{model_name}: its tokenizer ({type(tokenizer).__name__}) is a slow one, which does not tell the "
                "characters of its tokens; save it as a fast one (tokenizer.json)"
            )
        self.tokenizer, self.model_name = tokenizer, model_name
        self._context, self._visual_ids = context, frozenset(visual_ids)

    def encode(self, choices: Sequence[Choice]) -> list[list[TokenRow]]:
        """The rows of each choice's candidates.

        Raises:
            ValueError: a candidate is too long, or none of its tokens is scored; names the choice.
        """
        texts = [candidate.text for choice in choices for candidate in choice.candidates]
        if not texts:
            return []
        # Special tokens that stand in the text are read as the tokenizer reads them, as the official scorer does.
        encoded = self.tokenizer(texts, return_offsets_mapping=True, verbose=False)
        pairs = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        return [
            [
                self.check(choice, candidate.text, *select_scored(*next(pairs), candidate.start))
                for candidate in choice.candidates
            ]
            for choice in choices
        ]

    def check(self, choice: Choice, text: str, keys: Sequence[int], scored: Sequence[int]) -> TokenRow:
        """A row, if it can be scored."""
        if self._context is not None and len(keys) > self._context:
            raise ValueError(
                f"{name_choice(choice)}: a candidate has {len(keys)} tokens, but the context of {self.model_name} is "
                f"{self._context}: {shorten_text(text, 80)!r}; shorten it or leave it out"
            )
        if not self._visual_ids.isdisjoint(keys):
            raise ValueError(
                f"{name_choice(choice)}: a candidate has a token in its text that stands for images: "
                f"{shorten_text(text, 80)!r}; media are given beside the text"
            )
        if not scored:
            raise ValueError(
                f"{name_choice(choice)}: no token of a candidate can be scored: {shorten_text(text, 80)!r}; a "
                "completion must not be empty, and without a beginning-of-text token the first token is never scored"
            )
        return TokenRow(tuple(keys), tuple(scored))


def select_scored(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], start: int
) -> tuple[Sequence[int], list[int]]:
    """The ids, and the positions of those that are scored: they end behind ``start``, and something precedes them."""
    # Special tokens have the offsets (0, 0), and so end behind nothing.
    return ids, [position for position, (_, end) in enumerate(offsets) if end > start and position > 0]
