"""Log-probabilities of tokens: batches of rows through a language model, its head only where a token is wanted.

What any class of transformers can do is read padded sequences and give logits. Two shorter ways are taken only where a
trial on a few made-up rows gives the same log-probabilities: the decoder's hidden states and the head apart, so that
the head runs chunk by chunk and where it is needed; and trees of shared beginnings, see ``token_batches``.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llava.eval.token_batches import Batch, Sizes, pad_rows, share_beginnings
from llava.eval.token_rows import TokenRow
from llava.eval.visual_rows import Features, embed_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llava.model.llava_arch import LlavaMetaForCausalLM

logger = logging.getLogger(__name__)

_HEAD_CPU, _HEAD_GPU = (512, 1024), (8192, 8192)
"""Positions, and entries of the vocabulary, whose logits are in memory at once."""

_TOLERANCE = 2.0**-14
"""By which share of the largest log-probability a shorter way may differ in the trial: some hundred roundings of
float32, and far less than what a wrong mask or a missing factor does."""

_LARGEST_FOR_DOUBLE = 2_000_000_000
"""Parameters of the largest model of which a float64 copy (8 bytes each) is made."""


_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Ways:
    """Which shorter ways were found to give the log-probabilities of padded sequences and full logits.

    Attributes:
        head: decoder and head apart.
        trees: trees of shared beginnings.
        longest: the most tokens of a row in a tree; None for no limit.
    """

    head: bool
    trees: bool
    longest: int | None = None


PLAIN = Ways(head=False, trees=False)


class _Caller(nn.Module):
    """Calls a function with a model, so that ``functional_call`` may put other weights under both."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., object], *args: object) -> object:
        return function(self.model, *args)


class ModelRunner:
    """A language model that gives log-probabilities, and is left as it was.

    Args:
        model: with head; its weights, its mode and its configuration stay as they are.
        dtype: that its weights are converted to while it runs; None runs it as it is.
        share: whether trees may be used at all.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype | None = torch.float32, *, share: bool = True
    ) -> None:
        self.model, self.dtype, self._share = model, dtype, share
        self._converted: dict[str, Tensor] | None = None
        self._ways: Ways | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it: no dropout, no gradients, no autocast, converted weights; behind it all is as it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        device = self.device
        try:
            self.model.eval()
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.no_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                self._converted = self._convert(self.dtype)
                yield
        finally:
            self._converted = None
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def in_double(self) -> Iterator[bool]:
        """Within it, and within ``running``, the model has float64 weights, if that is possible: tells whether.

        A quantised model, one whose weights lie elsewhere (ZeRO-3) and a very large one keep theirs.
        """
        weights = list(self.model.parameters())
        # Of DeepSpeed's ZeRO-3 a parameter here is an empty tensor; Apple's GPUs have no float64.
        possible = (
            all(weight.is_floating_point() and not hasattr(weight, "ds_id") for weight in weights)
            and sum(weight.numel() for weight in weights) <= _LARGEST_FOR_DOUBLE
            and self.device.type != "mps"
        )
        before, experts = self._converted, None
        try:
            if possible:
                self._converted = self._convert(torch.float64)
                if getattr(self.model.config, "_experts_implementation", None) is not None:
                    # Grouped products of experts exist in float32 and less.
                    experts = self.model.get_experts_implementation()
                    self.model.set_experts_implementation("eager")
            yield possible
        finally:
            self._converted = before
            if experts is not None:
                self.model.set_experts_implementation(experts)

    def _convert(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Copies of the weights and buffers that have another dtype, by name."""
        if dtype is None:
            return {}
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {
            f"model.{name}": tensor.detach().to(dtype)
            for name, tensor in tensors
            if tensor.is_floating_point() and tensor.dtype != dtype
        }

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        """``function(model, *args)`` with the weights that are in force."""
        assert self._converted is not None, "outside running()"
        if not self._converted:
            return function(self.model, *args)
        return functional_call(_Caller(self.model), self._converted, (function, *args))

    def find_ways(self) -> Ways:
        """The shorter ways that this model allows; tried when they are first asked for."""
        if self._ways is None:
            self._ways = self._try_ways()
            logger.debug("likelihood scores of %s: %s", type(self.model).__name__, self._ways)
        return self._ways

    def _try_ways(self) -> Ways:
        if (self.dtype or self.model.dtype) not in (torch.float32, torch.float64):
            return PLAIN  # So few digits cannot tell a wrong mask from rounding.
        config = self.model.config.get_text_config()
        rows = _build_trial_rows(config.vocab_size)
        order, padded = next(pad_rows(rows, _NO_LIMIT))
        logits = self.call(_logits_at_all, padded, PLAIN)  # (positions of all rows, vocabulary)
        has_head = self.model.get_output_embeddings() is not None and self.model.base_model is not self.model
        # A cap changes large logits alone, which those of the trial need not be.
        has_head = has_head and getattr(config, "final_logit_softcapping", None) is None
        head = has_head and _is_near(self.call(_logits_at_all, padded, replace(PLAIN, head=True)), logits)
        return Ways(head, self._share and self._can_read_trees(rows, order, padded), find_window(self.model.config))

    def _can_read_trees(self, rows: Sequence[TokenRow], order: Sequence[int], padded: Batch) -> bool:
        """Whether a tree of rows gives the log-probabilities of the padded rows."""
        if not {"attention_mask", "position_ids"} <= set(inspect.signature(self.model.forward).parameters):
            return False
        tree_order, tree = next(share_beginnings(rows, Sizes(_NO_LIMIT, _NO_LIMIT, 1)))
        expected = self.call(_log_probs, padded, {}, PLAIN)
        try:
            found = self.call(_log_probs, tree, {}, PLAIN)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
            logger.debug("%s reads no trees: %s", type(self.model).__name__, error)
            return False
        by_row = dict(zip(order, padded.entries, strict=True))
        same = [entry for number in tree_order for entry in by_row[number]]
        return _is_near(found[[entry for of_row in tree.entries for entry in of_row]], expected[same])

    def score(self, batch: Batch, features: Features, ways: Ways | None = None) -> list[float]:
        """The score of each row of a batch: the sum of the log-probabilities of its scored tokens."""
        found = self.call(_log_probs, batch, features, ways or self.find_ways()).tolist()
        # Exact sums: the same addends in another order are the same score.
        return [math.fsum(found[entry] for entry in of_row) for of_row in batch.entries]


