"""Runs in processes of their own that share one start-up, and the record of what each trained on.

As a program it is a fork server: it imports what training needs once, then forks a process for each command
line that it reads; or, with words, one such run. As a module it is what tests say to it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = "record_{rank}.jsonl"
"""Beside each run: a line for every batch that was trained on, and one for each start."""


def read_record(folder: Path, rank: int = 0) -> list[list[dict[str, Any]]]:
    """The batches of each start of a run: step and samples (a line that a kill cut off is left out)."""
    starts: list[list[dict[str, Any]]] = []
    path = folder / RECORD.format(rank=rank)
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # Cut off, or the empty line that a start begins with.
            continue
        if "start" in entry:
            starts.append([])
        else:
            starts[-1].append(entry)
    return starts


def trained_on(folder: Path, rank: int = 0) -> dict[int, list[Any]]:
    """The samples of each step, as the start that came last trained it."""
    steps: dict[int, list[Any]] = {}
    for start in read_record(folder, rank):
        taken: dict[int, list[Any]] = {}
        for entry in start:
            taken.setdefault(entry["step"], []).append(entry["samples"])
        steps |= taken
    return steps


def losses(folder: Path) -> list[dict[str, float]]:
    """The lines of the log about steps, without times and without what a feature cache had."""
    from llava.train.throughput import RATES

    left_out = {*RATES, "feature_hits", "feature_misses"}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k not in left_out} for entry in history if "loss" in entry]


class ForkServer:
    """Starts runs quickly, and waits for them or ends them.

    Args:
        python: the program.
        **more: variables of its environment, and so of all runs.
    """

    def __init__(self, python: str = sys.executable, **more: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more
        self.statuses: list[int] = []
        self.process = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, argv: list[str], folder: Path, **hooks: Any) -> int:
        """Start a run.

        Args:
            argv: its command line.
            folder: for its record and its output (``said``), made where it is missing.
            hooks: what ``train`` takes beside these.

        Returns:
            Its process id.
        """
        folder.mkdir(parents=True, exist_ok=True)
        return self._ask({"argv": argv, "folder": str(folder), "hooks": hooks})

    def wait(self, pid: int, within: float = 600) -> int:
        """A run's exit status; minus the signal's number if one killed it, as one does that takes more seconds."""
        return self._ask({"wait": pid, "within": within})

    def run(self, argv: list[str], folder: Path, **hooks: Any) -> int:
        return self.wait(self.start(argv, folder, **hooks))

    def start_ranks(
        self, argv: list[str], folder: Path, ranks: int = 2, each: dict[int, dict[str, Any]] | None = None, **hooks: Any
    ) -> list[int]:
        """Start a run on several ranks.

        Args:
            argv, folder: as for ``start``; all ranks have the same.
            ranks: how many.
            each: hooks of ranks, by number.
            hooks: of the first rank, where ``each`` has none for it.

        Returns:
            The process id of each.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        size = str(ranks)
        common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {0: hooks, **(each or {})}
        return [
            self.start(argv, folder, environment={**common, "RANK": str(i), "LOCAL_RANK": str(i)}, **own.get(i, {}))
            for i in range(ranks)
        ]

    def wait_ranks(self, pids: list[int], within: float = 600) -> list[int]:
        """The exit status of each rank, all of which end by themselves; what takes more seconds is killed."""
        end = time.monotonic() + within
        return [self.wait(pid, max(end - time.monotonic(), 0.1)) for pid in pids]

    def run_ranks(self, argv: list[str], folder: Path, ranks: int = 2, **hooks: Any) -> int:
        """A run on several ranks, the first with the hooks; where it ends otherwise than well, the others are killed.

        ``statuses`` has the exit status of every rank afterwards, and this is the first that is not 0.
        """
        first, *others = self.start_ranks(argv, folder, ranks, **hooks)
        self.statuses = [self.wait(first)]
        if self.statuses[0]:
            for pid in others:
                os.kill(pid, signal.SIGKILL)
        self.statuses += [self.wait(pid) for pid in others]
        return next((status for status in self.statuses if status), 0)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, question: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


# --- in the runs themselves ---------------------------------------------------------------------------


