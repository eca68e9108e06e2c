"""Cross entropy at supervised positions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX


def supervised_loss(
    hidden: Tensor, labels: Tensor, head: nn.Module, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Next-token cross entropy; the head runs only where a label is predicted.

    A caption of 20 tokens behind 360 visual positions asks for 20 rows of logits, not 380.

    Args:
        hidden: (batch, length, width), the decoder's last hidden states.
        labels: int64 (batch, length); the label at position t + 1 is predicted at position t.
        head: maps (..., width) to (..., vocabulary).
        num_items_in_batch: number of predicted labels of the global batch, which the sum is divided
            by. None divides by the number in ``labels``: the mean over this batch.

    Returns:
        The fp32 loss; zero, with a graph, for a batch that predicts nothing.
    """
    targets = labels[:, 1:]
    predicted = targets != IGNORE_INDEX
    logits = head(hidden[:, :-1][predicted]).float()
    targets = targets[predicted]
    total = F.cross_entropy(logits, targets, reduction="sum")
    if num_items_in_batch is None:
        return total / max(len(targets), 1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