def find_window(config: PretrainedConfig) -> int | None:
    """Behind how many tokens some layer of a model forgets the first ones, as far as its configuration says it."""
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size"))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def _build_trial_rows(vocabulary: int) -> list[TokenRow]:
    """Rows of ordinary tokens, two of which begin with the same six and a third with the first two of these."""
    # Neither the first ids nor the last: special tokens and those of images lie there.
    step = max(vocabulary // 100, 1)
    ids = [(vocabulary // 8 + step * i) % vocabulary for i in range(41)]
    rows = (ids[:18], ids[:6] + ids[18:27], ids[:2] + ids[27:33], ids[33:])
    return [TokenRow(tuple(row), tuple(range(1, len(row)))) for row in rows]


def _is_near(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:  # A model adds logits behind those of its head.
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _log_probs(model: PreTrainedModel, batch: Batch, features: Features, ways: Ways) -> Tensor:
    """The log-probability of each target of a batch: float64 (targets,), on the CPU."""
    run, head = _run(model, batch, features, ways), model.get_output_embeddings()
    positions_each, ids_each = _HEAD_CPU if model.device.type == "cpu" else _HEAD_GPU
    # A head that is a matrix and nothing else can be read in blocks of its rows.
    in_blocks = ways.head and type(head) is nn.Linear
    each = (
        positions_each if in_blocks else max(positions_each * ids_each // model.config.get_text_config().vocab_size, 1)
    )
    found = torch.empty(len(batch.targets), dtype=torch.float64)
    for start in range(0, len(batch.positions), each):
        positions = batch.positions[start : start + each]
        first, last = torch.searchsorted(batch.places, torch.tensor([start, start + len(positions)])).tolist()
        places = (batch.places[first:last] - start).to(model.device)  # (targets of the chunk,)
        targets = batch.targets[first:last].to(model.device)
        if in_blocks:
            own, total = _read_in_blocks(cast(nn.Linear, head), run.hidden_at(positions), places, targets, ids_each)
        else:
            logits = _at_least_float32(run.logits_at(positions))  # (chunk, vocabulary)
            own, total = logits[places, targets], logits.logsumexp(1)
        found[first:last] = own.double().cpu() - total[places].double().cpu()
    return found


def _read_in_blocks(
    head: nn.Linear, hidden: Tensor, places: Tensor, targets: Tensor, ids_each: int
) -> tuple[Tensor, Tensor]:
    """The logits of targets, (targets,), and the logarithms of the sums over all ids, (chunk,).

    Full logits are never in memory: blocks that fit a cache take two thirds of the time.

    Args:
        head: with weights (vocabulary, width).
        hidden: (chunk, width).
        places: int64 (targets,), in which of the chunk's positions each is wanted.
        targets: int64 (targets,).
        ids_each: entries of the vocabulary in a block.
    """
    # The rows of the head that targets have, not the product with all of it.
    own = (hidden[places] * head.weight[targets]).sum(1)  # (targets,)
    own = _at_least_float32(own if head.bias is None else own + head.bias[targets])
    highest = torch.full((len(hidden), 1), -math.inf, dtype=own.dtype, device=own.device)
    total = torch.zeros_like(highest)
    for start in range(0, len(head.weight), ids_each):
        bias = None if head.bias is None else head.bias[start : start + ids_each]
        # (chunk, block)
        logits = _at_least_float32(nn.functional.linear(hidden, head.weight[start : start + ids_each], bias))
        higher = torch.maximum(highest, logits.amax(1, keepdim=True))
        # The sums so far are brought to the new highest logit, as in an online softmax.
        total = total * (highest - higher).exp_() + logits.sub_(higher).exp_().sum(1, keepdim=True)
        highest = higher
    return own, (total.log() + highest)[:, 0]


def _at_least_float32(values: Tensor) -> Tensor:
    """Values in float32, whatever a model runs in, or in float64 where it does."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _logits_at_all(model: PreTrainedModel, batch: Batch, ways: Ways) -> Tensor:
    """The logits at all positions that a batch wants: (positions, vocabulary)."""
    return _run(model, batch, {}, ways).logits_at(batch.positions)


@dataclass(frozen=True)
class _Run:
    """What a model makes of a batch, at positions of the flattened batch.

    Attributes:
        logits_at: (positions,) to (positions, vocabulary).
        hidden_at: (positions,) to (positions, width), what the head gets; an error where it is not run apart.
    """

    logits_at: Callable[[Tensor], Tensor]
    hidden_at: Callable[[Tensor], Tensor]


def _run(model: PreTrainedModel, batch: Batch, features: Features, ways: Ways) -> _Run:
    """Run a model, or its decoder alone, over a batch."""
    inputs = _prepare_inputs(model, batch, features)
    if ways.head:
        hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)  # (sequences * length, width)
        head = cast(nn.Module, model.get_output_embeddings())

        def hidden_at(positions: Tensor) -> Tensor:
            return hidden[positions.to(hidden.device)]

        return _Run(lambda positions: head(hidden_at(positions)), hidden_at)
    length = batch.keys.shape[1]
    columns = torch.unique(batch.positions % length)  # at which some sequence wants logits
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = columns.to(model.device)
    else:
        columns = torch.arange(length)
    logits = model(**inputs).logits  # (sequences, columns, vocabulary)

    def logits_at(positions: Tensor) -> Tensor:
        return logits[
            (positions // length).to(logits.device), torch.searchsorted(columns, positions % length).to(logits.device)
        ]

    return _Run(logits_at, _no_hidden)


def _no_hidden(positions: Tensor) -> Tensor:
    raise AssertionError("the head was run with the decoder")


def _prepare_inputs(model: PreTrainedModel, batch: Batch, features: Features) -> dict[str, Any]:
    """The arguments of a forward pass over a batch."""
    keys = batch.keys.to(model.device)  # (sequences, length)
    inputs: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if batch.ends is not None:
        inputs["attention_mask"] = batch.tree_mask(model.device, model.dtype)
        inputs["position_ids"] = batch.depths.to(model.device)
    elif not bool(batch.padding_mask.all()):
        inputs["attention_mask"] = batch.padding_mask.long().to(model.device)
    if not features:
        return inputs | {"input_ids": keys}
    seeing = cast("LlavaMetaForCausalLM", model)
    inputs["inputs_embeds"], ids = embed_keys(seeing, keys, features)
    return inputs if batch.ends is not None else inputs | seeing.decoder_inputs(ids)
