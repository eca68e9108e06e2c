"""What an evaluation counts, and what training counts of cut samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from llava.constants import IGNORE_INDEX
from llava.data.dataset import SupervisedDataset
from llava.data.survey import survey_cut
from llava.types import BadSample


class CutCounter:
    """Samples whose text was cut to the context since the run was started or resumed, over all ranks.

    Args:
        dataset: trained on; one that knows of no sample that is too long is not counted.
    """

    def __init__(self, dataset: Any) -> None:
        self.samples = self.tokens = 0
        self._may_cut = isinstance(dataset, SupervisedDataset) and bool(survey_cut(dataset).any())

    def add(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Take in the micro-batches of a step; all ranks call this together."""
        if not self._may_cut:
            return
        cut = [number for batch in batches for number in batch.get("num_cut", ()) if number]
        counts = torch.tensor([len(cut), sum(cut)], device=PartialState().device)
        samples, tokens = reduce(counts, reduction="sum").tolist()  # type: ignore[union-attr]
        self.samples += samples
        self.tokens += tokens

    def counts(self) -> dict[str, int]:
        """What the log says of them; nothing where nothing was cut."""
        return {"cut_samples": self.samples, "cut_tokens": self.tokens} if self.samples else {}


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
