"""Cross entropy at supervised positions only, and the load balancing of mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llava.constants import IGNORE_INDEX
from llava.model.coordinates import TwoHot, two_hot_cross_entropy


class RowCounts(NamedTuple):
    """What the predicted labels of each row of a batch come to, on the CPU.

    Attributes:
        losses: float64 (rows,), the sums of their cross entropies.
        targets: int64 (rows,), how many there are.
        hits: int64 (rows,), at how many of them the label is the most probable token.
    """

    losses: Tensor
    targets: Tensor
    hits: Tensor


_counting: ContextVar[list[RowCounts] | None] = ContextVar("counting", default=None)


@contextmanager
def counting_rows(into: list[RowCounts]) -> Iterator[None]:
    """Within it each call of ``supervised_loss`` adds to a list what each row of its batch comes to.

    Evaluations ask for it: a list of their own past ``forward`` reaches the loss whatever engine wraps the model.
    """
    token = _counting.set(into)
    try:
        yield
    finally:
        _counting.reset(token)


def supervised_loss(
    hidden: Tensor,
    labels: Tensor | TwoHot,
    head: Callable[[Tensor], Tensor],
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Next-token cross entropy; the head runs only where a label is predicted.

    A caption of 20 tokens behind 360 visual positions asks for 20 rows of logits, not 380.

    Args:
        hidden: (batch, length, width), the decoder's last hidden states.
        labels: int64 (batch, length); the label at position t + 1 is predicted at position t. ``TwoHot`` for
            a model with tables of coordinates.
        head: maps (..., width) to (..., vocabulary).
        num_items_in_batch: number of predicted labels of the global batch, which the sum is divided
            by. None divides by the number in ``labels``: the mean over this batch.
        label_smoothing: in [0, 1), the weight that each target gives to a uniform distribution over the
            vocabulary (bins of coordinates included), as in ``torch.nn.functional.cross_entropy``.

    Returns:
        The fp32 loss; zero, with a graph, for a batch that predicts nothing.
    """
    ids = labels.lower if isinstance(labels, TwoHot) else labels  # (batch, length)
    predicted = ids[:, 1:] != IGNORE_INDEX  # (batch, length - 1)
    # The head in the model's own precision, the loss in fp32: (predicted, width) -> (predicted, vocabulary).
    logits = head(hidden[:, :-1][predicted]).float()
    if (counted := _counting.get()) is not None:
        counted.append(_count_rows(logits.detach(), labels, predicted))
    if isinstance(labels, TwoHot):
        total = two_hot_cross_entropy(logits, *(target[:, 1:][predicted] for target in labels))
    else:
        total = F.cross_entropy(logits, ids[:, 1:][predicted], reduction="sum")
    if label_smoothing:
        uniform = (logits.logsumexp(1) - logits.mean(1)).sum()  # the cross entropy of a uniform target
        total = (1 - label_smoothing) * total + label_smoothing * uniform
    if num_items_in_batch is None:
        return total / max(len(logits), 1)
    # The sum of a micro-batch over the count of the global batch: however it is split, the parts add up to one mean.
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


@torch.no_grad()
def _count_rows(logits: Tensor, labels: Tensor | TwoHot, predicted: Tensor) -> RowCounts:
    """Row by row what ``supervised_loss`` sums: logits (predicted, vocabulary), where ``predicted`` is true."""
    if isinstance(labels, TwoHot):
        lower, upper, fraction = (target[:, 1:][predicted] for target in labels)
        chosen = logits.gather(1, torch.stack([lower, upper], dim=1))  # (predicted, 2)
        losses = logits.logsumexp(1) - torch.lerp(chosen[:, 0], chosen[:, 1], fraction)
        best = torch.where(fraction > 0.5, upper, lower)  # The bin nearest to a coordinate.
    else:
        best = labels[:, 1:][predicted]
        losses = F.cross_entropy(logits, best, reduction="none")
    rows, num_rows = predicted.nonzero()[:, 0].cpu(), len(predicted)
    hits = (logits.argmax(1) == best).cpu() if len(logits) else torch.zeros(0, dtype=torch.bool)
    return RowCounts(
        torch.bincount(rows, losses.cpu().double(), num_rows),
        torch.bincount(rows, minlength=num_rows),
        torch.bincount(rows[hits], minlength=num_rows),
    )


def add_balance_loss(
    result: CausalLMOutputWithPast,
    router_logits: tuple[Tensor, ...],
    config: PretrainedConfig,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> MoeCausalLMOutputWithPast:
    """The result of a mixture of experts, with the load balancing part in its loss, if it has one.

    Args:
        result: of the step, with the loss over the labels.
        router_logits, config, attention_mask: as for ``load_balancing_loss``.
        labels, num_items_in_batch: as for ``supervised_loss``.
    """
    balance = load_balancing_loss(router_logits, config, attention_mask)
    shown: dict[str, Any] = {**result, "aux_loss": balance, "router_logits": router_logits}
    balanced = MoeCausalLMOutputWithPast(**shown)
    if labels is not None:
        # No sum over labels: weighted by the micro-batch's share, or splitting a batch would multiply it.
        share = share_of_batch(labels, num_items_in_batch)
        balanced.loss = result.loss + config.router_aux_loss_coef * share * balance
    return balanced


def share_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The share of the global batch's predicted labels that this micro-batch holds; 1 where it is all there is."""
    if num_items_in_batch is None:
        return 1.0
    predicted = (labels[:, 1:] != IGNORE_INDEX).sum()
    return predicted / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], config: PretrainedConfig, attention_mask: Tensor | None
) -> Tensor:
    """How unevenly a mixture of experts spreads real tokens over its experts.

    Equations 4 to 6 of the Switch Transformer (arXiv 2101.03961), as transformers computes them. The smallest value,
    where all are used alike, is the number of experts that a token takes.

    Args:
        router_logits: one (batch * length, experts) tensor a layer.
        config: gives the experts and how many of them a token takes.
        attention_mask: (batch, length), one where a token is real; None counts every position.
    """
    experts = (config.num_experts, config.num_experts_per_tok)
    return load_balancing_loss_func(router_logits, *experts, attention_mask)  # type: ignore[arg-type, return-value]
