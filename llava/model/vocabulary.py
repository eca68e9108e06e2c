"""Room for the visual tokens in tokenizer, embeddings and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llava.constants import VISUAL_TOKENS


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, path: str) -> None:
    """A ValueError if the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of {path!r} has {len(tokenizer)} tokens, but the model has embeddings for "
            f"{vocab_size}; put the tokenizer that the model was trained with into its folder"
        )


def add_visual_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Add the visual tokens that the tokenizer does not know yet, each kept whole in any text.

    Returns:
        The id of every visual token.
    """
    vocabulary = tokenizer.get_vocab()
    new = [token for token in VISUAL_TOKENS if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in VISUAL_TOKENS}


def grow_vocabulary(model: Any, new_ids: Sequence[int]) -> None:
    """Give new tokens rows in the embeddings and the head.

    A new row is the mean of the old ones, so that it starts as an unremarkable token; logits of old
    tokens stay as they were, and tied heads stay tied. Where a model came with spare rows behind its
    tokenizer, the new tokens take those.

    Args:
        model: a language model with head.
        new_ids: ids that the tokenizer has just gained, all above its old ones.
    """
    if not new_ids:
        return
    old_size = model.get_input_embeddings().weight.shape[0]
    if max(new_ids) >= old_size:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in tables.values():
            old_rows = weight[: min(*new_ids, old_size)]
            weight[list(new_ids)] = old_rows.mean(0, dtype=torch.float32).to(weight.dtype)
