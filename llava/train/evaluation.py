"""What an evaluation counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from llava.constants import IGNORE_INDEX
from llava.types import BadSample


@dataclass
class EvaluationTally:
    """The mean loss over all tokens that an evaluation predicts, and its bad samples.

    However samples are split into batches and over ranks, the mean is the same; transformers' is one over batches,
    where one without a good sample would count as a perfect zero.
    """

    bad: list[BadSample] = field(default_factory=list)
    loss: float = 0.0
    num_tokens: int = 0

    def add(self, batch: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Take in a batch and the mean loss of the tokens that it predicts."""
        # The first label of a row is predicted by nothing.
        num_tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.bad += batch.get("bad_samples", ())
        self.num_tokens += num_tokens
        self.loss += float(loss) * num_tokens

    def mean_loss(self) -> float:
        """The mean over the tokens of all ranks, which call this together; nan where there are none."""
        loss, num_tokens = self.loss, self.num_tokens
        if PartialState().num_processes > 1:
            sums = torch.tensor([loss, num_tokens], dtype=torch.float64, device=PartialState().device)
            loss, num_tokens = reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        return loss / num_tokens if num_tokens else math.nan
