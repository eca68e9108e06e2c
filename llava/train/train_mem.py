"""``python -m llava.train.train_mem``, or this file's path: ``llava.train.train`` under the LLaVA family's name.

``torchrun --nproc_per_node N llava/train/train_mem.py`` works without an installed package.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # Started by its path: Python looks for modules beside it, not for the package.
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    from llava.train import preemption

    preemption.listen()  # Before anything that takes its time to import.
    from llava.train.command_line import answer_at_once

    if (answered := answer_at_once(sys.argv[1:])) is not None:
        sys.exit(answered)
    from llava.train.train import cli

    sys.exit(cli())
