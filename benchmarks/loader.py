"""The share of a run that waits for data, with 0 to 4 workers.

    python benchmarks/loader.py --output benchmarks/loader.json

Real runs of ``LlavaTrainer`` on clips of 480 x 360 that are decoded while it trains, one or four to a batch, with two
models: ``recipe`` is the Italian one with its tower live (``train_step.py``), ``light`` a model so small that a step is
little more than its data, which is where workers matter. The figures are those that a run logs (``data_wait``,
``samples_per_second``), without its first two steps, in which workers start.

Torch has one thread, so that the other cores are the workers'. Where other programs want the cores as well, waits grow:
``load`` has the load average of the minute before each run, and each figure is a median over ``--repeats``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from train_step import QUICK, RECIPE, Sizes, build_model, build_tokenizer, describe_machine, write_data
from transformers import PrinterCallback, TrainerCallback

from llava.data.collator import SupervisedCollator
from llava.data.module import make_supervised_data_module
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.throughput import Totals
from llava.train.trainer import LlavaTrainer

WARMUP = 2
# Steps of a run: those of the recipe take many seconds, and so are of one clip here.
MODELS = {
    "recipe": (replace(RECIPE, batch=1), 4),
    "light": (replace(QUICK, clip_size=RECIPE.clip_size, clip_frames=48), 60),
}
SHOWN = ("samples_per_second", "data_wait", "padding", "peak_memory_gib")


class Window(TrainerCallback):
    """Keeps what a run had done when its first steps were over."""

    def __init__(self) -> None:
        self.trainer: LlavaTrainer | None = None
        self.begin = Totals()
        self.rates: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if state.global_step == WARMUP:
            self.begin = self.trainer.throughput.totals()
        elif state.global_step == state.max_steps:
            self.rates = self.trainer.throughput.measure(self.begin)[0]


def run(sizes: Sizes, model: Any, tokenizer: Any, steps: int, workers: int, folder: Path) -> dict[str, float]:
    """Train with so many workers, and what the steps behind the first came to."""
    args = TrainingArguments(
        output_dir=str(folder / "output"),
        use_cpu=True,
        per_device_train_batch_size=sizes.batch,
        max_steps=WARMUP + steps,
        dataloader_num_workers=workers,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data_args = DataArguments(data_path=[str(folder / "data.json")])
    data = make_supervised_data_module(tokenizer, data_args, model.vision, sizes.context)
    window = Window()
    trainer = LlavaTrainer(
        model=model,
        args=args,
        train_dataset=data["train_dataset"],
        data_collator=SupervisedCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[window],
    )
    trainer.remove_callback(PrinterCallback)
    window.trainer = trainer
    trainer.train()
    return {name: window.rates[name] for name in SHOWN} | {"load": round(os.getloadavg()[0], 2)}


def measure(sizes: Sizes, steps: int, workers: Sequence[int], repeats: int) -> dict[str, dict[str, float]]:
    """Medians for each number of workers; one after the other in each repeat."""
    found: dict[int, list[dict[str, float]]] = {number: [] for number in workers}
    with tempfile.TemporaryDirectory() as name:
        path = write_data(Path(name), sizes)
        samples = json.loads(path.read_text())
        # One epoch for all steps: workers load nothing of the next one before it begins.
        more = [{**sample, "id": f"{sample['id']}-{i}"} for i in range(WARMUP + steps + 8) for sample in samples]
        path.write_text(json.dumps(more))
        transformers.set_seed(0)
        tokenizer = build_tokenizer(sizes)
        model = build_model(sizes, tokenizer)
        for _ in range(repeats):
            for number in workers:
                found[number].append(run(sizes, model, tokenizer, steps, number, Path(name)))
                print(f"{number} workers: {found[number][-1]}", flush=True)
    return {
        str(number): {key: round(statistics.median(one[key] for one in runs), 4) for key in runs[0]}
        for number, runs in found.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="in place of each model's")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": describe_machine() | {"cores": os.cpu_count()}, "repeats": args.repeats}
    for model in args.models:
        sizes, steps = MODELS[model]
        print(model, flush=True)
        report[model] = measure(sizes, args.steps or steps, args.workers, args.repeats)
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
    sys.exit()
