"""The cells of a study: what each is, how far it has come, and its training in a process of its own."""

from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypedDict

from llava.eval import list_versions
from llava.eval.study.plan import Cell, Study, as_word
from llava.eval.study.prepare import describe_model, environment, hash_data, hash_path, last_words
from llava.io import append_json_lines, read_json_lines, write_json
from llava.messages import shorten

CELL, TRAINED, ATTEMPTS, LOG = "cell.json", "trained.json", "attempts.jsonl", "train.log"
STOPPED = 85
"""Exit status of a training that was asked to stop and can be gone on with."""
_UNCOUNTED = (
    "logging_", "save_", "dataloader_num_workers", "dataloader_p", "report_to", "run_name", "disable_tqdm",
    "data_cache_dir", "score_", "sample_", "num_samples", "run_report", "peak_flops",
)  # fmt: skip
"""Beginnings of flags that leave what is learned as it is: they may change between two cells, or after one."""
_PAUSE = 0.5
_SECONDS_BETWEEN_LINES = 60.0
_STEP = re.compile(r"\b(\d+)/(\d+) \[")

Start = Callable[[Sequence[str], Path, Study, Callable[[str], None]], int]
"""Runs a training with its output in a file, calls back with what it says of its progress, gives its exit status."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """A training was asked to stop; the same command goes on with it."""


class Trained(TypedDict):
    """What ``trained.json`` holds of a cell whose training is done."""

    words: int | None
    answer_words: int | None
    steps: int | None
    loss: float | None
    eval_loss: float | None
    seconds: float
    attempts: int
    versions: dict[str, str]
    device: str


def describe(study: Study, cell: Cell) -> dict[str, object]:
    """What makes a cell this one, as ``cell.json`` has it: flags, recipe, data, initial weights, plug-ins.

    Paths are told as the study's file does; files by a hash of their content, so that they may move.
    """
    flags = {
        name: [as_word(part) for part in value] if isinstance(value, list) else as_word(value)
        for name, value in cell.flags.items()
        if not name.startswith(_UNCOUNTED)
    }
    files = {}
    for name, value in flags.items():
        if name.endswith(("data_path", "config")):
            hash_named = hash_data if name.endswith("data_path") else hash_path
            for path in value if isinstance(value, list) else [value]:
                files[path] = hash_named(Path(study.fill(path)))
    content: dict[str, object] = {"variant": cell.variant, "seed": cell.seed, "flags": flags, "files": files}
    # Only values that flags name: others are those of steps, whose records have them.
    content["values"] = {name: value for name, value in study.values.items() if f"{{{name}}}" in json.dumps(flags)}
    content["model"] = describe_model(study, cell)
    content["plugins"] = {
        name: next(filter(None, (hash_path(folder / f"{name.replace('.', '/')}.py") for folder in study.folders)), "")
        for name in study.plugins
    }
    content["processes"] = study.processes
    return content


def check_unchanged(study: Study, cell: Cell) -> None:
    """A ValueError where a cell that was begun is another one now."""
    path = study.folder(cell) / CELL
    if not path.is_file():
        return
    before, now = flatten(json.loads(path.read_text(encoding="utf-8"))), flatten(describe(study, cell))
    changes = [
        f"{key} was {_show(before.get(key))} and is {_show(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"{study.path}: {cell.name} was trained as something else: {'; '.join(changes[:3])}{more}; give the "
            f"variant another name, take another --output_dir, or remove {study.folder(cell)}"
        )


def flatten(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested names joined by dots."""
    found: dict[str, object] = {}
    for name, part in value.items():
        if isinstance(part, Mapping):
            found |= flatten(part, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = part
    return found


def _show(value: object) -> str:
    return "not given" if value is None else shorten(value)


def state(study: Study, cell: Cell) -> str:
    """How far a cell has come: new, begun or trained."""
    folder = study.folder(cell)
    return "trained" if (folder / TRAINED).is_file() else "begun" if (folder / CELL).is_file() else "new"


def read_trained(study: Study, cell: Cell) -> Trained:
    content: Trained = json.loads((study.folder(cell) / TRAINED).read_text(encoding="utf-8"))
    return content


# Training.


def train(study: Study, cell: Cell, start: Start, show: Callable[[str], None]) -> None:
    """Train a cell, or go on with it.

    Args:
        start: what runs the training.
        show: gets the lines of its progress.

    Raises:
        ValueError: the training failed; names its log.
        Stopped: it was asked to stop.
    """
    folder = study.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    # Before anything is trained: what the cell was begun as is what it is held against later.
    if not (folder / CELL).is_file():
        write_json(folder / CELL, describe(study, cell))
    begin = time.time()
    note_attempt(folder, event="start", at=begin)
    # Training looks for its own last checkpoint: the command that goes on is the one that starts.
    words, log = study.train_command(cell), folder / LOG
    with log.open("a", encoding="utf-8") as file:
        print(f"$ {' '.join(words)}", file=file)
    status = start(words, log, study, show)
    note_attempt(folder, event="end", at=time.time(), status=status)
    if status == STOPPED or -status in list_signals():  # So early that it did not listen yet.
        raise Stopped
    if status:
        raise ValueError(f"{study.path}: {cell.name}: its training ended with status {status}: {last_words(log)}")
    write_json(folder / TRAINED, measure(study, cell))


def note_attempt(folder: Path, **entry: object) -> None:
    with (folder / ATTEMPTS).open("ab") as file:
        append_json_lines(file, [entry])


def measure(study: Study, cell: Cell) -> Trained:
    """What is known of a training that has ended."""
    folder, run = study.folder(cell), study.run_folder(cell)
    last = read_last_exposure(run)
    steps, loss = None, None
    if (run / "trainer_state.json").is_file():
        told = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
        steps = told.get("global_step")
        loss = next((entry["train_loss"] for entry in reversed(told["log_history"]) if "train_loss" in entry), None)
    eval_loss = None
    if (evaluated := run / "eval_results.json").is_file():
        eval_loss = json.loads(evaluated.read_text(encoding="utf-8")).get("eval_loss")
    attempts = read_json_lines(folder / ATTEMPTS)
    return {
        "words": last.get("words"),
        "answer_words": last.get("answer_words"),
        "steps": steps,
        "loss": loss,
        "eval_loss": eval_loss,
        "seconds": round(sum_attempts(attempts), 1),
        "attempts": sum(entry["event"] == "start" for entry in attempts),
        "versions": list_versions(),
        "device": device_name(),
    }  # fmt: skip


def read_last_exposure(run: Path) -> dict[str, int]:
    """The last counts of words that a training wrote; none where it wrote none."""
    path = run / "exposure.jsonl"
    rows = read_json_lines(path) if path.is_file() else []
    return rows[-1] if rows else {}


def sum_attempts(attempts: Sequence[Mapping[str, float]]) -> float:
    """Seconds that a cell was trained for; of an attempt that was killed nothing is known, and nothing counted."""
    seconds, begin = 0.0, None
    for entry in attempts:
        if entry["event"] == "start":
            # A start behind a start: the one before was killed, and its end is not known.
            begin = entry["at"]
        elif begin is not None:
            seconds, begin = seconds + entry["at"] - begin, None
    return seconds


def device_name() -> str:
    """The GPU, else the processor and its architecture."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def start_training(words: Sequence[str], log: Path, study: Study, show: Callable[[str], None]) -> int:
    """Run a training as a process of its own; a signal that asks this process to stop goes on to it."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment(study)
        )
    said_at, said = time.monotonic(), ""
    with _forwarding(process):
        while process.poll() is None:
            try:
                process.wait(_PAUSE)
            except subprocess.TimeoutExpired:
                progress = read_progress(log)
                due = sys.stderr.isatty() or time.monotonic() - said_at > _SECONDS_BETWEEN_LINES
                if progress and progress != said and due:
                    said_at, said = time.monotonic(), progress
                    show(progress)
    return process.returncode


def list_signals() -> list[int]:
    """SIGTERM and, where the system has it, SIGUSR1."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM and SIGUSR1 on to a process."""

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in list_signals()}
    try:
        yield
    except KeyboardInterrupt:  # The terminal has sent it to the training as well.
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_progress(log: Path) -> str:
    """The step and the number of steps that the end of a training's output tells."""
    with log.open("rb") as file:
        # The end alone: a log of days is read twice a second.
        file.seek(max(0, log.stat().st_size - 4000))
        found = _STEP.findall(file.read().decode(errors="replace"))
    return f"step {found[-1][0]} of {found[-1][1]}" if found else ""
