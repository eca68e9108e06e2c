"""An epoch of the Italian recipe: with the tower live, filling a feature cache, and with the cache full.

    OMP_NUM_THREADS=1 python benchmarks/epoch.py --batch 1 --steps 8 --rounds 1 --output benchmarks/epoch.json

The recipe is the real one (see ``train_step.py``), with random weights: GPT-2 12 x 768, DINOv2-large, clips of 4
frames, 81 and 9 latents. With one clip a step it is done in half an hour, and the ratio is lower than with the recipe's
four: the optimizer, whose time does not depend on the clips, has a larger share. Whole runs of ``llava.train``
alternate in one process: live, fill (the first epoch with ``--feature_cache_fill``) and cached (a later epoch). A step
is timed from the end of the one before it, with its clips decoded in this process, and the first of a run is left out.
Times are CPU seconds of this process on one thread, of which medians are compared.

Also told: whether the losses of the three are the same to the last bit; the losses with the other forms of keeping
features; milliseconds to read a batch; the peak memory of a process that trains live with logits at all positions, and
of one that trains from the cache, both in batches of 4.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from train_step import QUICK, RECIPE, Sizes, build_tokenizer, describe_machine, full_loss, write_clip
from transformers import Dinov2Config, Dinov2Model, GPT2Config, GPT2LMHeadModel, TrainerCallback

from llava.model import llava_arch
from llava.train.train import build_trainer
from llava.train.trainer import LlavaTrainer

STEPS = 4
FLAGS: dict[str, tuple[str, ...]] = {"fp32": (), "bf16": ("--bf16", "true"), "fp32_onednn": ("--onednn", "true")}
"""Flags of each precision; the last is float32 with the products of training by oneDNN."""
LIVE, FILL, CACHED = "live", "fill", "cached"


def write_parts(folder: Path, sizes: Sizes, steps: int) -> None:
    """Language model, tower and clips."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(sizes)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=sizes.context, n_embd=sizes.width, n_layer=sizes.layers,
        n_head=sizes.heads, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    tower = Dinov2Config(
        hidden_size=sizes.tower_width, num_hidden_layers=sizes.tower_layers, num_attention_heads=sizes.tower_heads,
        image_size=sizes.tower_image, patch_size=14,
    )  # fmt: skip
    Dinov2Model(tower).save_pretrained(folder / "tower")
    side = {"height": sizes.frame_side, "width": sizes.frame_side}
    processor = {
        "do_center_crop": True, "crop_size": side, "size": {"shortest_edge": sizes.frame_side * 8 // 7},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(processor))
    samples = []
    for i in range(steps * sizes.batch):
        write_clip(folder / f"{i}.mp4", sizes, seed=i)
        caption = " ".join(
            f"parola{(i * 131 + k * 17) % (sizes.vocabulary - 1) + 1}" for k in range(sizes.caption_words)
        )
        turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": caption}]
        samples.append({"id": str(i), "video": f"{i}.mp4", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))


class StepClock(TrainerCallback):
    """CPU seconds from the end of a step to that of the next."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time()
        self.steps.append(now - self._last)
        self._last = now


def build(
    folder: Path, sizes: Sizes, kind: str, precision: str, cache: Path, *more: str
) -> tuple[LlavaTrainer, StepClock]:
    """A trainer for one epoch."""
    clock = StepClock()
    values: dict[str, object] = {
        "model_name_or_path": folder / "gpt2", "vision_tower": folder / "tower", "data_path": folder / "data.json",
        "output_dir": tempfile.mkdtemp(dir=folder), "mm_resampler_type": "fast_slow_resampler",
        "mm_perceiver_latents": sizes.latents, "mm_perceiver_latents_fast": sizes.latents_fast,
        "mm_resampler_width": sizes.resampler_width, "num_frames": sizes.num_frames, "num_train_epochs": 1,
        "per_device_train_batch_size": sizes.batch, "use_cpu": "true", "save_strategy": "no", "report_to": "none",
        "logging_steps": 1, "disable_tqdm": "true", "decode_timeout": 0,
        "overwrite_output_dir": "true", "dataloader_num_workers": 0,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))] + [*FLAGS[precision]]
    if kind != LIVE:
        words += [
            "--feature_cache",
            str(cache),
            *(["--feature_cache_fill"] if kind == FILL else ["--feature_cache_strict"]),
        ]
    return build_trainer([*words, *more], callbacks=[clock]), clock


def run(*args: Any) -> tuple[list[float], list[float]]:
    """Train; CPU seconds of the steps but the first, and all losses."""
    trainer, clock = build(*args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.steps[1:], losses


def measure(folder: Path, sizes: Sizes, precision: str, rounds: int) -> dict[str, Any]:
    """All of one precision."""
    times: dict[str, list[float]] = {kind: [] for kind in (LIVE, FILL, CACHED)}
    losses: dict[str, list[float]] = {}
    for i in range(rounds):
        cache = folder / f"cache-{precision}-{i}"
        for kind in (LIVE, FILL, CACHED):
            steps, losses[kind] = run(folder, sizes, kind, precision, cache)
            times[kind] += steps
    medians = {kind: statistics.median(steps) for kind, steps in times.items()}
    found: dict[str, Any] = {
        "step_seconds": {kind: round(seconds, 3) for kind, seconds in medians.items()},
        "samples_per_second_over_live": {k: round(medians[LIVE] / medians[k], 2) for k in (FILL, CACHED)},
        "steps_measured": len(times[LIVE]),
        "losses_are_live_ones": {kind: losses[kind] == losses[LIVE] for kind in (FILL, CACHED)},
        "live_losses": losses[LIVE],
        "read_batch_milliseconds": read_times(folder, sizes, precision, cache),
        "largest_difference_of_a_loss": {},
    }
    print(json.dumps(found, indent=1), file=sys.stderr, flush=True)
    for storage in ("int8",) if precision == "bf16" else ("bf16", "int8"):
        kept = folder / f"cache-{precision}-{storage}"
        _, inexact = run(folder, sizes, FILL, precision, kept, "--feature_cache_storage", storage)
        pairs = zip(inexact, losses[LIVE], strict=True)
        found["largest_difference_of_a_loss"][storage] = max(abs(a - b) for a, b in pairs)
    return found


def read_times(folder: Path, sizes: Sizes, precision: str, cache: Path) -> dict[str, float]:
    """CPU milliseconds to read a batch in memory's reach, as a worker does: decoded, and from the cache."""
    found = {}
    for kind in (LIVE, CACHED):
        trainer, _ = build(folder, sizes, kind, precision, cache)
        dataset: Any = trainer.train_dataset
        taken = []
        for i in range(16):
            start = time.process_time()
            trainer.data_collator(
                dataset.__getitems__([(i * sizes.batch + k) % len(dataset) for k in range(sizes.batch)])
            )
            taken.append(time.process_time() - start)
        found[kind] = round(1000 * statistics.median(taken[len(dataset) // sizes.batch :]), 2)
    return found


def peak_memory(folder: Path, is_quick: bool, kind: str, precision: str, cache: Path) -> float:
    """GiB that a process of its own reaches."""
    words = [sys.executable, __file__, "--memory-of", kind, str(folder), str(cache)]
    words += ["--precision", precision, *(["--quick"] if is_quick else [])]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(folder: Path, cache: Path, kind: str, precision: str, sizes: Sizes) -> None:
    """Train two steps and print the peak of this process, in GiB."""
    trainer, _ = build(folder, sizes, kind, precision, cache, "--max_steps", "2")
    with mock.patch.object(llava_arch, "supervised_loss", full_loss) if kind == LIVE else nullcontext():
        trainer.train()
    # Not getrusage, whose peak a process inherits from the one that began it.
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, help="clips of a step (default 4)")
    parser.add_argument("--steps", type=int, help="steps of an epoch (default 4)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--precision", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = replace(QUICK if args.quick else RECIPE, **({"batch": args.batch} if args.batch else {}))
    steps = args.steps or STEPS
    if args.memory_of:
        kind, folder, cache = args.memory_of
        print_peak(Path(folder), Path(cache), kind, args.precision[0], sizes)
        return
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    result |= {"machine": describe_machine(), "batch": sizes.batch}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_parts(folder, sizes, steps)
        for precision in args.precision:
            found = measure(folder, sizes, precision, args.rounds)
            cache = folder / f"cache-{precision}-0"
            peaks = {kind: peak_memory(folder, args.quick, kind, precision, cache) for kind in (LIVE, CACHED)}
            found["peak_gib"] = {LIVE: round(peaks[LIVE], 2), CACHED: round(peaks[CACHED], 2)}
            found["peak_cached_over_live"] = round(peaks[CACHED] / peaks[LIVE], 3)
            result[precision] = found
            print(json.dumps({precision: found}, indent=1), file=sys.stderr)
            if args.output:
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
