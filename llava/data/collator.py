"""From examples to a batch, bad samples aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX
from llava.types import NO_COORDINATES, BadSample, Batch, Example

_ABOUT_SAMPLES = ("sample_ids", "bad_samples", "num_cut", "exposure")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is for the model: all but what it says about its samples."""
    return {name: value for name, value in batch.items() if name not in _ABOUT_SAMPLES}


@dataclass(frozen=True)
class SupervisedCollator:
    """Pads examples on the right to the longest of them.

    The attention mask comes from lengths, not from ids: GPT-2 pads with its end-of-text token, and a
    real one must stay visible and supervised. Two examples of 3 and 2 tokens, the second with an
    image, with padding id 0, become::

        input_ids       [[5, 6, 0], [7, 0, 0]]     the first 0 of each row is its own end of text
        labels          [[5, 6, 0], [7, 0, -100]]
        attention_mask  [[1, 1, 1], [1, 1, 0]]
        images          [uint8 (1, 3, side, side)]  a tensor for each image or video, a frame of it a row
        modalities      ["image"]
        image_sizes     [(480, 640)]
        sample_ids      ["a", "b"]

    Bad samples among them get no row; they are handed on as ``bad_samples``. Where no example is left (all
    were bad, or this rank has none in the last step of an epoch) the batch is empty: a row of one padding
    token without a label, whose loss and gradients are exactly zero, and ``sample_ids`` is ``[]``.

    Args:
        pad_token_id: fills up ``input_ids``.
    """

    pad_token_id: int

    def __call__(self, samples: Sequence[Example | BadSample]) -> Batch:
        bad_samples = [sample for sample in samples if isinstance(sample, BadSample)]
        examples = [sample for sample in samples if isinstance(sample, Example)]
        # Ranks step together: one without examples computes an exact zero instead of waiting.
        batch = self._pad(examples or [Example("", [self.pad_token_id], [IGNORE_INDEX])])
        batch["sample_ids"] = [example.id for example in examples]
        media = [item for example in examples for item in example.media]
        if media:
            batch["images"] = [item.frames for item in media]
            batch["modalities"] = [item.kind for item in media]
            batch["image_sizes"] = [item.original_size for item in media]
        # Keys are there only if a row has something for them: forward's defaults stand for the others.
        if any(example.coordinates != NO_COORDINATES for example in examples):
            batch["variables"] = [example.coordinates.to_variables() for example in examples]
        if any(example.num_cut for example in examples):
            batch["num_cut"] = [example.num_cut for example in examples]
        if exposure := [example.exposure for example in examples if example.exposure is not None]:
            batch["exposure"] = exposure
        if bad_samples:  # Workers cannot write the log: the trainer does, from all ranks together.
            batch["bad_samples"] = bad_samples
        return batch

    def _pad(self, examples: Sequence[Example]) -> Batch:
        """The tensors of a batch, each int64 (examples, longest)."""
        ids = [torch.tensor(example.input_ids) for example in examples]
        labels = [torch.tensor(example.labels) for example in examples]
        ones = [torch.ones_like(row) for row in ids]  # From lengths: a padding id may be a real end of text.
        return Batch(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=pad_sequence(ones, batch_first=True),
        )
