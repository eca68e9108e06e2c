"""``--fsdp`` on two CPU ranks: the weights and checkpoints of DDP, a run that goes on with either, and what is refused.

That ranks of different modality, trained towers and coordinates come out as with one process, ``test_mixed_ranks.py``
tests with every engine.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from llava.train.command_line import parse_arguments

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]


@pytest.fixture(scope="module")
def runs(llama_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path_factory, warm_python: str) -> dict[str, Path]:
    """Folders of runs of four steps on two ranks, whose language model does not share embeddings with its head."""
    folder = tmp_path_factory.mktemp("sharded")
    values = {
        "model_name_or_path": llama_dir, "vision_tower": tower_dir, "data_path": mixed_data, "max_steps": 4,
        "mm_resampler_type": "spatial_pool", "mm_perceiver_latents": 9, "num_frames": 2, "save_steps": 2,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1, "report_to": "none",
        "use_cpu": "true", "disable_tqdm": "true", "learning_rate": 1e-3, "eval_data_path": mixed_data,
    }  # fmt: skip

    def words(name: str, **more: object) -> list[str]:
        flags = {**values, "output_dir": folder / name, **more}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    # DDP first: what FSDP says in the environment stays there.
    orders = [
        words("ddp", ddp_backend="gloo"),
        words("ddp_bf16", bf16="true", save_strategy="no"),
        words("fsdp", fsdp="true"),
    ]
    orders += [words("fsdp_bf16", fsdp="true", bf16="true", save_strategy="no")]
    settings = json.dumps({"version": 2, "reshard_after_forward": False})
    orders += [
        words(
            name,
            fsdp="true",
            fsdp_config=settings,
            resume_from_checkpoint=folder / name.removeprefix("from_") / "checkpoint-2",
        )
        for name in ("from_ddp", "from_fsdp")
    ]
    (folder / "orders.json").write_text(json.dumps(orders))
    done = subprocess.run(
        [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(ROOT / "tests" / "train" / "sharded_runs.py"), str(folder / "orders.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": warm_python,
             "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def difference(one: Path, other: Path) -> float:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry.get("loss", entry.get("eval_loss")) for entry in history if {"loss", "eval_loss"} & entry.keys()]


def norms(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [value for entry in history for name, value in entry.items() if name.startswith("grad_norm")]


def test_weights_losses_and_norms_are_those_of_ddp(runs: dict[str, Path]) -> None:
    assert difference(runs["ddp"], runs["fsdp"]) < 1e-5
    assert losses(runs["fsdp"]) == pytest.approx(losses(runs["ddp"]), abs=1e-5)
    assert len(losses(runs["fsdp"])) == 5
    assert norms(runs["fsdp"]) == pytest.approx(norms(runs["ddp"]), rel=1e-4)


def test_in_bf16_they_are_those_of_ddp_within_its_rounding(runs: dict[str, Path]) -> None:
    assert losses(runs["fsdp_bf16"]) == pytest.approx(losses(runs["ddp_bf16"]), abs=2e-3)
    assert losses(runs["fsdp_bf16"]) != losses(runs["fsdp"])


def test_a_checkpoint_is_whole_and_that_of_ddp(runs: dict[str, Path]) -> None:
    names = [{path.name for path in (runs[name] / "checkpoint-2").iterdir()} for name in ("ddp", "fsdp")]
    assert names[0] == names[1]
    states = [torch.load(runs[name] / "checkpoint-2" / "optimizer.pt", weights_only=True) for name in ("ddp", "fsdp")]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for place, moments in states[0]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(states[1]["state"][place][name], value, atol=1e-6, rtol=1e-4)


def test_a_run_goes_on_bit_for_bit_and_from_ddp_s_checkpoint(runs: dict[str, Path]) -> None:
    assert difference(runs["fsdp"], runs["from_fsdp"]) == 0
    assert difference(runs["ddp"], runs["from_ddp"]) < 1e-5
    assert losses(runs["from_fsdp"])[-3:] == losses(runs["fsdp"])[-3:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fsdp true", "--fsdp shares weights out to several ranks: llava launch --nproc_per_node N"),
        ("--fsdp full_shard --deepspeed zero2", "--deepspeed and --fsdp do not go together"),
        ("--fsdp true --lora_enable true", "--lora_enable and --fsdp do not go together: adapters have not been tried"),
        ("--fsdp true --sample_every 2", "--sample_every and --fsdp do not go together"),
        ("--fsdp true --score_tasks italian", "--score_tasks and --fsdp do not go together: .* --score_tasks none"),
        ("--fsdp true --optim adafactor", "--optim adafactor does not step on shares of tensors"),
        ("--fsdp true --do_train false", "--fsdp is for training, but --do_train is false"),
    ],
)
def test_what_does_not_go_together_with_it_is_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_arguments([*REQUIRED, *words.split()])


def test_nothing_of_it_is_left_in_the_environment_of_a_run_that_was_refused() -> None:
    with pytest.raises(ValueError, match="--fsdp"):
        parse_arguments([*REQUIRED, "--fsdp", "true"])
    assert "ACCELERATE_USE_FSDP" not in os.environ
