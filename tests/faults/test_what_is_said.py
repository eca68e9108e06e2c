"""What commands and runs say, and what they leave: nothing needless, everything that is wrong."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava.messages import explain_error, shorten
from llava.model.random_weights import create
from llava.train.train import build_trainer, main

LOGGER = "llava.train.trainer"


def words(model: Path, tower: Path, data: Path, out: Path, **more: object) -> list[str]:
    flags = {
        "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": out, "num_frames": 2,
        "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2, "mm_resampler_type": "spatial_pool",
        "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", **more,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(gpt2_dir, tower_dir, mixed_data, tmp_path_factory) -> list[str]:
    """A run of a step with a frozen tower and a tied head, as its command line."""
    given = words(gpt2_dir, tower_dir, mixed_data, tmp_path_factory.mktemp("run") / "out")
    main(given)
    return given


def test_a_resume_says_what_is_missing_and_not_what_is_meant_to_be(run, caplog) -> None:
    trainer = build_trainer([*run, "--resume_from_checkpoint", "auto"])
    checkpoint = Path(trainer.args.output_dir, "checkpoint-1")
    with caplog.at_level(logging.WARNING):
        trainer._load_from_checkpoint(str(checkpoint))
    assert "missing" not in caplog.text
    assert "lacks" not in caplog.text

    weights = load_file(checkpoint / "model.safetensors")
    assert not any("vision_tower" in name or name == "lm_head.weight" for name in weights)
    del weights["transformer.h.0.mlp.c_fc.bias"]
    weights["stray.weight"] = weights["transformer.ln_f.weight"].clone()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    said = r"it lacks 1: transformer\.h\.0\.mlp\.c_fc\.bias; it has beside them 1: stray\.weight"
    with pytest.raises(ValueError, match=said):
        trainer._load_from_checkpoint(str(checkpoint))


def test_commands_do_not_open_with_lines_of_packages() -> None:
    program = "import llava, transformers.trainer, bitsandbytes, deepspeed.accelerator as a; a.get_accelerator()"
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in done.stdout + done.stderr
    assert "accelerator" not in done.stdout + done.stderr


def test_weights_get_the_permissions_of_other_files(load_tiny, gpt2_dir, tmp_path) -> None:
    before = os.umask(0o027)
    try:
        loaded = load_tiny()
        loaded.model.save_pretrained(tmp_path / "whole")
        loaded.model.save_pretrained(tmp_path / "shards", max_shard_size="60kB")
        create(str(gpt2_dir), str(tmp_path / "random"), 0)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) > 3
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files if path.stat().st_mode & 0o777 != 0o640} == {}


def test_values_are_shortened_in_errors() -> None:
    assert len(shorten("A" * 400_000)) < 150
    assert "400,000 characters" in shorten("A" * 400_000)
    assert "digits" in shorten(int("9" * 3000) ** 3)
    assert len(shorten([{"a": "b" * 900}] * 900)) < 300
    assert shorten("short") == "'short'"
    assert len(explain_error(ValueError("x" * 10_000))) < 1200
    assert explain_error(FileNotFoundError(2, "No such file or directory", "a.json")) == (
        "a.json: No such file or directory"
    )
    assert explain_error(ValueError("one\n\ntwo")) == "one two"
