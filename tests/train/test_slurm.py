"""Jobs of Slurm on a cluster of stubs: many nodes, a signal, a requeue; and how each mistake reads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ITALIAN, ROOT, turns
from slurm_cluster import Cluster

from llava.train import launch
from llava.train.slurm.__main__ import Job, build_command, find_port
from llava.train.slurm.init import SCRIPT, main

PYTHON = sys.executable


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def start(cluster: Cluster, *words: str, **settings: str) -> subprocess.Popen[str]:
    """``llava slurm`` with such words, in an environment with such variables."""
    environment = {**cluster.environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{cluster.folder}", **settings}
    command = [PYTHON, "-m", "llava.train.slurm", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def await_file(path: Path, process: subprocess.Popen[str], text: str = "") -> None:
    deadline = time.monotonic() + 120
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None, path.parent
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_two_nodes_are_asked_to_stop_requeued_once_and_go_on(
    cluster: Cluster, gpt2_dir: Path, tmp_path: Path, warm_python: str
) -> None:
    data, output, log, recipe = (tmp_path / name for name in ("data.json", "out", "logs.out", "run.yaml"))
    samples = [{"id": str(i), "conversations": turns("", f"{i} {ITALIAN[i % 5]}")} for i in range(24)]
    data.write_text(json.dumps(samples))
    recipe.write_text(
        f"model_name_or_path: {gpt2_dir}\ndata_path: {data}\nmax_steps: 25\nuse_cpu: true\nreport_to: none\n"
        "save_strategy: 'no'\nlogging_steps: 1\nper_device_train_batch_size: 1\n"
    )
    script = tmp_path / "job.sbatch"
    assert main(["--output", str(script)]) == 0
    settings = {
        "CONFIG": str(recipe), "OUTPUT_DIR": str(output), "RANKS": "2", "PYTHON": warm_python,
        "STAGE_DIR": str(tmp_path / "local"),
        "PYTHON_EXEC": warm_python, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip

    def submit(restart: int) -> subprocess.Popen[str]:
        with log.open("a") as file:
            return subprocess.Popen(
                ["bash", str(script)], env={**cluster.job(4711, restart), **settings},
                stdout=file, stderr=file, text=True, cwd=tmp_path,
            )  # fmt: skip

    job = submit(0)
    await_file(log, job, "'loss'")
    job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 85, log.read_text()[-3000:]
    first = log.read_text()
    assert first.count("stopped after step") == 1
    assert "2 nodes, which meet at localhost:14711" in first
    assert [line for line in cluster.calls if "requeue" in line] == ["scontrol requeue 4711"]
    steps = int(first.split("stopped after step ")[1].split()[0])

    assert first.count("0 files of media") == 1, "one process of a machine copies"
    again = submit(1)
    assert again.wait(120) == 0, log.read_text()[-3000:]
    assert log.read_text().startswith(first), "the second start's lines are behind the first's"
    state = json.loads((output / "trainer_state.json").read_text())
    assert 0 < steps < state["global_step"] == 25
    assert [row["step"] for row in state["log_history"] if "loss" in row] == list(range(1, 26))
    assert {path.name for path in (output / f"checkpoint-{steps}").glob("rng_state_*")} == {
        f"rng_state_{rank}.pth" for rank in range(4)
    }
    assert sum(line.startswith("scontrol requeue") for line in cluster.calls) == 1
    assert sum(line.startswith("srun --nodes 2 --ntasks 2 --ntasks-per-node 1") for line in cluster.calls) == 2


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A module that waits for SIGUSR1, and leaves with the status of its first word; in ``began`` when it listens."""
    began = tmp_path / "began"
    (tmp_path / "waits.py").write_text(f"""
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(int(sys.argv[1])))
open({str(began)!r}, "w").write("began")
time.sleep(60)
""")
    return began


