"""A run that hangs ends within its time-out, with a message that names rank, phase and sample; a slow one goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ITALIAN, turns
from runs import ForkServer

from llava import progress
from llava.progress import Note
from llava.train.checkpoint import list_checkpoints
from llava.train.hang_report import Place, RankState, blame, say_note
from llava.train.preemption import HUNG
from llava.train.rank_notes import RankNotes, clear_old
from llava.train.watchdog import UNLIMITED, Watchdog

TIMEOUT = 2.5
PATIENCE = 20.0  # seconds in which a run that hangs after a second or two has ended, on a busy machine
Line = Callable[..., list[str]]


@pytest.fixture(scope="module")
def flags(gpt2_dir: Path, tower_dir: Path, media_dir: Path) -> Line:
    """A run of six steps, in the order of its data: sample-0 and sample-1 are the first step's of two ranks."""
    samples = [
        {"id": f"sample-{i}", "conversations": turns("<image>", f"{i} {ITALIAN[i % 5]}"), "image": "a.png"}
        for i in range(24)
    ]
    data = media_dir / "hangs.json"
    data.write_text(json.dumps(samples))

    def line(output: Path, **changes: object) -> list[str]:
        values = {
            "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "data_path": data, "output_dir": output,
            "max_steps": 6, "per_device_train_batch_size": 1, "report_to": "none", "save_steps": 2, "use_cpu": "true",
            "disable_tqdm": "true", "train_sampling_strategy": "sequential", "resume_from_checkpoint": "auto",
            "hang_timeout": TIMEOUT, "decode_timeout": 0, "run_report": "false", **changes,
        }  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    return line


def run(server: ForkServer, argv: list[str], output: Path, calls: list[tuple | None]) -> tuple[list[int], str]:
    """The statuses of a run in which each rank does what its call says, and its error."""
    each = {rank: {"call": call} for rank, call in enumerate(calls)}
    began = time.monotonic()
    statuses = server.wait_ranks(server.start_ranks(argv, output, len(calls), each), PATIENCE)
    assert time.monotonic() - began < PATIENCE
    said = (output / "said").read_text()
    [error] = [line for line in said.splitlines() if line.startswith("error: no rank has moved")]
    assert "Traceback" not in said
    return statuses, error


def test_a_rank_that_sleeps_in_decode(server: ForkServer, flags: Line, tmp_path: Path) -> None:
    argv = flags(tmp_path)
    statuses, error = run(server, argv, tmp_path, [None, ("hangs", "sleep_in_decode", {"sample": "sample-5"})])
    assert statuses == [HUNG] * 2
    assert "Rank 1 (process " in error
    assert "never came: it is decoding (step 3, sample 'sample-5') [load_media called by load_example" in error
    assert "Rank 0 waits for it, counting the tokens of the step with the other ranks (step 3)" in error
    assert f"The last whole checkpoint is {tmp_path / 'checkpoint-2'}" in error
    stacks = {path.name: path.read_text() for path in (tmp_path / "hang-3").iterdir()}
    assert sorted(stacks) == ["rank-0.txt", "rank-1.txt"]
    assert "in load_media" in stacks["rank-1.txt"]
    assert "in get_batch_samples" in stacks["rank-0.txt"]
    # The lock is free, and the run goes on as if nothing had happened.
    assert server.run_ranks(argv, tmp_path) == 0, (tmp_path / "said").read_text()[-2000:]
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-6"


def test_a_rank_that_leaves_out_an_exchange(server: ForkServer, flags: Line, tmp_path: Path) -> None:
    call = ("hangs", "skip_exchange", {"call": 3})
    statuses, error = run(server, flags(tmp_path), tmp_path, [None, None, call, None])
    assert statuses == [HUNG] * 4
    assert "Rank 2 left out an exchange in which ranks 0-1, 3 still wait: ahead is between two steps (step 3" in error


