"""Flags of what a long run is watched for, in a group that ``arguments.TrainingArguments`` is made of.

They are written as ``arguments.py`` says, and checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DDP_TIMEOUT = 1800
"""Seconds that transformers lets an exchange between ranks take, where --ddp_timeout does not say otherwise."""
MARGIN = 600
"""Seconds that an exchange is given beyond --hang_timeout, so that the watchdog, which knows more, speaks first."""


@dataclass
class ReliabilityArguments:
    """What ends a run that goes wrong without an error."""

    # --- reliability ---
    hang_timeout: float = 1800.0
    """End the run, with exit status 110, when no rank has moved for so many seconds: which rank never came, what it was
    doing and with which samples is said, and the stacks of all ranks are in OUTPUT_DIR/hang-STEP (default 1800; 0
    watches nothing)."""

    verify_steps: int | None = None
    """Compute the first step of a start, and then every so many, twice from the same state, and compare both bit for
    bit, and what all ranks hold: a difference stops the run, with rank, step and place. What is trained stays the same,
    bit for bit (default: never; 100 costs about 1 to 2 %)."""
    deterministic: bool = False
    """Take kernels alone that give the same bits each time; an operation that has none is an error. What a CPU computes
    is the same without it (docs/reliability.md)."""

    def prepare_reliability(self) -> None:
        """Before transformers reads its own flags: let exchanges between ranks last until the watchdog has spoken."""
        timeout = getattr(self, "ddp_timeout", None)
        if timeout == DDP_TIMEOUT and 0 < self.hang_timeout < math.inf:
            self.ddp_timeout = max(timeout, math.ceil(self.hang_timeout) + MARGIN)

    def check_reliability(self) -> None:
        """A ValueError for values that mean nothing."""
        if not (self.hang_timeout == 0 or 1 <= self.hang_timeout < math.inf):
            raise ValueError(
                f"--hang_timeout is {self.hang_timeout:g}; it is a number of seconds, at least 1, or 0 to watch nothing"
            )
        if self.verify_steps is None:
            return
        if self.verify_steps < 1:
            raise ValueError(f"--verify_steps is {self.verify_steps}; it must be at least 1, or leave it out")
        engine = getattr(self, "hf_deepspeed_config", None)
        if engine is not None and engine.is_zero3():
            raise ValueError(
                "--verify_steps compares what several ranks hold, and --deepspeed gives each of them another part "
                "(ZeRO-3); give zero2, or leave it out"
            )
        if getattr(self, "fsdp", None):
            raise ValueError(
                "--verify_steps compares what several ranks hold, and --fsdp gives each of them another part; leave "
                "one of the two out"
            )
