"""A signal before the first step or behind the last one: an unfinished run can be gone on with, a finished one is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.train.preemption import PREEMPTED, SIGNALS, StopRequest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys
from llava.train import preemption
preemption.listen()
where, number = sys.argv[1], int(sys.argv[2])
def hit():
    os.kill(os.getpid(), number)
if where == "imports":
    hit()
from llava.train import train
def before(name):
    original = getattr(train, name)
    def hitting(*words, **named):
        hit()
        return original(*words, **named)
    setattr(train, name, hitting)
if where in ("load_from_arguments", "find_checkpoint", "leave_process_group"):
    before(where)
def run():
    train.main(sys.argv[3:])
    if where == "end of main":
        hit()
status = train.cli(run)
if where == "exit":
    hit()
    import atexit
    atexit.register(hit)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def argv(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = tmp_path_factory.mktemp("early") / "texts.json"
    data.write_text(json.dumps([{"id": 1, "conversations": [{"from": "gpt", "value": "Il gatto dorme."}]}]))
    values = {"model_name_or_path": gpt2_dir, "data_path": data, "max_steps": 3, "report_to": "none",
              "use_cpu": "true", "disable_tqdm": "true", "resume_from_checkpoint": "auto"}  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run(where: str, number: int, argv: list[str], output: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", PROGRAM, where, str(number), *argv, "--output_dir", str(output)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "number"), [("imports", signal.SIGUSR1), ("load_from_arguments", signal.SIGTERM)]
)  # fmt: skip
def test_before_the_first_step(where: str, number: int, argv: list[str], tmp_path: Path, warm_python: str) -> None:
    python = sys.executable if where == "imports" else warm_python  # Once, all of its imports are still to come.
    done = run(where, number, argv, tmp_path / "out", python)
    assert done.returncode == PREEMPTED, done.stderr[-2000:]
    assert "received before the first step: nothing is lost" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_between_loading_and_the_first_step(argv: list[str], tmp_path: Path, warm_python: str) -> None:
    done = run("find_checkpoint", signal.SIGUSR1, argv, tmp_path / "out", warm_python)
    assert done.returncode == PREEMPTED
    assert not (tmp_path / "out" / "run.lock").exists()


@pytest.fixture(scope="module")
def finished(argv: list[str], tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Path:
    output = tmp_path_factory.mktemp("done") / "out"
    done = run("exit", signal.SIGUSR1, argv, output, warm_python)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("imports", signal.SIGUSR1),
        ("load_from_arguments", signal.SIGUSR1),
        ("find_checkpoint", signal.SIGTERM),
        ("end of main", signal.SIGUSR1),
        ("leave_process_group", signal.SIGTERM),
        ("exit", signal.SIGTERM),
    ],
)
def test_a_finished_run_stays_finished(
    where: str, number: int, argv: list[str], finished: Path, warm_python: str
) -> None:
    done = run(where, number, argv, finished, warm_python)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is finished" in done.stdout


def test_a_longer_run_goes_on_after_one_more_step(argv: list[str], finished: Path, warm_python: str) -> None:
    done = run("imports", signal.SIGUSR1, [*argv, "--max_steps", "9"], finished, warm_python)
    assert done.returncode == PREEMPTED, done.stderr[-2000:]
    assert "stopped after step 4 of 9" in done.stderr


def test_neither_a_failing_clean_up_nor_a_busy_stream_keeps_the_program() -> None:
    program = """
import os, signal, sys
from llava.train import preemption
preemption.listen()
class Busy:
    def write(self, text):
        raise RuntimeError("reentrant call")
sys.stderr = Busy()
def clean_up():
    raise OSError("the folder is gone")
preemption.may_leave(clean_up)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == PREEMPTED
    assert done.stderr == "SIGTERM received before the first step: nothing is lost; start again the same way\n"


def test_an_interrupted_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from llava.train.train import cli

    def run() -> None:
        raise KeyboardInterrupt

    assert cli(run) == 130
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch("interrupted: .* is lost .* --resume_from_checkpoint auto goes on from it", said)


def test_many_runs_of_one_process_may_be_asked_to_stop() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    began = time.monotonic()
    try:
        for _ in range(40):  # Each keeps the handlers of the one before, which are never restored.
            with StopRequest() as request:
                request.agreed = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert time.monotonic() - began < 5