def test_a_rank_that_is_stopped(server: ForkServer, flags: Line, tmp_path: Path) -> None:
    """The first one, which keeps the ranks' store and the lock of the folder."""
    argv, call = flags(tmp_path), ("hangs", "stop_in_forward", {"step": 3})
    statuses, error = run(server, argv, tmp_path, [call, None, None, None])
    assert statuses == [-9, *[HUNG] * 3]
    assert "never came: its process is stopped (SIGSTOP" in error
    assert "its last note is: in the forward pass (step 3, sample 'sample-8')" in error
    assert "Ranks 1-3 wait for it, in the backward pass (step 3)" in error
    assert "there is no stack of it" in (tmp_path / "hang-3" / "rank-0.txt").read_text()


def test_a_rank_on_another_machine(server: ForkServer, flags: Line, tmp_path: Path) -> None:
    """Its notes come through the ranks' store, as no file of it is seen here."""
    calls = [
        ("hangs", "be_a_machine", {"folder": str(tmp_path / "one")}),
        ("hangs", "be_a_machine", {"folder": str(tmp_path / "other"), "sample": "sample-5"}),
    ]
    statuses, error = run(server, flags(tmp_path), tmp_path, calls)
    assert statuses == [HUNG] * 2
    assert "never came: it is decoding (step 3, sample 'sample-5') [load_media called by load_example" in error
    assert not list((tmp_path / "one").iterdir()) + list((tmp_path / "other").iterdir())


def test_a_worker_of_the_only_rank_that_hangs(server: ForkServer, flags: Line, tmp_path: Path) -> None:
    argv, call = flags(tmp_path, dataloader_num_workers=1), ("hangs", "sleep_in_decode", {"sample": "sample-4"})
    statuses, error = run(server, argv, tmp_path, [call])
    assert statuses == [HUNG]
    assert "The only rank is waiting for its data (step 5, for " in error
    assert "a worker has been decoding sample 'sample-4')" in error
    assert "in load_media" in (tmp_path / "hang-5" / "rank-0.txt").read_text()


# What is slow and healthy.


@pytest.fixture
def watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of a run of this process, with less than a second; ``fired`` says whether it would have ended it."""
    fired = threading.Event()

    def leave(self: Watchdog, declared: int | None, idle: float) -> None:
        fired.set()
        self._stop.set()

    monkeypatch.setattr(Watchdog, "_leave", leave)
    args = SimpleNamespace(hang_timeout=0.8, torch_compile=False)
    trainer: Any = SimpleNamespace(args=args, state=SimpleNamespace(global_step=0))
    progress.begin(tmp_path / "rank-0")
    progress.note(progress.BETWEEN)
    own = Watchdog(trainer, RankNotes(tmp_path, 0, ["here"]))
    own.start()
    yield SimpleNamespace(fired=fired, args=args, own=own)
    own.stop()
    progress.end()


def test_no_note_for_the_timeout_is_a_hang(watchdog: Any) -> None:
    assert watchdog.fired.wait(5)


@pytest.mark.parametrize("case", ["notes", "a worker's notes", "patience", "a save that writes", "compiling"])
def test_what_is_slow_and_moves_is_none(watchdog: Any, tmp_path: Path, case: str) -> None:
    watchdog.args.torch_compile = case == "compiling"
    phase = progress.SAVING if case == "a save that writes" else progress.LOADING
    progress.note(phase, patience=UNLIMITED if case == "patience" else 0.0)
    end, count = time.monotonic() + 1.4, 0
    while time.monotonic() < end:
        count += 1
        if case == "notes":
            progress.note(progress.EVALUATING)
        elif case == "a worker's notes":
            (tmp_path / "rank-0.worker-training-1").write_text(json.dumps(vars(Note(count=count))))
        elif case == "a save that writes":
            (tmp_path / "weights").write_bytes(bytes(1 << 18))
        time.sleep(0.05)
    assert not watchdog.fired.is_set()


def test_time_in_which_a_job_was_suspended_does_not_count(watchdog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jump = time.monotonic, [0.0]
    watchdog.own.timeout = 20.0
    monkeypatch.setattr(time, "monotonic", lambda: real() + jump[0])
    assert not watchdog.fired.wait(0.2)
    jump[0] = 1000.0
    assert not watchdog.fired.wait(0.5)


def test_a_save_that_writes_nothing_is_a_hang(watchdog: Any, tmp_path: Path) -> None:
    for number in range(40):  # To read what the processes of a machine note is not to save.
        (tmp_path / f"rank-0.worker-training-{number}").write_text(json.dumps(vars(Note(count=1))).ljust(4096))
    progress.note(progress.SAVING)
    assert watchdog.fired.wait(5)


def test_notes_of_killed_runs_go_after_a_month(tmp_path: Path) -> None:
    for name, age in (("llava-run-old", 40), ("llava-run-new", 2), ("other", 40)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0").write_text("{}")
        for path in (tmp_path / name / "rank-0", tmp_path / name):
            os.utime(path, (time.time() - age * 86400,) * 2)
    clear_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava-run-new", "other"]


def test_workers_are_ended_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises in the thread that trains when one has ended, and the process would leave with its status."""
    events: list[object] = []
    args = SimpleNamespace(output_dir=tmp_path, hang_timeout=5.0)
    trainer: Any = SimpleNamespace(args=args, state=SimpleNamespace(global_step=0))
    progress.begin(tmp_path / "rank-0")
    try:
        own = Watchdog(trainer, RankNotes(tmp_path, 0, ["here"]))
        own.rank, own._main = 0, threading.get_ident()
        own._look()
        child = SimpleNamespace(pid=0, kill=lambda: events.append("worker"))
        monkeypatch.setattr("multiprocessing.active_children", lambda: [child])
        monkeypatch.setattr("os._exit", events.append)
        monkeypatch.setattr("shutil.rmtree", lambda *words, **named: events.append("notes"))
        own._leave(None, 5.0)
    finally:
        progress.end()
    assert events == ["notes", "worker", HUNG]


