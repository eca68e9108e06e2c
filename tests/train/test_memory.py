"""The memory of a step, as it is told before the first one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import flags

from llava.train import memory
from llava.train import train as train_module
from llava.train.memory import (
    LargestBatch,
    available_memory,
    count_kept,
    estimate_memory,
    find_largest_batch,
    keep_freed_memory,
    language_model_bytes,
    report_memory,
    trying,
)
from llava.train.train import build_trainer, main
from llava.train.trainer import LlavaTrainer


@pytest.fixture
def trainer(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> LlavaTrainer:
    return build_trainer(flags(gpt2_dir, tower_dir, mixed_data, tmp_path))


def run_rows(trainer: LlavaTrainer, rows: int, length: int) -> torch.Tensor:
    ids = torch.ones(rows, length, dtype=torch.long)
    return trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, return_logits=False)


@pytest.mark.parametrize(("rows", "length", "attention"), [(1, 40, "sdpa"), (4, 100, "eager"), (3, 200, "eager")])
def test_rows_keep_what_was_estimated(trainer: LlavaTrainer, rows: int, length: int, attention: str) -> None:
    trainer.model.set_attn_implementation(attention)
    batch = LargestBatch(rows, length, length, targets=rows * length, images=0, videos=0)
    with trying(trainer):
        estimated = language_model_bytes(trainer.model, batch, checkpointing=False)
        kept = count_kept(trainer.model, partial(run_rows, trainer, rows, length))
        # What a step holds beside what autograd keeps: the gradient of the largest tensor.
        assert estimated == pytest.approx(kept.total + kept.largest, rel=0.1)
        assert language_model_bytes(trainer.model, batch, checkpointing=True) < estimated
        # A head that runs at few positions makes few logits; a row of several samples attends to less.
        assert language_model_bytes(trainer.model, batch._replace(targets=1), checkpointing=False) < estimated
        of_short = language_model_bytes(trainer.model, batch._replace(sample=10), checkpointing=False)
        assert (of_short < 0.99 * estimated) == (attention == "eager")


def test_weights_that_autocast_casts_are_there_once(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    trainer = build_trainer(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, bf16="true"))
    with trying(trainer):
        assert torch.is_autocast_enabled("cpu")
        run = partial(run_rows, trainer, 6, 120)
        kept = count_kept(trainer.model, run)
        batch = LargestBatch(6, 120, 120, targets=720, images=0, videos=0)
        estimated = language_model_bytes(trainer.model, batch, checkpointing=False)
    assert estimated == pytest.approx(kept.total + kept.largest, rel=0.1)


def test_an_estimate_is_said_and_changes_nothing(
    trainer: LlavaTrainer, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    state, was_training = torch.get_rng_state(), trainer.model.training
    report_memory(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training == was_training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    said = capsys.readouterr().out
    assert said.startswith("memory of a step, at most: about ")
    assert not caplog.records
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    report_memory(trainer)
    assert "lower --per_device_train_batch_size" in caplog.text


def test_the_parts_of_an_estimate(trainer: LlavaTrainer) -> None:
    batch = find_largest_batch(trainer)
    assert batch is not None
    lengths = trainer.train_dataset.lengths
    assert (batch.rows, batch.length) == (trainer.args.per_device_train_batch_size, abs(lengths).max())
    assert batch.targets < batch.rows * batch.length
    assert batch.images
    assert batch.videos
    estimate = estimate_memory(trainer, batch)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert (estimate.gradients, estimate.optimizer) == (4 * trained, 8 * trained)
    without = estimate_memory(trainer, batch._replace(images=0.0, videos=0.0))
    assert without.activations < estimate.activations


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({"packing": "true", "per_device_train_batch_size": 1}, 1), ({"max_tokens_per_batch": 600}, None)],
)
def test_batches_of_several_samples(gpt2_dir, tower_dir, mixed_data, tmp_path: Path, changes: dict, rows) -> None:
    trainer = build_trainer(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes))
    batch = find_largest_batch(trainer)
    assert batch is not None
    assert batch.rows == rows or batch.rows * batch.length <= 600
    assert batch.sample == abs(trainer.train_dataset.lengths).max()


def test_a_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (limit := tmp_path / "max").write_text("5000\n")
    (used := tmp_path / "current").write_text("2000\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", limit)
    monkeypatch.setattr(memory, "_CGROUP_USED", used)
    assert available_memory(torch.device("cpu")) == 3000
    limit.write_text("max\n")
    assert available_memory(torch.device("cpu")) > 10**6


def test_freed_memory_is_kept_where_there_is_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *values: asked.append(values))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    keep_freed_memory()
    assert asked == [(-3, 2**30), (-1, 2**31 - 1)]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())  # a C library without it
    keep_freed_memory()


def test_what_the_environment_says_of_memory_holds(
    gpt2_dir, tower_dir, mixed_data, tmp_path: Path, monkeypatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(train_module, "keep_freed_memory", lambda: asked.append(True))
    for number, name in enumerate((None, "GLIBC_TUNABLES")):
        if name is not None:
            monkeypatch.setenv(name, "glibc.malloc.mmap_threshold=131072")
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / str(number), max_steps=1))
    assert asked == [True]


@pytest.mark.parametrize(
    "error", [RuntimeError("a part of one's own"), AssertionError(), IndexError("5"), ValueError()]
)
def test_what_cannot_be_estimated_stops_no_run(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(memory, "find_largest_batch", lambda _: LargestBatch(1, 4, 4, 4, 0, 0))
    monkeypatch.setattr(memory, "estimate_memory", fail)
    args = SimpleNamespace(process_index=0, device=torch.device("cpu"))
    report_memory(SimpleNamespace(is_deepspeed_enabled=False, args=args))
    assert "cannot be told beforehand" in caplog.text
