"""The log of the bad samples that a run left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.io import append_json_lines, appending, cut_unfinished_line, read_json_lines
from llava.types import BadSample

logger = logging.getLogger(__name__)

BAD_SAMPLES_FILE = "bad_samples.jsonl"
FEWEST_SEEN = 20
"""Samples that must have been seen before their bad ones can end a run in the middle of an epoch."""


class BadSampleLog(TrainerCallback):
    """A file with one line for each bad sample of a run, whichever rank, worker and epoch met it.

    Lines are ``{"id", "source", "file", "reason", "data_file"}``, written by the first rank as they come in, each on
    disk before training goes on. ``data_file`` is a full path: others may have its name. A resumed run adds to the
    file, a fresh one begins it anew.

    Args:
        path: of the file.
        max_share: of the samples seen since the run was started (or resumed) that may be bad.
    """

    def __init__(self, path: Path, max_share: float) -> None:
        self.path, self.max_share = path, max_share
        self.num_seen = self.num_bad = 0
        self._known: set[tuple[str, str, str]] = set()

    def __len__(self) -> int:
        """How many different samples are bad."""
        return len(self._known)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The share is counted from here: a resumed run does not end for what an earlier part of it has met.
        self.num_seen = self.num_bad = 0
        self._known = set()
        # Samples that earlier parts of the run have logged get no second line.
        if state.global_step:
            self._known = {_key(entry) for entry in read_json_lines(self.path)}
        # Every rank has read before the first one writes.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            cut_unfinished_line(self.path) if state.global_step else self.path.unlink(missing_ok=True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Where a run was asked to stop, its epoch is broken off: a few samples say nothing of the share.
        broken_off = control.should_training_stop and state.global_step < state.max_steps
        if self.num_bad > self.max_share * self.num_seen and not broken_off:
            raise self._too_many()

    def record(self, num_used: int, bad: Sequence[BadSample]) -> None:
        """Take in what every rank met in a step; all ranks call this together.

        Raises:
            ValueError: more than ``max_share`` are bad, on all ranks alike. In the middle of an epoch that
                is said of at least ``FEWEST_SEEN`` samples, and of a number of bad ones three standard
                deviations above what the share makes likely: a few early ones end no run by chance.
        """
        # Summed over ranks before anything is decided, so that all of them end or none does.
        counts = torch.tensor([num_used + len(bad), len(bad)], device=PartialState().device)
        seen, num_bad = reduce(counts, reduction="sum").tolist()  # type: ignore[union-attr]
        self.num_seen += seen
        self.num_bad += num_bad
        if num_bad:
            self._write(gather_object(list(bad)))
        # Mean and standard deviation of a binomial distribution.
        expected = self.max_share * self.num_seen
        chance = 3 * math.sqrt(expected * (1 - self.max_share))
        if self.num_seen >= FEWEST_SEEN and self.num_bad > expected + chance:
            raise self._too_many()

    def add(self, bad: Sequence[BadSample]) -> None:
        """Write down what ranks met outside of training; all ranks call this together, and nothing is counted."""
        self._write(gather_object(list(bad)))

    def _write(self, bad: Sequence[BadSample]) -> None:
        new = {key: sample for sample in bad if (key := _key(asdict(sample))) not in self._known}
        self._known |= set(new)
        if not new or not PartialState().is_main_process:
            return
        for sample in new.values():
            # A name from a data file may hold halves of characters, which no terminal can be sent.
            logger.warning("skipped %s", str(sample).encode("utf-8", "backslashreplace").decode())
        with appending(self.path) as file:
            append_json_lines(file, (sample.to_json(with_data_file=True) for sample in new.values()))

    def _too_many(self) -> ValueError:
        return ValueError(
            f"{self.num_bad} of the {self.num_seen} samples seen are bad, more than --max_bad_share "
            f"{self.max_share:g}; {self.path} lists them: mend or remove them, or raise the share"
        )


def _key(entry: Mapping[str, str]) -> tuple[str, str, str]:
    """What tells a sample from all others: its data file, its place there, and its id."""
    return entry.get("data_file", ""), entry["source"], entry["id"]
