"""Puts visual features into the token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def splice(input_ids: Tensor, embeddings: Tensor, features: list[Tensor], visual_token_ids: list[int]) -> Tensor:
    """Overwrite every visual position of a batch with its feature, in one scatter.

    Start and end markers are overwritten like patches, as in the LLaVA-ST family: its checkpoints
    were trained so.

    Args:
        input_ids: int64 (batch, length).
        embeddings: (batch, length, width) embeddings of ``input_ids``.
        features: one (tokens, width) tensor a medium, over the batch in reading order.
        visual_token_ids: the ids of all visual tokens.

    Returns:
        (batch, length, width) embeddings; without features, ``embeddings`` with its values untouched.

    Raises:
        ValueError: there are more or fewer features than visual positions.
    """
    is_visual = torch.isin(input_ids, torch.tensor(visual_token_ids, device=input_ids.device))
    positions = is_visual.flatten().nonzero().squeeze(1)
    num_features = sum(len(feature) for feature in features)
    if num_features != len(positions):
        by_sample = is_visual.sum(1).tolist()
        raise ValueError(
            f"the text has {len(positions)} visual positions (by sample: {by_sample}), but the media give "
            f"{num_features} features (by medium: {[len(feature) for feature in features]}); pass exactly the "
            "media whose placeholders stand in the text, with the number of frames they were expanded for"
        )
    if not features:
        return embeddings
    flat = embeddings.flatten(0, 1)
    return flat.index_copy(0, positions, torch.cat(features).to(flat.dtype)).view_as(embeddings)
