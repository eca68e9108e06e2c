"""What makes a rank hang, for runs of the fork server: see ``call`` of ``runs.train``."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

LONG = 1000.0


def sleep_in_decode(sample: str) -> None:
    """Let the media of a sample never come."""
    from llava.data.dataset import SupervisedDataset

    load = SupervisedDataset.load_media

    def load_media(self: Any, record: Any) -> Any:
        if record.id == sample:
            time.sleep(LONG)
        return load(self, record)

    SupervisedDataset.load_media = load_media  # type: ignore[method-assign]


def skip_exchange(call: int) -> None:
    """Do not ask the other ranks once whether to stop."""
    from llava.train.preemption import StopRequest

    agree, calls = StopRequest.agree, [0]

    def skipped(self: Any, device: Any) -> bool:
        calls[0] += 1
        return False if calls[0] == call else agree(self, device)

    StopRequest.agree = skipped  # type: ignore[method-assign]


def stop_in_forward(step: int) -> None:
    """Be stopped, as by SIGSTOP from outside, as the forward pass of a step begins."""
    from llava.train.trainer import LlavaTrainer

    compute = LlavaTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *words: Any, **named: Any) -> Any:
        if self.state.global_step == step - 1:
            from llava import progress

            progress.note(progress.FORWARD, inputs["sample_ids"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return compute(self, model, inputs, *words, **named)

    LlavaTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def be_a_machine(folder: str, sample: str | None = None) -> None:
    """See other files of temporary folders than the other ranks do; and hang in a sample, where one is given."""
    Path(folder).mkdir(exist_ok=True)
    tempfile.tempdir = folder
    if sample is not None:
        sleep_in_decode(sample)
