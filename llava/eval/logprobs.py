"""Log-probabilities of tokens: batches of rows through a language model, its head only where a token is scored."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llava.eval.token_rows import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
R = TypeVar("R")

_HEAD_ROWS = 256
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True)
class Batch:
    """Rows that the model reads together.

    Attributes:
        keys: int64 (rows, length), padded with 0.
        mask: what is attended to: bool (rows, length), false for padding.
        positions: where logits are wanted: int64 (wanted,), in the flattened batch.
        targets: int64 (targets,), ids whose log-probabilities are wanted.
        places: int64 (targets,), which of ``positions`` predicts each.
        entries: of each row, in order, which of the targets are summed.
    """

    keys: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    places: Tensor
    entries: list[list[int]]


def build_padded(rows: Sequence[TokenRow]) -> Batch:
    """A batch of one row for each, padded on the right."""
    length = max(len(row.inputs) for row in rows)
    keys = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    positions: list[int] = []
    targets: list[int] = []
    entries: list[list[int]] = []
    for number, row in enumerate(rows):
        keys[number, : len(row.inputs)] = torch.tensor(row.inputs)
        mask[number, : len(row.inputs)] = True
        entries.append(list(range(len(targets), len(targets) + len(row.scored))))
        positions += [number * length + scored - 1 for scored in row.scored]
        targets += [row.keys[scored] for scored in row.scored]
    return Batch(keys, mask, torch.tensor(positions), torch.tensor(targets), torch.arange(len(targets)), entries)


def group_by_length(rows: Sequence[TokenRow], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows that are read together: of like lengths, and no more than so many tokens with padding."""
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number].inputs), rows[number].keys), reverse=True)
    group: list[int] = []
    for number in order:
        # Longest first: the first of a group says how long its rows become.
        if group and len(rows[group[0]].inputs) * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


class _Caller(nn.Module):
    """Calls a function with a model, so that ``functional_call`` may put other weights under both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., R], *args: object) -> R:
        return function(self.model, *args)


class ModelRunner:
    """A language model that gives log-probabilities, and is left as it was.

    Args:
        model: with head; its weights, its mode and its configuration stay as they are.
        dtype: that its weights are converted to while it runs; None runs it as it is.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = torch.float32) -> None:
        self.model, self.dtype = model, dtype
        self._converted: dict[str, Tensor] | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def running(self) -> Iterator[None]:
        """Scoring as it should be: no dropout, no gradients, no autocast; afterwards everything is as it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            self.model.eval()
            with (
                torch.random.fork_rng(devices),
                torch.no_grad(),
                torch.autocast(self.device.type, enabled=False),
            ):
                self._converted = self._convert(self.dtype)
                yield
        finally:
            self._converted = None
            for module, mode in modes:
                module.training = mode

    def _convert(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Copies of the weights that have another dtype, by name."""
        if dtype is None:
            return {}
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {
            f"model.{name}": tensor.detach().to(dtype)
            for name, tensor in tensors
            if tensor.is_floating_point() and tensor.dtype != dtype
        }

    def log_probs(self, batch: Batch) -> Tensor:
        """The log-probability of each target of a batch, float64 (targets,) on the CPU."""
        return self._call(_log_probs, batch, self._keeps_logits)

    def _call(self, function: Callable[P, R], *args: object) -> R:
        assert self._converted is not None, "within running()"
        if not self._converted:
            return function(self.model, *args)  # type: ignore[call-arg, arg-type]
        return functional_call(_Caller(self.model), self._converted, (function, *args))  # type: ignore[no-any-return]

    def sums(self, batch: Batch) -> list[float]:
        """The score of each row of a batch."""
        found = self.log_probs(batch).tolist()
        # Exact sums: the same addends in another order are the same score.
        return [math.fsum(found[entry] for entry in of_row) for of_row in batch.entries]


def _log_probs(model: PreTrainedModel, batch: Batch, keeps_logits: bool) -> Tensor:
    device = model.device
    output = model(input_ids=batch.keys.to(device), attention_mask=batch.mask.long().to(device), use_cache=False)
    logits = output.logits.flatten(0, 1)  # (rows * length, vocabulary)
    return _select(lambda chosen: logits[chosen], batch)


def _select(logits_at: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """The log-probabilities of targets, chunk by chunk of the positions that predict them."""
    found = torch.empty(len(batch.targets), dtype=torch.float64)
    order = torch.argsort(batch.places, stable=True)
    bounds = torch.searchsorted(batch.places[order], torch.arange(0, len(batch.positions) + _HEAD_ROWS, _HEAD_ROWS))
    for number, start in enumerate(range(0, len(batch.positions), _HEAD_ROWS)):
        logits = logits_at(batch.positions[start : start + _HEAD_ROWS])  # (chunk, vocabulary)
        # At least float32, whatever the model runs in.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = order[bounds[number] : bounds[number + 1]]
        places = (batch.places[chosen] - start).to(logits.device)
        totals = logits.logsumexp(1)[places]  # (targets of the chunk,)
        own = logits[places, batch.targets[chosen].to(logits.device)]
        found[chosen] = (own.double() - totals.double()).cpu()
    return found
