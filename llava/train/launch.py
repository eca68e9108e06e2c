"""``python -m llava.train.launch``: torchrun that lets its ranks be asked to stop.

torchrun dies of ``SIGUSR1`` and answers a rank's exit status with its own. Here the signal goes to the
ranks, and the status 85 of a run that was asked to stop comes out. The arguments are torchrun's.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llava.command import run_command
from llava.train.preemption import PREEMPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks; their status 85 is this process's too, of other failures torchrun reports."""
    signal.signal(signal.SIGUSR1, ask_ranks_to_stop)
    words = list(sys.argv[1:] if argv is None else argv)
    parser = run.get_args_parser()
    parser.prog = "python -m llava.train.launch"
    parser.parse_args(words)  # For --help and mistakes: torchrun's own parser would call itself launch.py.
    try:
        run.main(words)
    except ChildFailedError as error:
        # The ranks stop together; torchrun may end one of them on its last lines, after another has gone. One that
        # is asked before it listens dies of the signal, and nothing is lost.
        if any(failure.exitcode in (PREEMPTED, -signal.SIGUSR1) for failure in error.failures.values()):
            return PREEMPTED
        raise
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Whatever became of the ranks: it is no other for a signal now.
    return 0


def ask_ranks_to_stop(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the ranks."""
    for pid in find_ranks():
        os.kill(pid, number)


def find_ranks() -> list[int]:
    """Ids of this process's children that are ranks: torchrun gives them their number in the environment."""
    # Of the main thread, which starts torchrun's ranks; this file is Linux's alone.
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]


if __name__ == "__main__":
    sys.exit(run_command(main))
