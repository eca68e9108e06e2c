"""Ranks that are asked to stop, by the launcher's signal; the rest of its way is benchmarks/kill_resume.py's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ITALIAN, turns
from runs import read_record
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llava.train import launch
from llava.train.checkpoint import find_damage, list_checkpoints
from llava.train.preemption import HUNG, PREEMPTED

ROOT = Path(__file__).parents[2]


def test_both_ranks_stop_at_the_same_step(gpt2_dir: Path, tmp_path: Path, warm_python: str) -> None:
    data, output = tmp_path / "data.json", tmp_path / "out"
    data.write_text(
        json.dumps([{"id": str(i), "conversations": turns("", f"{i} {ITALIAN[i % 5]}")} for i in range(10)])
    )
    values = {
        "model_name_or_path": gpt2_dir, "data_path": data, "output_dir": output, "max_steps": 100_000,
        "per_device_train_batch_size": 1, "logging_steps": 3, "report_to": "none", "save_strategy": "no",
        "use_cpu": "true", "disable_tqdm": "true",
    }  # fmt: skip
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    output.mkdir()
    launcher = [warm_python, "-m", "llava.train.launch", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    said = output / "said"
    with said.open("wb") as file:
        run = [str(ROOT / "tests" / "faults" / "runs.py"), str(output), *flags]
        process = subprocess.Popen([*launcher, *run], env=environment, stdout=file, stderr=file)
    try:
        await_steps(process, output)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == PREEMPTED, said.read_text()[-3000:]
    finally:
        process.terminate()
    assert said.read_text().count("stopped after step") == 1
    [checkpoint] = list_checkpoints(output)
    assert find_damage(checkpoint) is None
    for rank in range(2):
        assert checkpoint.name == f"checkpoint-{len(read_record(output, rank)[0])}"
        assert (checkpoint / f"rng_state_{rank}.pth").is_file()


def await_steps(process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (starts := read_record(output)) and len(starts[-1]) > 2:
            return
        time.sleep(0.05)
    raise AssertionError((output / "said").read_text()[-3000:])


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([PREEMPTED, -signal.SIGTERM], PREEMPTED),
        ([-signal.SIGUSR1], PREEMPTED),
        ([-signal.SIGKILL, HUNG], HUNG),
        ([-signal.SIGTERM, 2], 2),
        ([1, -9], None),
    ],
)
def test_status(statuses: list[int], status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of ranks that were asked to stop, or hung; other failures are torchrun's to report."""
    failures = {rank: ProcessFailure(rank, 0, code, "nowhere") for rank, code in enumerate(statuses)}

    def fail(argv: list[str]) -> None:
        assert argv == ["program.py"]
        raise ChildFailedError("program.py", failures)

    monkeypatch.setattr("torch.distributed.run.main", fail)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        if status is not None:
            assert launch.main(["program.py"]) == status
        else:
            with pytest.raises(ChildFailedError):
                launch.main(["program.py"])
    finally:
        signal.signal(signal.SIGUSR1, before)