def keep_record(folder: Path) -> None:
    """Let the trainer write down what each micro-batch is, as its forward pass sees it."""
    from llava.train.trainer import LlavaTrainer

    path = folder / RECORD.format(rank=int(os.environ.get("RANK", "0")))
    record = path.open("a", buffering=1)
    record.write("\n" + json.dumps({"start": True}) + "\n")
    step = LlavaTrainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        samples = inputs.get("sample_ids", inputs["input_ids"].tolist())
        record.write(json.dumps({"step": self.state.global_step, "time": time.time(), "samples": samples}) + "\n")
        return step(self, model, inputs, *rest)

    LlavaTrainer.training_step = training_step  # type: ignore[method-assign]


class Moments:
    """Counts the accesses to files from the first step on, and kills the process at one of them.

    They are the same in every run, so a moment can be named; most of them are in saves.

    Args:
        moment: its number; None for one that ``place`` names, or for none.
        place: the kind of access, such as ``os.rename``, how the path ends, and how many accesses later.
    """

    def __init__(self, moment: int | None, place: tuple[str, str, int] | None = None) -> None:
        self.moment, self.place, self.count, self.counting = moment, place, 0, False

    def __call__(self, name: str, arguments: Any) -> None:
        if self.counting and name.startswith(("open", "os.", "shutil.")):
            self.count += 1
            kind, end, later = self.place or ("", "", 0)
            if self.moment is None and name == kind and any(str(one).endswith(end) for one in arguments):
                self.moment = self.count + later
            if self.count == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)


def count_moments(moment: int | None = None, place: tuple[str, str, int] | None = None) -> Moments:
    """Let the process kill itself at a moment of the training, see ``Moments``; without one it only counts."""
    from llava.train.trainer import LlavaTrainer

    moments, run_epoch = Moments(moment, place), LlavaTrainer._run_epoch
    sys.addaudithook(moments)

    def counted(self: Any, *words: Any, **named: Any) -> Any:
        moments.counting = True
        return run_epoch(self, *words, **named)

    LlavaTrainer._run_epoch = counted  # type: ignore[method-assign]
    return moments


def signal_in(method: str, step: int, number: int, times: int = 1) -> None:
    """Let the process signal itself so often as it enters a method of the trainer after that step."""
    from llava.train.trainer import LlavaTrainer

    original = getattr(LlavaTrainer, method)

    def signalled(self: Any, *words: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *words, **named)

    setattr(LlavaTrainer, method, signalled)


def train(
    argv: list[str],
    folder: Path,
    moment: int | None = None,
    place: tuple[str, str, int] | None = None,
    inside: dict[str, Any] | None = None,
    call: tuple[str, str, dict[str, Any]] | None = None,
    environment: dict[str, str] | None = None,
) -> int:
    """A whole run, recorded; its exit status.

    Args:
        argv: its command line.
        folder: for its record, and the number of its moments (``moments``), of the first rank's.
        moment, place: when it kills itself, see ``Moments``.
        inside: what ``signal_in`` takes.
        call: a function of a module of tests/faults that is called before the run: module, name, and what it takes.
        environment: variables that are set before, of which a rank is made.
    """
    os.environ.update(environment or {})
    from llava.train.train import cli, main

    keep_record(folder)
    moments = count_moments(moment, place)
    if inside is not None:
        signal_in(**inside)
    if call is not None:
        module, name, given = call
        getattr(importlib.import_module(module), name)(**given)
    status = cli(lambda: main(argv) and None)
    if os.environ.get("RANK", "0") == "0":
        (folder / "moments").write_text(str(moments.count))
    return status


def wait_for(pid: int, within: float) -> int:
    """The status of a child, as waitpid has it; it is killed when the seconds are over."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)  # Ends a stopped process as well.
    return os.waitpid(pid, 0)[1]


def serve() -> None:
    """The fork server: fork a run for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Some modules print while they are imported.
    for module in ("llava.train.train", "deepspeed"):  # accelerate imports the second where it finds it.
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            print(os.waitstatus_to_exitcode(wait_for(question["wait"], question["within"])), file=answers)
            continue
        pid = os.fork()
        if pid:
            print(pid, file=answers)
            continue
        folder = Path(question["folder"])
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 1
        try:
            status = train(question["argv"], folder, **question["hooks"])
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:  # A run of its own, as a rank: its folder, then its command line.
        sys.exit(train(sys.argv[2:], Path(sys.argv[1])))
