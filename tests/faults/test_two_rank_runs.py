"""Two ranks agree on whose folder it is: each mistake is one line and one exit status, and none of them hangs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def argv(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of two steps; its output folder comes last."""
    folder = tmp_path_factory.mktemp("two-ranks")
    data = folder / "texts.json"
    samples = [{"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(8)]
    data.write_text(json.dumps(samples))
    values = {"model_name_or_path": gpt2_dir, "data_path": data, "max_steps": 2, "save_steps": 1, "report_to": "none",
              "per_device_train_batch_size": 2, "disable_tqdm": "true",
              "output_dir": folder / "out"}  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run(python: str, argv: list[str], *more: str) -> tuple[int, str, list[str]]:
    """Exit status, output and the lines of error of a run on two ranks."""
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "llava.train.train", *argv, *more], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python,
             "CUDA_VISIBLE_DEVICES": ""},  # Without a GPU, ranks take the CPU and meet there unasked.
    )  # fmt: skip
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_sweep_second_run_two_at_once_and_resume(argv: list[str], warm_python: str) -> None:
    output = Path(argv[-1])
    assert run(warm_python, argv)[0] == 0
    model = (output / "model.safetensors").read_bytes()

    status, _, errors = run(warm_python, argv)
    assert status == 1
    assert len(errors) == 1
    assert "holds a run (checkpoint-1, checkpoint-2" in errors[0]

    resume = ("--resume_from_checkpoint", "auto")
    status, _, errors = run(warm_python, argv, *resume, "--learning_rate", "1e-2")
    assert status == 1
    assert len(errors) == 1
    assert "--learning_rate was 5e-05, is 0.01" in errors[0]

    status, said, _ = run(warm_python, argv, *resume)
    assert status == 0
    assert said.count("is finished: all of its 2 steps were trained before") == 1

    lock = {"host": "node-7", "pid": 12, "process_started": 1.0, "boot": "b", "namespace": "n", "job": "", "restart": 0,
            "since": "2026-01-01T10:00:00+01:00", "token": "t"}  # fmt: skip
    (output / "run.lock").write_text(json.dumps(lock))
    status, _, errors = run(warm_python, argv, *resume)
    assert status == 1
    assert len(errors) == 1
    assert "in use by another run (process 12 on node-7" in errors[0]
    assert (output / "model.safetensors").read_bytes() == model
