"""What a study needs before its first training: what its steps make, and random weights for each seed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llava.data.files import HUB, MIXTURE_SUFFIXES, find_entries
from llava.eval.study.plan import Cell, Study
from llava.io import hash_file, hash_json, lock_file, write_json
from llava.messages import shorten_text

Run = Callable[[Sequence[str], Path, Study], int]
"""Runs a command with its output in a file, and gives its exit status."""


def environment(study: Study) -> dict[str, str]:
    """The environment of commands: the folders of the study come first where Python looks for plug-ins."""
    path = os.pathsep.join(filter(None, [*map(str, study.folders), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_logged(words: Sequence[str], log: Path, study: Study) -> int:
    """Run a command; its output is appended to ``log``."""
    with log.open("ab") as file:
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(study), check=False
        ).returncode


@contextmanager
def locked(study: Study) -> Iterator[None]:
    """One process of a study prepares, the other ones wait: the tasks of a Slurm array all start at once."""
    study.output_dir.mkdir(parents=True, exist_ok=True)
    with (study.output_dir / ".prepare.lock").open("a") as file:
        lock_file(file, wait=True)
        yield


def prepare(study: Study, run: Run = run_logged) -> None:
    """Run the steps that are not done; the caller holds the lock.

    Raises:
        ValueError: a step failed, made nothing, or is another one than that which made what is there.
    """
    for number, step in enumerate(study.prepare, 1):
        words = [study.fill(word) for word in step.words]
        if words[0] in ("python", "python3"):
            # The Python that runs the study: another one may not have this library.
            words[0] = sys.executable
        makes = Path(study.fill(step.makes))
        told = step_command(study, number - 1)
        record = study.output_dir / "prepared" / f"{hash_json(step.makes, 12)}.json"
        if record.is_file():
            check_step(study, number, makes, record)
            if makes.exists():
                continue
        elif makes.exists():  # What a step that was killed left.
            if study.output_dir.resolve() not in makes.resolve().parents:
                raise ValueError(f"{study.path}: prepare, step {number} makes {makes}, which is there, but not by it")
            shutil.rmtree(makes) if makes.is_dir() else makes.unlink()
        print(f"prepare {number}/{len(study.prepare)}: {' '.join(words)}", flush=True)
        makes.parent.mkdir(parents=True, exist_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        log = record.with_suffix(".log")
        start = time.monotonic()
        if status := run(words, log, study):
            raise ValueError(f"{study.path}: prepare, step {number} ended with status {status}: {last_words(log)}")
        # Status 0 and no file: a typo in the name, most likely.
        if not makes.exists():
            raise ValueError(f"{study.path}: prepare, step {number} has not made {makes}; its output is in {log}")
        write_json(record, {"command": told, "makes": step.makes, "seconds": round(time.monotonic() - start, 1)})


def step_command(study: Study, index: int) -> list[str]:
    """A step's command as its record holds it: with the values of the study, without the folders, which may move."""
    words = []
    for word in study.prepare[index].words:
        for name, value in study.values.items():
            word = word.replace(f"{{{name}}}", value)
        words.append(word)
    return words


def check_step(study: Study, number: int, makes: Path, record: Path) -> None:
    """A ValueError where what a step made was made by another command than it has now."""
    before = json.loads(record.read_text(encoding="utf-8"))["command"]
    now = step_command(study, number - 1)
    if before != now:
        was, now_is = (shorten_text(" ".join(words), 300) for words in (before, now))
        raise ValueError(
            f"{study.path}: prepare, step {number} has changed: {makes} was made by {was!r}, which is {now_is!r} now; "
            f"take another --output_dir, or remove {record}, {makes} and the cells that learned from it"
        )


def describe_model(study: Study, cell: Cell) -> dict[str, str]:
    """Hashes of the files that a cell's random weights are made from; none without ``model``."""
    if cell.model is None:
        return {}
    tokenizer = cell.model.config if cell.model.tokenizer is None else cell.model.tokenizer
    return {
        "config": hash_path(Path(study.fill(cell.model.config), "config.json")),
        "tokenizer": hash_path(Path(study.fill(tokenizer), "tokenizer.json")),
    }


def hash_path(path: Path) -> str:
    """A hash of a file's content or, of a folder, of its files; "" for what is not there, such as a recipe's name."""
    if path.is_dir():
        # By their names within the folder, so that it may be moved.
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return hash_json({str(file.relative_to(path)): hash_file(file) for file in files}, 16)
    return hash_file(path)[:16] if path.is_file() else ""


def hash_data(path: Path) -> str:
    """A hash of what a word of ``--data_path`` stands for: of a pattern and of a mixture all the files, too."""
    if path.suffix not in MIXTURE_SUFFIXES and path.exists():
        return hash_path(path)
    if str(path).startswith(HUB):
        return ""
    try:
        entries = find_entries([str(path)])
    except (ValueError, OSError):  # It is yet to be made.
        return ""
    return hash_json([[entry.sampling, [hash_path(Path(file)) for file in entry.files]] for entry in entries], 16)


def create_model(study: Study, cell: Cell) -> None:
    """Write the random weights that a cell starts from, unless they are there; the caller holds the lock."""
    if cell.model is None:
        return
    from llava.model.random_weights import create

    folder, made_from = study.model_folder(cell), describe_model(study, cell)
    record = folder.with_name(f"{folder.name}.json")
    if folder.is_dir() and record.is_file():
        if json.loads(record.read_text(encoding="utf-8")) != made_from:
            raise ValueError(
                f"{study.path}: model: {folder} was made from another configuration or tokenizer; remove it, or take "
                "another --output_dir"
            )
        return
    config = study.fill(cell.model.config)
    tokenizer = None if cell.model.tokenizer is None else study.fill(cell.model.tokenizer)
    if not Path(config, "config.json").is_file():
        raise ValueError(f"{study.path}: model: config {config} has no config.json")
    if tokenizer is not None and not Path(tokenizer).is_dir():
        raise ValueError(f"{study.path}: model: tokenizer {tokenizer}: no such folder")
    shutil.rmtree(folder, ignore_errors=True)  # Of one without a record not all was written.
    number = create(config, str(folder), cell.seed, tokenizer)
    write_json(record, made_from)
    print(f"{folder}: {number:,} random parameters, seed {cell.seed}", flush=True)


def last_words(log: Path) -> str:
    """The last line of a log that says something, and where the log is."""
    lines = log.read_bytes()[-20_000:].decode(errors="replace").replace("\r", "\n").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    # Commands of this library say an error in one such line; a log may have more behind it.
    errors = [line for line in said if line.startswith("error: ")]
    return f"{shorten_text((errors or said or ['no output'])[-1], 400)} ({log})"
