"""What ``--bf16_weights`` saves and what it costs: memory of a run, and the curve of its loss beside the others'.

    python benchmarks/bf16_weights.py --output benchmarks/bf16_weights.json

Curves: a GPT-2 of 4 x 256 over 4,000 tokens on English novels of the shared data (``LLAVA_SHARED_DATA``), the same
steps in float32, with ``--bf16`` and with ``--bf16 --bf16_weights``, for some seeds. Memory: the most that a process
holds in three steps of a GPT-2 of 12 x 768 over 30,000 tokens, each in a process of its own, less what it holds before
it loads the model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llava.data.train_tokenizer import main as train_tokenizer
from llava.train.train import main as train

SHARED_DATA = Path(os.environ.get("LLAVA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
KINDS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["--bf16", "true"],
    "bf16_weights": ["--bf16", "true", "--bf16_weights", "true"],
}
LENGTH = 64


def write_texts(folder: Path, number: int) -> Path:
    """Paragraphs of novels, one a line."""
    path = folder / "novels.txt"
    with (
        gzip.open(SHARED_DATA / "text_en" / "eltec_eng.txt.gz", "rt", encoding="utf-8") as novels,
        path.open("w") as out,
    ):
        for _, line in zip(range(number), (line for line in novels if len(line) > 200), strict=False):
            out.write(line)
    return path


def write_model(folder: Path, tokenizer: Path, width: int, layers: int, vocabulary: int) -> Path:
    """A GPT-2 of random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=LENGTH, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    path = folder / f"gpt2-{layers}x{width}"
    GPT2LMHeadModel(config).save_pretrained(path)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(path)
    return path


def flags(model: Path, data: Path, output: Path, kind: str, steps: int, batch: int, seed: int = 0) -> list[str]:
    values = {
        "model_name_or_path": model, "data_path": data, "output_dir": output, "max_steps": steps, "seed": seed,
        "per_device_train_batch_size": batch, "learning_rate": 1e-3, "logging_steps": max(steps // 10, 1),
        "warmup_steps": steps // 10, "report_to": "none", "save_strategy": "no", "use_cpu": "true",
        "disable_tqdm": "true", "overwrite_output_dir": "true", "text_chunking": "concatenate",
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + KINDS[kind]


def draw_curve(argv: list[str]) -> list[list[float]]:
    """Step and loss of each interval."""
    history = train(argv).state.log_history
    steps = max(entry["step"] for entry in history)
    # Of the first steps each one is logged.
    return [[e["step"], round(e["loss"], 4)] for e in history if "loss" in e and e["step"] % (steps // 10) == 0]


def measure_memory(argv: list[str]) -> float:
    """GiB that a process holds more after three steps than before."""
    program = (
        "import sys; from llava.train.train import main; from llava.train.throughput import peak_memory\n"
        "before = peak_memory(); main(sys.argv[1:]); print('held', (peak_memory() - before) / 2**30)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True)
    return float(done.stdout.rpartition("held ")[2])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_texts(folder, 2000)
        train_tokenizer(["--data", str(data), "--output_dir", str(folder / "tokenizer"), "--vocab_size", "4000"])
        small = write_model(folder, folder / "tokenizer", 256, 4, 4000)
        large = write_model(folder, folder / "tokenizer", 768, 12, 30_000)
        curves = {
            kind: [
                draw_curve(flags(small, data, folder / kind, kind, args.steps, 8, seed)) for seed in range(args.seeds)
            ]
            for kind in KINDS
        }
        memory = {kind: measure_memory(flags(large, data, folder / f"{kind}-m", kind, 3, 1)) for kind in KINDS}
    final = {kind: statistics.mean(curve[-1][1] for curve in own) for kind, own in curves.items()}
    result = {
        "loss_of_the_last_interval": {kind: round(loss, 4) for kind, loss in final.items()},
        "held_gib": {kind: round(held, 2) for kind, held in memory.items()},
        "bf16_weights_over_bf16": round(memory["bf16_weights"] / memory["bf16"], 3),
        "curves": curves,
        "steps": args.steps, "seeds": args.seeds, "positions_of_a_step": 8 * LENGTH,
        "machine": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps({name: value for name, value in result.items() if name != "curves"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
