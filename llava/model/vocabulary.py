"""Room for the visual tokens in tokenizer, embeddings and head."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llava.config import VisionConfig
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


def grow_vocabulary(model: Any, vision: VisionConfig) -> None:
    """Give the visual tokens rows in the embeddings and the head.

    A new row is the mean of the old ones, so that it starts as an unremarkable token; logits of old
    tokens stay as they were, and tied heads stay tied. Rows are only touched in a model that did not
    have the tokens yet.

    Args:
        model: a language model with head.
        vision: gives the ids of the visual tokens.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    ids = vision.visual_token_ids
    first_new = min(ids)
    if getattr(model.config, "mm_vocabulary_grown", False):
        return
    if max(ids) >= old_size:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    # Where a model came with spare rows behind its tokenizer, the new tokens take those.
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in tables.values():
            weight[ids] = weight[: min(first_new, old_size)].mean(0, dtype=torch.float32).to(weight.dtype)
    model.config.mm_vocabulary_grown = True
