"""Throughput in the log, on a clock that the test moves, and the operations that MFU counts, against torch's count."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState

from llava.data.collator import SupervisedCollator, model_inputs
from llava.data.dataset import SupervisedDataset
from llava.model.multimodal_encoder import base
from llava.train import throughput
from llava.train.evaluation import EvaluationMeter
from llava.train.flops import ModelFlops, find_peak, parse_peak
from llava.train.saving import CheckpointWriter
from llava.train.scoring import ScoringCallback
from llava.train.throughput import RATES, advise
from llava.train.train import main
from llava.train.trainer import LlavaTrainer
from llava.types import Example, VisualInput

WORDS = [3, 1, 4, 1, 5, 9, 2, 6]
LOAD, STEP, OTHER = 0.5, 2.0, 100.0  # seconds of a sample, of a micro-batch, of an evaluation or a save


class Clock:
    """Moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, seconds: float) -> None:
        original = getattr(owner, method)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, slow)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    clock.takes(monkeypatch, SupervisedDataset, "__getitem__", LOAD)
    clock.takes(monkeypatch, LlavaTrainer, "training_step", STEP)
    clock.takes(monkeypatch, EvaluationMeter, "add", OTHER)
    clock.takes(monkeypatch, CheckpointWriter, "_write_folder", OTHER)
    return clock


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    samples = [{"id": str(i), "conversations": [{"from": "gpt", "value": "gatto " * n}]} for i, n in enumerate(WORDS)]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(samples))
    return path


