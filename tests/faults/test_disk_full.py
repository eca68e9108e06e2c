"""A disk that is full while a checkpoint is written: one clear error, and the checkpoint before is good."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.train.checkpoint import choose_checkpoint, find_damage
from llava.train.disk_errors import WriteFailure
from llava.train.train import cli, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flags(gpt2_dir: Path, mixed_data: Path) -> Callable[..., list[str]]:
    def line(output: Path, **changes: object) -> list[str]:
        values = {
            "model_name_or_path": gpt2_dir, "data_path": mixed_data.parent / "texts.json", "output_dir": output,
            "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
            "use_cpu": "true", "disable_tqdm": "true", **changes,
        }  # fmt: skip
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    (mixed_data.parent / "texts.json").write_text(
        '[{"id": "a", "conversations": [{"from": "gpt", "value": "Il gatto dorme sul divano."}]}]'
    )
    return line


def complain(said: str, output: Path) -> str:
    """The one line of error, of which there is no more."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said[-3000:]
    assert "Traceback" not in said
    assert str(output) in lines[0]
    assert "bytes are needed" in lines[0]
    assert "--resume_from_checkpoint auto" in lines[0]
    return lines[0]


@contextlib.contextmanager
def limited_files() -> Iterator[None]:
    """No file may grow beyond 10 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk(flags, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = small_disk / "out"
    assert cli(lambda: main(flags(output))) == 2
    said = complain(capfd.readouterr().err, output)
    assert "checkpoint-4 could not be written" in said
    assert "checkpoint-2 is unharmed" in said
    assert choose_checkpoint("auto", output) == str(output / "checkpoint-2")
    assert not list(output.glob("tmp-*"))
    free = shutil.disk_usage(small_disk).free
    assert f"{free:,} are free" in said
    # With room again, it goes on.
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert cli(lambda: main(flags(output, resume_from_checkpoint="auto"))) == 0
    assert find_damage(output / "checkpoint-4") is None


@pytest.mark.parametrize(
    "method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state", "save_state", "save_model"]
)
def test_a_limit_anywhere_in_a_save(
    method: str, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Writing begins to fail when the second save has come to a method."""
    from llava.train.trainer import LlavaTrainer

    output = tmp_path / "out"
    original = getattr(LlavaTrainer, method)

    def limited(self, *args, **kwargs):
        if self.state.global_step < 4:
            return original(self, *args, **kwargs)
        with limited_files():
            return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, method, limited)
    assert cli(lambda: main(flags(output))) == 2
    complain(capfd.readouterr().err, output)
    assert find_damage(output / "checkpoint-2") is None
    assert not list(output.glob("tmp-*"))


def test_every_writer_is_understood(tokenizer, tmp_path: Path) -> None:
    path, weights = tmp_path / "file", {"weights": torch.zeros(1000)}
    for write in (
        lambda: path.write_text("more than ten bytes"),
        lambda: torch.save(weights, path),
        lambda: save_file(weights, path),
        lambda: tokenizer.backend_tokenizer.save(str(path)),
    ):
        failure = WriteFailure()
        with limited_files(), failure:
            write()
        assert failure.message
    with pytest.raises(RuntimeError, match="something else"), WriteFailure():
        raise RuntimeError("something else")


def test_one_rank_of_two(flags, tmp_path: Path, warm_python: str) -> None:
    """The second rank cannot write its random states: both end, and the first says why."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, sys\n"
        "from llava.train.train import cli, main\n"
        "from transformers import Trainer\n"
        "save = Trainer._save_rng_state\n"
        "def fail(self, folder):\n"
        "    if self.args.process_index == 1 and self.state.global_step == 4:\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    save(self, folder)\n"
        "Trainer._save_rng_state = fail\n"
        "sys.exit(cli(lambda: main(sys.argv[1:])))\n"
    )
    output = tmp_path / "out"
    launcher = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
    ended = subprocess.run(
        [*launcher, str(driver), *flags(output)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.stderr[-3000:]
    assert "rank 1: [Errno 28] No space left on device" in lines[0]
    assert choose_checkpoint("auto", output) == str(output / "checkpoint-2")