def test_a_worker_that_hangs_is_named_whatever_its_rank_does(tmp_path: Path) -> None:
    """Also in an evaluation, whose batch before has its samples in the note of the rank."""
    progress.begin(tmp_path / "rank-0")
    try:
        progress.note_batches(progress.FORWARD, [{"sample_ids": ["a"]}])
        with progress.doing(progress.EVALUATING):
            ended = subprocess.Popen(["true"])
            ended.wait()
            for pid, sample in ((os.getpid(), "b"), (ended.pid, "c")):
                note = Note(phase=progress.DECODING, samples=[sample], since=time.time() - 60 - pid, pid=pid)
                (tmp_path / f"rank-0.worker-evaluation-{sample}").write_text(json.dumps(vars(note)))
            notes = RankNotes(tmp_path, 0, ["here"])
            notes.look()
            said = say_note(RankState(notes.latest[0], notes.workers[0]))
    finally:
        progress.end()
    assert re.fullmatch(r"evaluating \(step \d+, for \d+ s a worker has been decoding sample 'b'\)", said)


def test_a_hang_of_which_nothing_can_be_told_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Watchdog, place: Place) -> dict[int, RankState]:
        raise KeyError("rank 7")

    left: list[int] = []
    monkeypatch.setattr(Watchdog, "_gather", fail)
    monkeypatch.setattr(os, "_exit", left.append)
    trainer: Any = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    own = Watchdog(trainer, RankNotes(tmp_path, 0, ["here"]))
    own.rank, own._main = 0, threading.get_ident()
    own.notes.latest[0] = Note(step=3)
    own._leave(None, 5.0)
    assert left == [HUNG]
    assert (
        "error: this run hangs (--hang_timeout), and what is known of it cannot be told: KeyError"
        in capfd.readouterr().err
    )


def test_who_is_to_blame() -> None:
    working, waiting = Place("load_media", waits=False), Place("all_reduce", waits=True)

    def state(place: Place | None, step: int, event: int) -> RankState:
        return RankState(Note(phase=progress.FORWARD, step=step, place=event), place=place)

    assert blame({0: state(waiting, 3, 2), 1: state(None, 3, 2)}).startswith("Rank 1 (process 0) never came")
    assert blame({0: state(working, 3, 1), 1: state(waiting, 3, 2)}).startswith("Rank 0 (process 0) never came")
    assert blame({0: state(waiting, 3, 2), 1: state(working, 3, 2)}).startswith("Rank 1 (process 0) never came")
    assert blame({0: state(waiting, 4, 1), 1: state(waiting, 3, 9)}).startswith("Rank 0 left out an exchange")
    assert blame({0: state(waiting, 3, 2), 1: state(waiting, 3, 2)}).startswith("All ranks are at the same place")