def flags(model: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": model, "data_path": data, "output_dir": output, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "logging_steps": 2,
        "logging_first_step": "false", "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_rates_are_those_of_training_alone(gpt2_dir, texts, tmp_path, clock, monkeypatch) -> None:
    """Two micro-batches a step; saves, milestones and evaluations take 100 s each; a resumed run counts from there."""
    monkeypatch.setattr("llava.train.callbacks.FIRST_STEPS", 0)
    changes = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_data_path": texts}
    argv = flags(gpt2_dir, texts, tmp_path / "out", **changes, milestones=4, peak_flops="1G")
    first = main([*argv, "--word_limit", "9"])  # Ends with step 2.
    resumed = main([*argv, "--resume_from_checkpoint", "auto", "--peak_flops", "2G"])
    # Two checkpoints, two evaluations of eight samples, a milestone.
    assert clock.now == 1000 + 5 * OTHER + 16 * LOAD + 8 * (LOAD + STEP)
    total_flops = 0.0
    for trainer, samples in ((first, range(4)), (resumed, range(4, 8))):
        history = trainer.state.log_history
        line, last = [entry for entry in history if "loss" in entry][-1], history[-1]
        seconds = 4 * (LOAD + STEP)
        tokens = sum(len(trainer.train_dataset[i].input_ids) for i in samples)
        model, targets = ModelFlops(trainer.model), tokens - len(samples)
        flops = model.per_token * tokens + model.per_target * targets
        total_flops, mfu = total_flops + flops, flops / seconds / trainer.throughput.peak
        expected = [
            4 / seconds,
            tokens / seconds,
            targets / seconds,
            LOAD / (LOAD + STEP),
            0,
            line["peak_memory_gib"],
            mfu,
        ]
        assert [line[name] for name in RATES] == pytest.approx(expected, rel=1e-3)
        assert [last[f"train_{name}"] for name in RATES] == pytest.approx(expected, rel=1e-2)
        assert trainer.state.total_flos == pytest.approx(total_flops)
        assert last["train_steps_per_second"] == pytest.approx(2 / seconds, rel=1e-3)
        assert trainer.throughput.peak == (1e9 if trainer is first else 2e9)
        assert 0.05 < line["peak_memory_gib"] < 64


def test_scores_are_no_training(gpt2_dir, load_tiny, clock, monkeypatch) -> None:
    meter = throughput.ThroughputMeter(load_tiny().model, 0, None)
    asked = SimpleNamespace(stop_request=SimpleNamespace(agreed=False), word_budget=SimpleNamespace(at_milestone=False))
    scoring = ScoringCallback(asked, SimpleNamespace(is_due=lambda *words: True), None)  # type: ignore[arg-type]
    asked.throughput = meter
    monkeypatch.setattr(ScoringCallback, "_score", lambda *words: None)
    clock.takes(monkeypatch, ScoringCallback, "_score", OTHER)
    meter.on_epoch_begin(None, None, None)  # type: ignore[arg-type]
    clock.now += STEP
    scoring.on_step_end(None, TrainerState(global_step=1), TrainerControl())  # type: ignore[arg-type]
    assert (meter.totals().seconds, clock.now) == (STEP, 1000 + STEP + OTHER)


def test_padding_and_samples_that_are_left_out_do_not_count(gpt2_dir, texts, tmp_path, clock) -> None:
    samples = json.loads(texts.read_text())
    samples[1] |= {"image": "none.png"}
    texts.write_text(json.dumps(samples))
    changes = {"max_steps": 1, "per_device_train_batch_size": 4, "on_bad_sample": "skip", "max_bad_share": 1}
    trainer = main(flags(gpt2_dir, texts, tmp_path / "out", **changes, save_strategy="no", check_data="none"))
    line = trainer.state.log_history[0]
    seconds = 8 * LOAD + 2 * STEP
    assert line["samples_per_second"] == pytest.approx(7 / seconds, rel=1e-3)
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in rows]) for rows in ((0, 1, 2, 3), (4, 5, 6, 7))]
    tokens, positions = (sum(int(f(b["attention_mask"])) for b in batches) for f in (torch.sum, torch.numel))
    assert line["tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)
    assert line["padding"] == pytest.approx(1 - tokens / positions, rel=1e-3)
    assert "mfu" not in line


def test_a_long_wait_is_told_once_with_what_to_do(gpt2_dir, texts, tmp_path, clock, monkeypatch, caplog) -> None:
    monkeypatch.setattr(throughput, "_ADVICE_AFTER", 6.0)
    monkeypatch.setattr(throughput, "count_cores", lambda: 4)
    main(flags(gpt2_dir, texts, tmp_path / "out", max_steps=4, save_strategy="no"))
    said = [r.getMessage() for r in caplog.records if "waiting for data" in r.getMessage()]
    assert said == ["20% of the time of training is spent waiting for data: give --dataloader_num_workers 2 (it is 0)"]
    assert "this rank has 4 cores" in advise(0.2, 4, 4)
    assert "give --dataloader_num_workers 4" in advise(0.2, 2, 4)


@pytest.mark.parametrize("backbone", ["llava_gpt2", "llava_llama"])
def test_operations_are_those_that_torch_counts(load_tiny, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of text and one with media: 6N of the language model, 2N of the tower, the packer as torch counts it."""
    monkeypatch.setattr(base, "linear_by_onednn", nullcontext)  # whose products torch does not count
    loaded = load_tiny(backbone)
    model = loaded.model.train()
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    image, clip = (VisualInput(kind, torch.zeros(n, 3, 56, 56, dtype=torch.uint8), (56, 56))
                   for kind, n in (("image", 1), ("video", 3)))  # fmt: skip
    layout, ids = loaded.vision.layout, loaded.vision.token_ids
    spans = [next(iter(ids.values()))] * (layout.num_tokens("image") + layout.num_tokens("video", 3))
    flops = ModelFlops(model)
    counted, expected = [], []
    for media, text in (([], [5, 6, 7, 8]), ([image, clip], [*spans, 5, 6])):
        labels = [-100] * (len(text) - 2) + text[-2:]
        batch = SupervisedCollator(0)([Example("a", text, labels, media)])
        with FlopCounterMode(display=False) as counter:
            model(**model_inputs(batch), return_logits=False).loss.backward()
        counts = counter.get_flop_counts()["Global"]
        # The language model's attention is left out of what MFU counts, and so is that of the tower.
        counted.append(sum(number for name, number in counts.items() if "attention" not in str(name)))
        expected.append(flops.count(batch, len(text), 2))
    assert expected[0] == pytest.approx(counted[0], rel=0.02)
    # The tower's class token is not counted: 1 of 17 rows here, 1 of 257 in the recipes.
    assert expected[1] == pytest.approx(counted[1], rel=0.06)
    # Features that are given need no tower.
    kept = {**batch, "images": [torch.zeros(len(frames), 1, 16, 32) for frames in batch["images"]]}
    weights = sum(
        p.numel() for n, p in model.get_vision_tower().named_parameters() if p.ndim > 1 and "position" not in n
    )
    assert flops.count(batch, len(text), 2) - flops.count(kept, len(text), 2) == 2 * weights * 4 * 16
    # A tower that is not in memory yet counts as one that is.
    later = load_tiny(backbone, find_tower_hash=lambda *args: loaded.vision.vision_tower_hash).model
    for name, parameter in later.named_parameters():
        parameter.requires_grad = ".vision_tower." not in name
    assert not list(later.get_vision_tower().parameters())
    assert ModelFlops(later).count(batch, len(text), 2) == expected[1]
    model.get_model().mm_projector.requires_grad_(False)
    frozen = ModelFlops(model).count(batch, len(text), 2)
    assert 0 < expected[1] - frozen < expected[1] - flops.count({}, len(text), 2)


def test_a_token_meets_its_own_experts_alone(load_tiny) -> None:
    model = load_tiny("llava_mixtral").model.requires_grad_(True)
    shapes = {n: p.shape for n, p in model.named_parameters() if "layers" in n and p.ndim > 1 and "vision" not in n}
    # Two of four experts.
    weights = sum(shape.numel() / (2 if "experts" in name else 1) for name, shape in shapes.items())
    assert ModelFlops(model).per_token == 6 * weights


def test_peaks() -> None:
    cpu = torch.device("cpu")
    assert [parse_peak(text) for text in ("989T", "1.5P", "9.9e14", "80g")] == [9.89e14, 1.5e15, 9.9e14, 8e10]
    assert find_peak(None, cpu, torch.float32) is None
    assert 1e8 < find_peak("measure", cpu, torch.float32) < 1e14
    for wrong in ("fast", "0", "-1T", "1X"):
        with pytest.raises(ValueError, match="--peak_flops"):
            parse_peak(wrong)


def test_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("Tesla P4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = find_peak(None, SimpleNamespace(type="cuda"), torch.bfloat16)  # type: ignore[arg-type]
        assert found == (None if peak is None else peak * 1e12)