@pytest.mark.parametrize(
    ("sent", "status", "settings", "requeued"),
    [
        (signal.SIGUSR1, 85, {"SLURM_JOB_ID": "7"}, "7"),
        (signal.SIGUSR1, 85, {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}, "9_4"),
        (signal.SIGUSR1, 2, {"SLURM_JOB_ID": "7"}, ""),
        (signal.SIGUSR1, 0, {"SLURM_JOB_ID": "7"}, ""),
        (signal.SIGUSR1, 85, {}, ""),
        (signal.SIGTERM, 85, {"SLURM_JOB_ID": "7"}, ""),
    ],
)
def test_what_is_requeued(
    cluster: Cluster, program: Path, sent: signal.Signals, status: int, settings: dict[str, str], requeued: str
) -> None:
    job = start(cluster, "-m", "waits", str(status), **settings)
    await_file(program, job)
    job.send_signal(sent)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == status, said
    assert cluster.calls == ([f"scontrol requeue {requeued}"] if requeued else [])


def test_a_requeue_that_fails_is_said(cluster: Cluster, program: Path) -> None:
    job = start(cluster, "-m", "waits", "85", SLURM_JOB_ID="7", REQUEUE_STATUS="1")
    await_file(program, job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 85
    assert "error: scontrol requeue 7: 'status 1'; submit the same script again" in said


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ("-m x", {"SLURM_JOB_NODELIST": "node[0-2]"}, "the job has 2 nodes, but 'scontrol show hostnames node[0-2]' "
         "tells 0: 'Invalid hostlist node[0-2]'"),
        ("-m x", {"SLURM_JOB_NUM_NODES": "many"}, "SLURM_JOB_NUM_NODES is 'many', expected a number of nodes"),
        ("", {}, "-m MODULE is missing"),
        ("--nproc_per_node all -m x", {}, "--nproc_per_node is 'all', expected a number or gpu"),
        ("--nproc_per_node 0 -m x", {}, "--nproc_per_node is '0', expected a number or gpu"),
        ("--rendezvous a:1 --nnodes 2 --nproc_per_node 1 -m x", {}, "SLURM_NODEID is not set"),
        ("--no_such_flag -m x", {}, "unknown flag --no_such_flag"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(cluster: Cluster, words: str, settings: dict[str, str], message: str) -> None:
    job = start(cluster, *words.split(), **{**cluster.job(3), **settings})
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_what_variables_say_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Job.read().num_nodes == 2, "its older name"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match=r"srun has started this 4 times .* without srun"):
        Job.read()


def test_jobs_that_share_a_node_meet_at_other_ports() -> None:
    first, second = find_port(12), find_port(13)
    assert first != second
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert find_port(12) not in (first, 0)


def test_one_node_needs_no_srun() -> None:
    assert build_command(Job(1, "1", "n", 1), None, ["-m", "x"])[1:] == ["-m", "x"]
    launcher = ["-m", "llava.train.launch", "--standalone", "--nproc_per_node", "2", "-m", "x"]
    assert build_command(Job(1, "1", "n", 1), "2", ["-m", "x"])[1:] == launcher


def test_a_signal_before_the_ranks_are_started_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher imports torch or waits for other nodes for seconds, in which a signal may come."""
    sent: list[tuple[int, int]] = []
    found: list[list[int]] = [[], [], [123]]
    monkeypatch.setattr(launch, "find_ranks", lambda: found.pop(0))
    monkeypatch.setattr(launch, "_PAUSE", 0.01)
    monkeypatch.setattr("os.kill", lambda *words: sent.append(words))
    launch.ask_ranks_to_stop(signal.SIGTERM, None)
    assert sent == []
    deadline = time.monotonic() + 20
    while not sent and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sent == [(123, signal.SIGUSR1)]


def test_the_script_is_written_and_not_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "job.sbatch"
    assert main(["--output", str(target)]) == 0
    assert target.read_text() == SCRIPT.read_text()
    assert main(["--output", str(target)]) == 2
    assert "exists already; give another --output, or --force" in capsys.readouterr().err
    assert main(["--output", str(target), "--force"]) == 0
