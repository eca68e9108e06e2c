"""What two processes make of one machine: DDP and ZeRO-2 on the CPU, beside one process with the same step.

    python benchmarks/scaling.py --output benchmarks/scaling.json

All train the same GPT-2 (4 layers x 256) on the same text, with 16 samples of 128 tokens a step, as 1 x 16 and as
2 x 8, each process with one thread and gloo between them. In turns, one run of each in a repeat; figures are medians:

- ``samples_per_second``: as logged, without the first steps. Two processes double it where two cores are free; ``load``
  has the load average before the run, for where they are not.
- ``cpu_ms_per_sample``: processor time of all processes together, which other programs disturb little. What it has
  above one process's is the price of the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from llava.train.distributed import gather_from_ranks, leave_process_group
from llava.train.throughput import Totals
from llava.train.train import build_trainer, train
from llava.train.trainer import LlavaTrainer

ENGINES: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "ddp": (2, []),
    "zero2": (2, ["--deepspeed", "zero2"]),
}
STEP, TOKENS, WARMUP, STEPS = 16, 128, 4, 20


def write_model(folder: Path) -> None:
    """A small GPT-2 and a tokenizer of whole words."""
    from train_step import RECIPE, build_tokenizer

    tokenizer = build_tokenizer(replace(RECIPE, vocabulary=2000))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=TOKENS, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_texts(path: Path) -> None:
    """As many samples as all steps take, each a little shorter than the context."""
    rng = random.Random(0)
    number = STEP * (WARMUP + STEPS)
    texts = [" ".join(f"parola{rng.randrange(1, 2000)}" for _ in range(TOKENS - 2)) for _ in range(number)]
    path.write_text(
        json.dumps([{"id": i, "conversations": [{"from": "gpt", "value": t}]} for i, t in enumerate(texts)])
    )


class Window(TrainerCallback):
    """Measures the steps behind the first ones."""

    trainer: LlavaTrainer
    rates: dict[str, float]
    cpu: float
    begin = Totals()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARMUP:
            self.begin, self.cpu = self.trainer.throughput.totals(), time.process_time()
        elif state.global_step == state.max_steps:
            self.cpu = sum(gather_from_ranks(time.process_time() - self.cpu))
            self.rates = self.trainer.throughput.measure(self.begin)[0]


def work(words: list[str], result: Path) -> None:
    """One rank's training; the first writes what it came to."""
    torch.set_num_threads(1)
    window = Window()
    window.trainer = build_trainer(words, callbacks=[window])
    train(window.trainer)
    if window.trainer.args.process_index == 0:
        figures = {"samples_per_second": window.rates["samples_per_second"], "data_wait": window.rates["data_wait"]}
        figures["cpu_ms_per_sample"] = 1000 * window.cpu / (STEP * STEPS)
        result.write_text(json.dumps(figures))
    leave_process_group()


def run(engine: str, folder: Path) -> dict[str, float]:
    """One training with an engine, in processes of its own."""
    ranks, flags = ENGINES[engine]
    words = [
        "--model_name_or_path", folder / "model", "--data_path", folder / "texts.json", "--output_dir", folder / "out",
        "--overwrite_output_dir", "true", "--per_device_train_batch_size", STEP // ranks, "--max_steps", WARMUP + STEPS,
        "--save_strategy", "no", "--logging_strategy", "no", "--report_to", "none", "--use_cpu", "true",
        "--disable_tqdm", "true", "--data_cache_dir", folder / "cache", *flags,
    ]  # fmt: skip
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    load = os.getloadavg()[0]
    # DeepSpeed's CPU communication is compiled, which takes ninja from the environment's own programs.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [*launch, __file__, "--work", str(result), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stderr[-3000:]}")
    return {**json.loads(result.read_text()), "load": load}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--work"]:
        work(words[2:], Path(words[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(words)
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in args.engines}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_texts(folder / "texts.json")
        for _ in range(args.repeats):
            for engine in args.engines:
                found[engine].append(run(engine, folder))
    from train_step import describe_machine

    report: dict[str, Any] = {"machine": describe_machine() | {"cores": os.cpu_count()}, "repeats": args.repeats}
    for engine, runs in found.items():
        report[engine] = {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]}
        print(f"{engine}: {report[engine]}", flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
