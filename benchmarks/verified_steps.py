"""What ``--verify_steps``, ``--hang_timeout`` and ``--deterministic`` cost a step, in one run.

    python benchmarks/verified_steps.py --output benchmarks/verified_steps.json

A language model trains on pictures and texts, and kinds of steps take turns on the same weights: plain ones, ones that
are verified (computed twice, compared, and the optimizer's step done again), and plain ones with deterministic kernels
alone. Times are CPU seconds of this process on one thread, which other processes disturb little; ratios are those of
medians. ``at_100`` is what one verified step in a hundred adds to a run, ``notes`` what the watchdog's notes of a step
take, measured by themselves, and its thread's looks, one in five seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from llava import progress
from llava.train.rank_notes import RankNotes
from llava.train.train import build_trainer
from llava.train.verification import Verification

SIZES = {"small": (2, 64, 2000, 4), "recipe": (12, 768, 30_000, 8)}
"""Layers and width of the language model, its vocabulary, and samples of a batch."""
NEVER = 1 << 62
KINDS = ("plain", "verified", "deterministic")
WORDS = 60


def write_models(folder: Path, size: str) -> tuple[Path, Path, Path]:
    """A language model and a tower with random weights, and data: every second sample has a picture."""
    layers, width, vocabulary, _ = SIZES[size]
    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<end>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")
    fast.save_pretrained(folder / "model")
    heads = max(width // 64, 2)
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=512)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tower = Dinov2Config(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, image_size=112, patch_size=14)
    Dinov2Model(tower).save_pretrained(folder / "tower")
    processor = {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 128}, "do_center_crop": True,
        "crop_size": {"height": 112, "width": 112}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }  # fmt: skip
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(processor))
    Image.new("RGB", (160, 120), "teal").save(folder / "a.png")
    text = " ".join(f"w{i % (vocabulary - 1)}" for i in range(WORDS))
    samples = [
        {
            "id": f"sample-{i}",
            "conversations": [
                {"from": "human", "value": "<image>" if i % 2 else ""}, {"from": "gpt", "value": f"{text} w{i}"}
            ],
            **({"image": "a.png"} if i % 2 else {}),
        }
        for i in range(64)
    ]  # fmt: skip
    data = folder / "data.json"
    data.write_text(json.dumps(samples))
    return folder / "model", folder / "tower", data


class Turns(TrainerCallback):
    """Lets the kinds of steps take turns, and keeps what each takes."""

    def __init__(self, verification: Verification, warmup: int) -> None:
        self.verification, self.warmup = verification, warmup
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kind = KINDS[state.global_step % len(KINDS)]
        verifies = self.kind == "verified"
        self.verification.every, self.verification._first = (1, state.global_step) if verifies else (NEVER, -1)
        torch.use_deterministic_algorithms(self.kind == "deterministic")
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.warmup * len(KINDS):
            self.seconds[self.kind].append(time.process_time() - self.start)
        torch.use_deterministic_algorithms(False)


def measure(size: str, repeats: int) -> dict[str, Any]:
    """The figures of a size: milliseconds of each kind of step, and ratios."""
    warmup = 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tower, data = write_models(folder, size)
        values = {
            "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": folder / "out",
            "max_steps": (repeats + warmup) * len(KINDS), "per_device_train_batch_size": SIZES[size][3],
            "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no", "verify_steps": 1,
            "logging_strategy": "no", "run_report": "false", "mm_resampler_type": "spatial_pool",
            "learning_rate": 1e-5,
        }  # fmt: skip
        trainer = build_trainer([word for flag, value in values.items() for word in (f"--{flag}", str(value))])
        turns = Turns(trainer.verifier, warmup)
        trainer.callback_handler.callbacks.insert(0, turns)
        trainer.train()
        notes, look = measure_notes(folder)
    milliseconds = {kind: 1000 * statistics.median(taken) for kind, taken in turns.seconds.items()}
    plain = milliseconds["plain"]
    return {
        "repeats": repeats,
        "ms": {kind: round(value, 2) for kind, value in milliseconds.items()},
        "verified_over_plain": round(milliseconds["verified"] / plain, 3),
        "at_100": round((milliseconds["verified"] / plain - 1) / 100, 5),
        "deterministic_over_plain": round(milliseconds["deterministic"] / plain, 3),
        "notes_ms": round(notes, 4),
        "notes": round(notes / plain, 6),
        "look_ms": round(look, 4),
        "looks": round(look / 5000, 7),
    }


def measure_notes(folder: Path, times: int = 2000) -> tuple[float, float]:
    """Milliseconds of the notes of a step of two samples, and of one look at those of eight ranks."""
    ranks = folder / "notes"
    ranks.mkdir()
    for rank in range(1, 8):
        progress.begin(ranks / f"rank-{rank}")
        progress.note(progress.FORWARD, ["sample-1"])
    progress.begin(ranks / "rank-0")
    batch = [{"sample_ids": ["sample-1", "sample-2"]}]
    start = time.process_time()
    for step in range(times):
        progress.begin_step(step)
        for sample in ("sample-1", "sample-2"):
            progress.note(progress.DECODING, [sample], patience=70.0)
        progress.note(progress.LOADING, ())
        progress.note_batches(progress.COUNTING, batch)
        progress.note_batches(progress.FORWARD, batch)
        progress.note(progress.BACKWARD, event=True)
        progress.note(progress.OPTIMIZING, event=True)
        progress.note(progress.BETWEEN, event=True)
    notes = time.process_time() - start
    seen, start = RankNotes(ranks, 0, ["here"] * 8), time.process_time()
    for _ in range(times // 10):
        seen.look()
    look = time.process_time() - start
    progress.end()
    return 1000 * notes / times, 1000 * look / (times // 10)


def name_cpu() -> str:
    """The processor, as the system calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What verified steps, the watchdog and deterministic kernels cost.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": {
            "cpu": name_cpu(), "threads": 1, "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip
    for size in args.sizes:
        result[size] = measure(size, args.repeats)
        print(size, json.dumps(result[size]))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
