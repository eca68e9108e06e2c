"""``python -m llava.train.train_mem``, or this file's path: ``llava.train.train`` under the LLaVA family's name.

``torchrun --nproc_per_node N llava/train/train_mem.py`` works without an installed package. ``llava train`` begins
here as well: nothing is imported that takes its time before signals are heard and ``--help`` is answered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Train as a command line says; returns the exit status."""
    from llava.train import preemption

    preemption.listen()  # Before anything that takes its time to import.
    from llava.train.command_line import answer_at_once

    if (answered := answer_at_once(argv)) is not None:
        return answered
    from llava.train import train

    return train.cli(partial(train.main, argv))


if __name__ == "__main__":
    if not __package__:  # Started by its path: Python looks for modules beside it, not for the package.
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main(sys.argv[1:]))
