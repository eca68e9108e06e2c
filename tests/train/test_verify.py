"""Steps that are computed twice: a bit that flips is found and named, and what is trained is the same without it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script
from safetensors.torch import load_file
from torch import nn

from llava.train.replay import main as replay
from llava.train.train import build_trainer, main
from llava.train.verification import Verification, VerificationError
from llava.train.watched_step import checksum

runs, flips = load_script("tests/faults/runs.py"), load_script("tests/faults/flips.py")
NAME = flips.NAME
Line = Callable[..., list[str]]


@pytest.fixture
def flags(dropout_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path) -> Line:
    """Four steps with dropout, images, clips and texts, of which the first and every second one is verified."""

    def line(**changes: object) -> list[str]:
        values = {
            "model_name_or_path": dropout_dir, "vision_tower": tower_dir, "data_path": mixed_data, "num_frames": 2,
            "output_dir": tmp_path / "out", "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none",
            "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no", "learning_rate": 3e-3, "logging_steps": 1,
            "verify_steps": 2, "run_report": "false", **changes,
        }  # fmt: skip
        return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]

    return line


# What is trained.


@pytest.mark.parametrize("case", ["packs", "features"])
def test_what_is_trained_is_the_same(flags: Line, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llava")

    def run(name: str, verify_steps: int | None) -> Path:
        changes: dict[str, object] = {
            "packs": {"packing": "true", "model_max_length": 120, "gradient_accumulation_steps": 2},
            "features": {"feature_cache": tmp_path / f"features-{name}", "feature_cache_fill": "true"},
        }[case]
        output = tmp_path / name
        main(flags(output_dir=output, verify_steps=verify_steps, save_strategy="steps", save_steps=4, **changes))
        return output

    with_it, without = run("with", 1), run("without", None)
    (said,) = [line for line in caplog.messages if "nothing differed" in line]
    assert "--verify_steps: 4 steps were computed twice" in said
    one, other = (load_file(output / "model.safetensors") for output in (with_it, without))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    moments = [torch.load(folder / "checkpoint-4" / "optimizer.pt")["state"] for folder in (with_it, without)]
    assert len(moments[0]) > 10
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    drawn = [torch.load(folder / "checkpoint-4" / "rng_state.pth", weights_only=False) for folder in (with_it, without)]
    assert torch.equal(drawn[0]["cpu"], drawn[1]["cpu"])
    assert runs.losses(with_it) == runs.losses(without)
    if case == "features":
        logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (with_it, without)]
        assert logs[0][3]["feature_misses"] == logs[1][3]["feature_misses"] > 0


# A bit that flips, in one process.


def stop(flags: Line, what: str, **changes: object) -> str:
    """The error of a run in which a bit flips in its fourth step."""
    trainer = build_trainer(flags(**changes))
    trainer.callback_handler.callbacks.insert(0, flips.Flip(what, 4))
    with pytest.raises(VerificationError) as stopped:
        trainer.train()
    return str(stopped.value)


@pytest.mark.parametrize(
    ("what", "place"),
    [("gradient", f"gradient of {NAME}"), ("output", f"output of {NAME.removesuffix('.weight')} (Conv1D)")],
)
def test_a_bit_of_a_pass_is_found_before_the_weights_take_it(
    flags: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, place: str
) -> None:
    error = stop(flags, what, gradient_accumulation_steps=2)
    assert error.startswith(
        f"step 4 is not what it should be (--verify_steps): micro-batch 0 computed twice differs first in the {place}; "
        "a third one says that the first was wrong: memory or arithmetic of this device failed. Samples of the step: "
    )
    folder = tmp_path / "out" / "bad_step-4"
    assert f"python -m llava.train.replay {folder}" in error
    # Here no bit flips, and the loss is the run's, to the last bit.
    assert replay([str(folder)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "(in the run " in line]
    assert len(lines) == 2
    for line in lines[what == "output" :]:  # The run's own loss has the bit that flipped in an output.
        loss, before = line.split("loss ")[1].rstrip(")").split(" (in the run ")
        assert loss == before


def test_a_gradient_that_changes_between_micro_batches_is_found(flags: Line) -> None:
    error = stop(flags, "summed gradient", gradient_accumulation_steps=2)
    assert f"before micro-batch 1 the sum of those before it has changed: gradient of {NAME}. Samples" in error


def test_a_frozen_weight_that_changes_is_found(flags: Line) -> None:
    error = stop(flags, "tower")
    assert "what does not train has changed since the start: parameter transformer.vision_tower" in error


def test_an_optimizer_that_computes_wrongly_is_found(flags: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, steps = build_trainer(flags()), []
    step = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW, *words: Any) -> Any:
        step(self, *words)
        steps.append(self)
        if len(steps) == 6:  # The fourth step: the first two were taken twice.
            flips.flip(self.state[dict(trainer.model.named_parameters())[NAME]]["exp_avg_sq"])

    monkeypatch.setattr(torch.optim.AdamW, "step", wrong)
    with pytest.raises(
        VerificationError, match=f"step 4 .*optimizer's step computed twice differs in exp_avg_sq of {NAME}"
    ):
        trainer.train()


def test_a_kernel_that_is_not_deterministic_is_found_at_once(flags: Line, tmp_path: Path) -> None:
    trainer = build_trainer(flags(verify_steps=100))
    [layer] = [module for name, module in trainer.model.named_modules() if name == NAME.removesuffix(".weight")]

    def change(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + int.from_bytes(os.urandom(2)) * 1e-6

    layer.register_forward_hook(change)
    with pytest.raises(
        VerificationError, match=r"step 1 .*no two computations are alike: a kernel is not deterministic"
    ):
        trainer.train()


def test_a_checksum_sees_what_a_sum_does_not() -> None:
    values = torch.randn(1001)
    for place, bit in ((0, 0), (500, 30), (1000, 22)):
        changed = values.clone()
        flips.flip(changed, place, bit)
        assert checksum(changed) != checksum(values), bit
    swapped = values.clone().view(torch.int32)
    swapped[3] += 1
    swapped[5] -= 1  # The same sum.
    assert checksum(swapped) != checksum(values)
    assert checksum(values.bfloat16()) == checksum(values.bfloat16().clone())
    for dtype in (torch.float32, torch.bfloat16):  # Parts of a buffer, a mapped file: not where words of 64 bits begin.
        for first in range(1, 5):
            part = values.to(dtype)[first : first + 96]
            assert checksum(part) == checksum(part.clone()), (dtype, first)
    mapped = torch.frombuffer(bytearray(68), dtype=torch.uint8)
    mapped = mapped[(4 - mapped.data_ptr()) % 8 :][:64].view(torch.float32)  # Begins in the midst of such a word.
    assert checksum(torch.frombuffer(mapped.numpy(), dtype=torch.float32)[1:9]) == 0
    with pytest.raises(ValueError, match="--verify_steps is 0; it must be at least 1"):
        main(["--verify_steps", "0", "--model_name_or_path", "x", "--data_path", "y", "--output_dir", "z"])


def test_deterministic_kernels(flags: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they are the same kernels; what a GPU must be told is told."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "before")  # So that it is put back.
        monkeypatch.delenv(name)
    try:
        main(flags(deterministic="true", verify_steps=None, max_steps=1))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_the_minority_is_named(flags: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"gradient of a": 1, "exp_avg of a": 2, "parameter a": 3}
    verification = build_trainer(flags()).verifier
    for other, others, said in (
        (held | {"gradient of a": 7}, 3, "it holds other bits than most ranks: gradient of a"),
        (held | {"parameter a": 7}, 1, "ranks hold different bits, and no majority the same: parameter a"),
    ):
        ranks = [other, *[held] * others]
        monkeypatch.setattr("llava.train.verification.gather_from_ranks", lambda mine, ranks=ranks: ranks)
        monkeypatch.setattr(Verification, "_is_distributed", True)
        verification._compare_ranks(other)
        assert verification._differences.pop() == said
    verification._compare_ranks(held)
    assert verification._differences == ["ranks hold different bits, and no majority the same: parameter a"]


# A bit that flips on one of several ranks.


def test_what_ranks_train_is_the_same(server: Any, flags: Line, tmp_path: Path) -> None:
    for name, verify_steps in (("with", 1), ("without", None)):
        argv = flags(output_dir=tmp_path / name, verify_steps=verify_steps, gradient_accumulation_steps=2,
                     per_device_train_batch_size=1)  # fmt: skip
        assert server.run_ranks(argv, tmp_path) == 0, (tmp_path / "said").read_text()[-3000:]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert runs.losses(tmp_path / "with") == runs.losses(tmp_path / "without")


@pytest.mark.parametrize(
    ("ranks", "what", "said"),
    [
        (
            2,
            "gradient",
            f"rank 1: micro-batch 0 computed twice differs first in the gradient of {NAME}; a third one says ",
        ),
        (2, "exchanged gradient", f"ranks hold different bits, and no majority the same: gradient of {NAME}, exp_avg"),
        (2, "parameter", f"ranks hold different bits, and no majority the same: parameter {NAME}"),
        (4, "moment", f"rank 1: it holds other bits than most ranks: exp_avg of {NAME}, parameter {NAME}"),
    ],
)
def test_a_rank_is_named(server: Any, flags: Line, tmp_path: Path, ranks: int, what: str, said: str) -> None:
    argv = flags(per_device_train_batch_size=1)
    each = {1: {"call": ("flips", "flip_in", {"what": what, "step": 4 if "gradient" in what else 3})}}
    statuses = server.wait_ranks(server.start_ranks(argv, tmp_path, ranks, each), 120)
    text = (tmp_path / "said").read_text()
    assert statuses == [2] * ranks, text[-3000:]
    [error] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 4 is not what it should be (--verify_steps): ")
    assert said in error


def test_ranks_of_deepspeed_compare_their_parameters(server: Any, flags: Line, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    argv = flags(per_device_train_batch_size=1, deepspeed="zero2", gradient_accumulation_steps=2)
    each = {1: {"call": ("flips", "flip_in", {"what": "parameter", "step": 4})}}
    statuses = server.wait_ranks(server.start_ranks(argv, tmp_path, 2, each), 120)
    text = (tmp_path / "said").read_text()
    assert statuses == [2, 2]
    assert f"ranks hold different bits, and no majority the same: parameter {NAME}" in text
