"""The most memory that a step takes, beside what ``llava.train.memory`` estimates before it.

    python benchmarks/memory.py --output benchmarks/memory.json

The Italian recipe of ``epoch.py``: GPT-2 12 x 768 over 30,000 tokens, DINOv2-large, four clips a step; each case is
two steps in a process of its own, on one thread. Clips of 16 frames have 4 slow ones (``--mm_slow_frames``), as a
context of 1,024 tokens asks for. ``held`` is the process's peak, ``estimated`` what was said of it before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from epoch import LIVE, build, write_parts
from train_step import QUICK, RECIPE, describe_machine

from llava.train.memory import estimate_memory, find_largest_batch

CASES: dict[str, dict[str, str]] = {
    "4 frames, fp32": {},
    "4 frames, bf16": {"bf16": "true"},
    "4 frames, bf16 and bf16_weights": {"bf16": "true", "bf16_weights": "true"},
    "4 frames, bf16 and gradient_checkpointing": {"bf16": "true", "gradient_checkpointing": "true"},
    "16 frames, bf16": {"bf16": "true", "num_frames": "16", "mm_slow_frames": "4"},
    "16 frames, bf16, attention eager": {
        "bf16": "true", "num_frames": "16", "mm_slow_frames": "4", "attn_implementation": "eager", "fused_gelu": "true",
    },
}  # fmt: skip


def print_case(name: str, folder: Path, is_quick: bool) -> None:
    """Train two steps and print the estimate and the peak of this process, in GiB."""
    torch.set_num_threads(1)
    words = [word for flag, value in CASES[name].items() for word in (f"--{flag}", value)]
    trainer, _ = build(folder, QUICK if is_quick else RECIPE, LIVE, "fp32", folder, "--max_steps", "2", *words)
    batch = find_largest_batch(trainer)
    assert batch is not None
    estimated = estimate_memory(trainer, batch).total
    trainer.train()
    # Not getrusage, whose peak a process inherits from the one that began it.
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**20
    positions = [batch.rows, batch.length]
    print(json.dumps({"held": round(held, 2), "estimated": round(estimated / 2**30, 2), "positions": positions}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print_case(args.case[0], Path(args.case[1]), args.quick)
        return
    gib = {}
    with tempfile.TemporaryDirectory() as temporary:
        write_parts(Path(temporary), replace(QUICK if args.quick else RECIPE), 2)
        for name in args.cases:
            words = [sys.executable, __file__, "--case", name, temporary, *(["--quick"] if args.quick else [])]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            gib[name] = json.loads(done.stdout.strip().splitlines()[-1])
            print(name, gib[name], file=sys.stderr, flush=True)
    if args.output:
        args.output.write_text(json.dumps({"machine": describe_machine(), "gib": gib}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
