"""What a run has presented to its model: counted on the batches that it trains on, kept in checkpoints, written down.

``exposure.jsonl`` in the output folder has a line for each line of the log, for each milestone and for the end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.io import append_json_lines, appending, read_json_lines, write_beside
from llava.train.preemption import StopRequest
from llava.types import EXPOSURE_COUNTS

logger = logging.getLogger(__name__)

EXPOSURE_FILE = "exposure.jsonl"
EXPOSURE_STATE = "exposure.json"
"""File of a checkpoint: what was presented up to its step, over all ranks, by source."""

LOG, MILESTONE, END, STOPPED = "log", "milestone", "end", "stopped"
"""The events that have a line; a run that is gone on with drops its ``end`` or ``stopped``."""

_WORDS = EXPOSURE_COUNTS.index("words")
_VIDEO_MS = "video_ms"


class ExposureLog(TrainerCallback):
    """Counts what batches present, in the order in which they are trained on, and writes it down.

    Each rank counts its own batches; sums over ranks are made where they are needed, by all ranks together.

    Args:
        dataset: trained on; of one that is not of this library nothing is counted.
        output_dir: where ``exposure.jsonl`` is written.
        stop_request: tells whether a run that ends was only stopped.

    Attributes:
        sources: the names that are counted under: those of the data, then those that only an earlier part of the
            run has had.
    """

    def __init__(self, dataset: object, output_dir: Path, stop_request: StopRequest) -> None:
        self.sources: list[str] = list(getattr(dataset, "sources", ()))
        self.path = output_dir / EXPOSURE_FILE
        self.stop_request = stop_request
        self._own = self._zeros()  # of this rank, since the run was started or resumed
        self._before = self._zeros()  # of all ranks, up to the checkpoint that the run went on from

    @property
    def is_counting(self) -> bool:
        """Whether samples say what they present."""
        return bool(self.sources)

    def _zeros(self) -> NDArray[np.int64]:
        return np.zeros((len(self.sources), len(EXPOSURE_COUNTS)), np.int64)

    def add(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take in, and out of them, what the micro-batches of a step present; they are trained on right after."""
        for batch in batches:
            for exposure in batch.pop("exposure", ()):
                if self.is_counting:  # Samples of this library may come from a dataset of one's own.
                    self._own[exposure.source] += exposure.counts

    def total(self) -> NDArray[np.int64]:
        """What all ranks have presented, int64 (sources, counts); all ranks call this together."""
        own = self._own
        if PartialState().num_processes > 1:
            summed: torch.Tensor = reduce(torch.from_numpy(own).to(PartialState().device), reduction="sum")
            own = summed.cpu().numpy()
        return self._before + own

    def count_words(self) -> int:
        """Words that all ranks have presented; all ranks call this together."""
        return int(self.total()[:, _WORDS].sum())

    # In a checkpoint.

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on from here; all ranks call this together."""
        total = self.total().tolist()
        by_source = zip(self.sources, total, strict=True)
        return {"sources": {name: dict(zip(EXPOSURE_COUNTS, counts, strict=True)) for name, counts in by_source}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting from another run's numbers."""
        stored: dict[str, dict[str, int]] = state["sources"]
        self.sources = list(dict.fromkeys([*self.sources, *stored]))
        self._own = self._zeros()
        rows = [[stored.get(name, {}).get(count, 0) for count in EXPOSURE_COUNTS] for name in self.sources]
        self._before = np.array(rows, np.int64).reshape(self._own.shape)

    def load_checkpoint(self, folder: Path, required_for: str | None = None) -> None:
        """Go on counting from a checkpoint.

        Args:
            folder: of the checkpoint.
            required_for: the flag that cannot do without the numbers.

        Raises:
            ValueError: it has none, and a flag needs them.
        """
        path = folder / EXPOSURE_STATE
        if path.is_file():
            self.load_state(json.loads(path.read_text(encoding="utf-8")))
            return
        lacks = f"{folder} has no {EXPOSURE_STATE} (an earlier version wrote it), so nothing tells how many words"
        if required_for is not None:
            raise ValueError(f"{lacks} it was trained on; {required_for} counts from a run's first step: start anew")
        if self.is_counting:
            logger.warning("%s it was trained on: %s counts from here", lacks, EXPOSURE_FILE)

    # Lines.

    def write(self, event: str, state: TrainerState, **more: object) -> None:
        """Append a line; all ranks call this together.

        Args:
            event: what the line is for.
            state: has the step.
            **more: is written in it as well.
        """
        if not self.is_counting:
            return
        total = self.total()
        if state.is_world_process_zero:
            line = {"step": state.global_step, "event": event, **more, **describe(total.sum(0))}
            line["sources"] = {name: describe(counts) for name, counts in zip(self.sources, total, strict=True)}
            with appending(self.path) as file:
                append_json_lines(file, [line])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Begin the file, or cut off what it has behind the step of the checkpoint."""
        if not state.global_step:
            # A trainer may train twice.
            self._own, self._before = self._zeros(), self._zeros()
        if not (self.is_counting and state.is_world_process_zero):
            return
        if not state.global_step:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            kept = [line for line in read_json_lines(self.path) if line["step"] <= state.global_step]
            with write_beside(self.path) as beside, beside.open("wb") as file:
                append_json_lines(file, (line for line in kept if line["event"] not in (END, STOPPED)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """A line for the loss of an interval, and for the end."""
        # Evaluations are logged too, and present nothing that is trained on.
        if "train_runtime" in (logs or {}):
            self.write(STOPPED if self.stop_request.agreed else END, state)
        elif "loss" in (logs or {}):
            self.write(LOG, state)


def describe(counts: NDArray[np.int64]) -> dict[str, int | float]:
    """Counts by their names, as a line has them: seconds of video in place of milliseconds."""
    named: dict[str, int | float] = dict(zip(EXPOSURE_COUNTS, counts.tolist(), strict=True))
    return {
        "seconds_of_video" if name == _VIDEO_MS else name: value / 1000 if name == _VIDEO_MS else value
        for name, value in named.items()
    }
