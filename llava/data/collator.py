"""From examples to a batch, bad samples aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX
from llava.types import NO_COORDINATES, BadSample, Batch, Coordinates, Example

_ABOUT_SAMPLES = ("sample_ids", "bad_samples", "num_cut", "exposure", "feature_entries")


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

    With ``pack_length`` examples come one behind the other in rows of at most so many tokens, as many as fit; the first
    label of each is then -100, as nothing predicts it. The two examples above become::

        input_ids       [[5, 6, 0, 7, 0]]
        labels          [[-100, 6, 0, -100, 0]]
        attention_mask  [[1, 1, 1, 1, 1]]
        pack_lengths    [[3, 2]]

    and the coordinates of a row's examples are joined. What is told of samples (``sample_ids`` ...) is told of each.

    Args:
        pad_token_id: fills up ``input_ids``.
        pack_length: most tokens of a row with several examples; 0 gives each example a row.
    """

    pad_token_id: int
    pack_length: int = 0

    def __call__(self, samples: Sequence[Example | BadSample]) -> Batch:
        bad_samples = [sample for sample in samples if isinstance(sample, BadSample)]
        examples = [sample for sample in samples if isinstance(sample, Example)]
        # Ranks step together: one without examples computes an exact zero instead of waiting.
        rows = self.arrange(examples) if examples else [[Example("", [self.pad_token_id], [IGNORE_INDEX])]]
        batch = self._pad(rows)
        batch["sample_ids"] = [example.id for example in examples]
        media = [item for example in examples for item in example.media]
        if media:
            batch["images"] = [item.frames for item in media]
            batch["modalities"] = [item.kind for item in media]
            batch["image_sizes"] = [item.original_size for item in media]
        if any(item.entry is not None for item in media):
            batch["feature_entries"] = [item.entry for item in media]
        # Keys are there only if a row has something for them: forward's defaults stand for the others.
        if any(example.coordinates != NO_COORDINATES for example in examples):
            batch["variables"] = [join_coordinates(row).to_variables() for row in rows]
        if any(example.num_cut for example in examples):
            batch["num_cut"] = [example.num_cut for example in examples]
        if exposure := [example.exposure for example in examples if example.exposure is not None]:
            batch["exposure"] = exposure
        if bad_samples:  # Workers cannot write the log: the trainer does, from all ranks together.
            batch["bad_samples"] = bad_samples
        return batch

    def arrange(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The examples of each row, in their order: one, or as many as fit a pack."""
        rows: list[list[Example]] = []
        room = 0
        for example in examples:
            room -= len(example.input_ids)
            if room < 0 or not self.pack_length:
                rows.append([])
                room = self.pack_length - len(example.input_ids)
            rows[-1].append(example)
        return rows

    def _pad(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """The tensors of a batch, each int64 (rows, longest)."""
        ids = [torch.tensor([i for example in row for i in example.input_ids]) for row in rows]
        if self.pack_length:
            labels = [torch.tensor([x for e in row for x in (IGNORE_INDEX, *e.labels[1:])]) for row in rows]
        else:
            labels = [torch.tensor(row[0].labels) for row in rows]
        ones = [torch.ones_like(row) for row in ids]  # From lengths: a padding id may be a real end of text.
        batch = Batch(
            input_ids=pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=pad_sequence(ones, batch_first=True),
        )
        if self.pack_length:
            batch["pack_lengths"] = [[len(example.input_ids) for example in row] for row in rows]
        return batch


def join_coordinates(examples: Sequence[Example]) -> Coordinates:
    """The coordinates of examples one behind the other."""
    if len(examples) == 1:
        return examples[0].coordinates
    together = (vars(example.coordinates) for example in examples)
    lists = zip(*(lists.values() for lists in together), strict=True)
    return Coordinates(*(tuple(number for numbers in kind for number in numbers) for kind in lists))
