"""Packs: rows of a batch that hold several samples one behind the other, none of which sees another.

Everything but attention looks at one position at a time, and runs over packs as over any rows. Attention runs as for a
batch with a sample a row: queries, keys and values are put together by sample, samples of similar length in one group,
and what comes out is put back. In a group samples are padded on the right, where a causal layer does not look, so that
no mask is needed. A sample cannot see another, then, as it is not there; and attention costs what the samples' own
lengths ask for, not the square of the row's. Three kinds of attention, three ways to the same:

- ``sdpa`` and ``eager`` of transformers' ``AttentionInterface`` get functions beside them that do so (``packed_sdpa``);
- ``flash_attention_2`` takes the lengths of samples in one long row itself;
- a decoder that does without the interface (MPT) gets a mask of all positions of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from llava.compat import attention_of, set_attention

PackLengths = Sequence[Sequence[int]]
"""For each row, the tokens of each of its samples; what is left of the row is padding."""

PREFIX_OF_COPY = "" if __name__.startswith("llava.") else __name__.replace(".", "_") + "_"
"""Before names in transformers' registries: the copy of this code in an exported model has functions of its own."""
_PREFIX = PREFIX_OF_COPY + "packed_"
# Samples up to this length are one group, and longer ones with those of more than half their length.
_SHORT = 16


class Decoder(Protocol):
    """What is needed of a decoder, which is a ``LlavaMetaModel``."""

    has_attention_interface: bool
    config: Any
    dtype: torch.dtype

    def __call__(self, **inputs: Any) -> Any: ...


