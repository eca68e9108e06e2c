"""``python -m llava.train.launch``: torchrun that lets its ranks be asked to stop.

torchrun dies of ``SIGUSR1`` and answers a rank's exit status with its own. Here the signal goes to the
ranks, and the status 85 of a run that was asked to stop comes out. The arguments are torchrun's.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from llava.command import FAILED, CommandParser, program_name, run_command
from llava.train.preemption import HUNG, PREEMPTED

PROGRAM = "python -m llava.train.launch"
_PAUSE = 0.2  # seconds between two looks for ranks that are not started yet


def main(argv: Sequence[str] | None = None, stop_at_term: bool = False) -> int:
    """Run the ranks; their status 2, 85 or 110 is this process's too, of other failures torchrun reports.

    Args:
        argv: torchrun's words; by default this process's.
        stop_at_term: whether SIGTERM asks the ranks to stop as SIGUSR1 does, in place of torchrun's answer, which kills
            ranks that take longer than 30 seconds to save.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):  # Further behind they may be the training's.
        read_parser().print_help()
        return 0
    signal.signal(signal.SIGUSR1, ask_ranks_to_stop)
    if stop_at_term:
        signal.signal(signal.SIGTERM, ask_ranks_to_stop)
        words = ["--signals_to_handle", "SIGINT,SIGHUP,SIGQUIT", *words]

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = run.get_args_parser()
    parser.prog = program_name(PROGRAM)
    parser.parse_args(words)  # For mistakes: torchrun's own parser would call itself launch.py.
    try:
        run.main(words)
    except ChildFailedError as error:
        # The ranks stop together; torchrun may end one of them on its last lines, after another has gone. One that
        # is asked before it listens dies of the signal, and nothing is lost.
        if any(failure.exitcode in (PREEMPTED, -signal.SIGUSR1) for failure in error.failures.values()):
            return PREEMPTED
        if any(failure.exitcode == HUNG for failure in error.failures.values()):
            return HUNG  # The ranks have said why.
        if any(failure.exitcode == FAILED for failure in error.failures.values()):
            return FAILED  # One has said what is wrong, above torchrun's own lines.
        raise
    except ValueError as error:
        if "Cuda is not available" not in str(error):
            raise
        raise ValueError(
            "--nproc_per_node gpu: no GPU can be seen on this machine; give a number of processes in its place"
        ) from error
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Whatever became of the ranks: it is no other for a signal now.
        if stop_at_term:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


def read_parser() -> CommandParser:
    """torchrun's flags and their help as its source has them: to import it takes a second.

    It reads no values.
    """
    parser = CommandParser(
        prog=PROGRAM,
        usage="%(prog)s [--FLAG VALUE ...] -m MODULE [WORDS OF THE MODULE ...]",
        description="Start a training as several processes, a rank each: torchrun, with all its flags. SIGUSR1 goes to "
        "the ranks. Their exit status 2 for an error, 85 of a run that was asked to stop, and 110 of one that hung, is "
        "this command's too.",
    )
    spec = importlib.util.find_spec("torch")
    source = Path(spec.submodule_search_locations[0]) / "distributed" / "run.py" if spec else Path()  # type: ignore[index]
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")) if source.is_file() else ast.Module([], [])):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        ):
            continue
        names = [name.value for name in node.args if isinstance(name, ast.Constant)]
        told = {word.arg: word.value for word in node.keywords}
        text = told.get("help")
        if names and all(str(name).startswith("-") for name in names):
            switch = isinstance(action := told.get("action"), ast.Name) and action.id == "check_env"
            help_text = str(text.value).replace("%", "%%") if isinstance(text, ast.Constant) else None
            how = {"action": "store_true"} if switch else {"metavar": str(names[-1]).lstrip("-").upper()}
            parser.add_argument(*map(str, names), help=help_text, **how)  # type: ignore[arg-type]
    return parser


def ask_ranks_to_stop(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the ranks, as SIGUSR1, or once they are started."""
    if not (ranks := find_ranks()):
        # torchrun is being imported, or waits for other nodes: a signal that came now would be lost.
        timer = threading.Timer(_PAUSE, ask_ranks_to_stop, (number, None))
        timer.daemon = True
        timer.start()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)


def find_ranks() -> list[int]:
    """Ids of this process's children that are ranks: torchrun gives them their number in the environment."""
    # Of the main thread, which starts torchrun's ranks; this file is Linux's alone.
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"\0LOCAL_RANK=" in b"\0" + _read_environment(pid)]


def _read_environment(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # It has ended.
        return b""


if __name__ == "__main__":
    sys.exit(run_command(main))