class _Regroup(torch.autograd.Function):
    """The rows of a tensor in another order, zeros at places to which none goes; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, empty: Tensor, back: Tensor, back_empty: Tensor) -> Tensor:
        ctx.save_for_backward(back, back_empty)
        return rows.index_select(0, index).index_fill_(0, empty, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        back, back_empty = ctx.saved_tensors
        return gradient.index_select(0, back).index_fill_(0, back_empty, 0), None, None, None, None


class _Groups(NamedTuple):
    """Samples in groups: (samples, longest) of each, and how rows become groups and groups rows again.

    Of both ways, an index, and the places to which nothing goes.
    """

    shapes: list[tuple[int, int]]
    source: Tensor
    empty: Tensor
    back: Tensor
    back_empty: Tensor


class PackLayout:
    """Where the samples of a batch of packs lie.

    Args:
        lengths: of the samples of each row.
        row_length: positions of a row.
        device: of the model.

    Attributes:
        was_used: whether attention has asked for it.
    """

    def __init__(self, lengths: PackLengths, row_length: int, device: torch.device) -> None:
        if any(sum(row) > row_length for row in lengths):
            raise ValueError(
                f"pack_lengths add up to {max(sum(row) for row in lengths)} tokens in a row of {row_length}"
            )
        self.lengths, self.row_length, self.device = lengths, row_length, device
        self.was_used = False

    @cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample, where it begins in the rows one behind the other, and its length."""
        starts, sizes = [], []
        for number, row in enumerate(self.lengths):
            starts.append(number * self.row_length + np.cumsum([0, *row[:-1]]))
            sizes.append(np.asarray(row, np.int64))
        return np.concatenate(starts), np.concatenate(sizes)

    @cached_property
    def _first(self) -> np.ndarray:
        """(rows * row_length,): where the sample of each position begins; a padding position is one of its own."""
        first = np.arange(len(self.lengths) * self.row_length)
        starts, sizes = self._samples
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            first[start : start + size] = start
        return first

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 (rows, row_length): 0, 1, 2 ... in each sample."""
        return self._on_device((np.arange(len(self._first)) - self._first).reshape(-1, self.row_length))

    @cached_property
    def first_positions(self) -> Tensor:
        """int64 (rows, row_length): the place in the row at which each position's sample begins."""
        return self._on_device((self._first % self.row_length).reshape(-1, self.row_length))

    @cached_property
    def attention_mask(self) -> Tensor:
        """int64 (rows, row_length): one where a sample is, zero where a row is padded."""
        ends = np.array([[sum(row)] for row in self.lengths])
        return self._on_device((np.arange(self.row_length) < ends).astype(np.int64))

    def block_mask(self, dtype: torch.dtype) -> Tensor:
        """(rows, 1, row_length, row_length) to be added to scores: 0 within a sample and before a position."""
        first = self.first_positions
        seen = (first[:, :, None] == first[:, None, :]).tril()[:, None]  # (rows, 1, queries, keys)
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    @cached_property
    def sequence_ends(self) -> tuple[Tensor, int]:
        """int32 (samples + 1,) where samples begin and end in the rows one behind the other, and the longest length.

        The padding behind a row is a sample here.
        """
        starts, sizes = self._samples
        ends = np.unique(np.concatenate([starts, starts + sizes, [len(self._first)]])).astype(np.int32)
        return self._on_device(ends), int(np.diff(ends).max())

    @cached_property
    def groups(self) -> _Groups:
        """The samples in groups of similar length, the longest first."""
        starts, sizes = self._samples
        order = np.argsort(-sizes, kind="stable")
        starts, sizes = starts[order], sizes[order]
        total = len(self.lengths) * self.row_length
        shapes, places, begin = [], [], 0
        while begin < len(sizes):
            longest = int(sizes[begin])
            shortest = 1 if longest <= _SHORT else longest // 2 + 1
            end = int(np.searchsorted(-sizes, -shortest, side="right"))
            within = starts[begin:end, None] + np.arange(longest)  # (samples, longest)
            places.append(np.where(np.arange(longest) < sizes[begin:end, None], within, total).ravel())
            shapes.append((end - begin, longest))
            begin = end
        index = np.concatenate(places)
        back = np.full(total + 1, len(index))
        back[index] = np.arange(len(index))
        # What points behind the end has no counterpart: it reads the first, and is filled with zeros.
        empty, back_empty = np.flatnonzero(index == total), np.flatnonzero(back[:-1] == len(index))
        index[empty] = 0
        back[back_empty] = 0
        return _Groups(shapes, *map(self._on_device, (index, empty, back[:-1], back_empty)))

    def split(self, states: Tensor) -> list[Tensor]:
        """(rows, row_length, ...) by sample: (samples, longest, ...) for each group, zeros behind their ends."""
        self.was_used = True
        shapes, *indices = self.groups
        parts = _Regroup.apply(states.flatten(0, 1), *indices).split([samples * longest for samples, longest in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``, with zeros where rows are padded."""
        _, index, empty, back, back_empty = self.groups
        grouped = torch.cat([group.flatten(0, 1) for group in groups])
        return _Regroup.apply(grouped, back, back_empty, index, empty).unflatten(0, (-1, self.row_length))


@dataclass(frozen=True)
class PackedMask:
    """What attention functions for packs are given as their mask: the layout, and what each group's mask is."""

    layout: PackLayout
    groups: Sequence[Tensor | None]


_CURRENT: ContextVar[PackLayout | None] = ContextVar("_CURRENT", default=None)


def current_layout() -> PackLayout | None:
    """The layout of the batch that is on its way through a decoder; None where it has a sample a row."""
    return _CURRENT.get()


@contextmanager
def _within(layout: PackLayout) -> Iterator[None]:
    token = _CURRENT.set(layout)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@torch.compiler.disable  # Where samples lie differs from batch to batch.
def make_mask(
    mask_function_of_interface: Callable[..., Tensor | None],
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | PackedMask | None:
    """A function for ``AttentionMaskInterface``: the mask of each group of samples, where there are packs."""
    layout = current_layout()
    if layout is None:
        shape = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        return mask_function_of_interface(**shape, attention_mask=attention_mask, **kwargs)
    groups = [
        mask_function_of_interface(batch_size=1, q_length=longest, kv_length=longest, attention_mask=None, **kwargs)
        for _, longest in layout.groups.shapes
    ]
    return PackedMask(layout, groups)


def attend(
    attention_function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """A function for ``AttentionInterface``: by sample, where there are packs.

    Args:
        attention_function: of the interface.
        query, key, value: (rows, heads, row_length, head width).
        attention_mask: as ``make_mask`` made it.

    Returns:
        (rows, row_length, heads, head width), and None or attention weights.
    """
    if isinstance(attention_mask, PackedMask):
        return _attend_by_sample(attention_function, module, (query, key, value), attention_mask, **kwargs), None
    return attention_function(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable
def _attend_by_sample(
    attention_function: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    packed: PackedMask,
    **kwargs: object,
) -> Tensor:
    split = [packed.layout.split(own.transpose(1, 2)) for own in states]
    results = []
    for mask, *parts in zip(packed.groups, *split, strict=True):
        by_heads = [part.transpose(1, 2) for part in parts]  # (samples, heads, longest, head width)
        results.append(attention_function(module, *by_heads, mask, **kwargs)[0])  # (samples, longest, heads, ...)
    return packed.layout.join(results)


def eager_attention(module: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    """The eager attention of the model that a layer belongs to; each model of transformers has its own."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


AttentionInterface.register(_PREFIX + "sdpa", partial(attend, sdpa_attention_forward))
AttentionInterface.register(_PREFIX + "eager", partial(attend, eager_attention))
AttentionMaskInterface.register(_PREFIX + "sdpa", partial(make_mask, sdpa_mask))
AttentionMaskInterface.register(_PREFIX + "eager", partial(make_mask, eager_mask))


def run_decoder(decoder: Decoder, pack_lengths: PackLengths | None, **inputs: Any) -> Any:
    """A decoder's output, over rows of one sample or of several.

    Args:
        decoder: of a language model. With packs its attention functions become those for packs, which do for other
            batches what they did before.
        pack_lengths: of rows with several samples; None where a row is one.
        **inputs: of the decoder; with packs, positions and what is seen are those within the samples.

    Raises:
        ValueError: the decoder cannot keep samples apart.
    """
    if pack_lengths is None:
        return decoder(**inputs)
    rows = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
    layout = PackLayout(pack_lengths, rows.shape[1], rows.device)
    # Without a mask transformers would look for samples in the positions itself, and find them at other places.
    inputs |= {"position_ids": layout.position_ids, "attention_mask": layout.attention_mask, "use_cache": False}
    attention = attention_of(decoder.config)
    if not decoder.has_attention_interface:
        inputs["attention_mask"] = layout.block_mask(decoder.dtype)
    elif attention == "flash_attention_2":
        return _run_in_one_row(decoder, layout, inputs)
    elif attention in ("sdpa", "eager"):
        # For good, not for this call: gradient checkpointing runs layers again in the backward pass.
        set_attention(decoder.config, _PREFIX + attention)
    with _within(layout):
        outputs = decoder(**inputs)
    if decoder.has_attention_interface and not layout.was_used:
        raise ValueError(
            f"the attention of {type(decoder).__name__} ({attention}) would let the samples of a pack see each other; "
            "take --attn_implementation sdpa or eager, leave out --packing, or say has_attention_interface = False in "
            "its decoder if it takes masks of (batch, 1, queries, keys) (docs/extending.md)"
        )
    return outputs


def _run_in_one_row(decoder: Decoder, layout: PackLayout, inputs: dict[str, Any]) -> BaseModelOutputWithPast:
    """With all rows one behind the other, as flash attention takes samples of different lengths."""
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].flatten(0, 1)[None]  # (1, rows * row_length, ...)
    ends, longest = layout.sequence_ends
    outputs: BaseModelOutputWithPast = decoder(
        **inputs | {"attention_mask": None}, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest,
        max_length_k=longest,
    )  # fmt: skip
    assert outputs.last_hidden_state is not None
    outputs.last_hidden_state = outputs.last_hidden_state[0].unflatten(0, (-1, layout.row_length))
    return outputs
