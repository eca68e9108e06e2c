"""Does the cost of a frame or a token stay the same, as there are more of them?

    python benchmarks/growth.py --output benchmarks/growth.json

- tower: DINOv2-large, 4 of its 23 layers, 224 pixels: CPU seconds a frame for 1 to 16 frames, in one call of the
  vision model as its class has it, and as ``VisionTower`` runs it, in chunks and by oneDNN.
- language model: GPT-2 of width 768, 4 of its 12 layers, forward and backward: CPU microseconds a token for batches of
  1 to 8 rows of 384 tokens, and for rows of 256 to 2,048 tokens, with attention by sdpa and eager, with dropout
  0.1 and without, and with ``--fused_gelu``.

The rows are measured twice: with memory as glibc gives it (``rows, freed memory returned``), and as a run of this
library on a CPU does, which keeps what was freed (``llava.train.memory``).

Layers are alike, so few of them tell how the cost grows. Times are CPU seconds of this process on one thread; the kinds
alternate and the median of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from train_step import QUICK, RECIPE, Sizes, build_tokenizer, build_vision, describe_machine
from transformers import GPT2Config, GPT2LMHeadModel

from llava.model.multimodal_encoder.base import build_tower
from llava.train.memory import keep_freed_memory
from llava.train.parts import fuse_gelu

LAYERS = 4
FRAMES = (1, 2, 4, 8, 16)
BATCHES, LENGTH = (1, 2, 4, 8), 384
RETURNED = "rows, freed memory returned"
CONTEXTS = (256, 512, 1024, 2048)
KINDS: dict[str, dict[str, Any]] = {
    "sdpa, dropout": {"attention": "sdpa", "dropout": 0.1},
    "eager, dropout": {"attention": "eager", "dropout": 0.1},
    "eager, dropout, fused_gelu": {"attention": "eager", "dropout": 0.1, "fused": True},
    "sdpa, no attention dropout": {"attention": "sdpa", "dropout": 0.0},
    "sdpa, no attention dropout, fused_gelu": {"attention": "sdpa", "dropout": 0.0, "fused": True},
}


class Cost(NamedTuple):
    """Of one run: CPU seconds, and pages of memory that the system had to clear for it."""

    seconds: float
    faults: float


def alternate(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Cost]:
    """The medians of each."""
    taken: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            faults, start = count_faults(), time.process_time()
            run()
            taken[name].append(Cost(time.process_time() - start, count_faults() - faults))
    return {name: Cost(*map(statistics.median, zip(*costs, strict=True))) for name, costs in taken.items()}


def count_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure_tower(sizes: Sizes, repeats: int) -> dict[str, dict[str, float]]:
    """CPU seconds a frame, by the number of frames."""
    few = replace(sizes, tower_layers=min(LAYERS + 1, sizes.tower_layers))
    tower = build_tower(build_vision(few, build_tokenizer(few))).requires_grad_(False).eval()
    found: dict[str, dict[str, float]] = {"plain": {}, "as the library": {}}
    for number in FRAMES:
        frames = torch.randint(0, 255, (number, 3, sizes.frame_side, sizes.frame_side), dtype=torch.uint8)

        def plain(frames: torch.Tensor = frames) -> None:
            with torch.no_grad():
                tower.encode(tower.prepare(frames))

        runs: dict[str, Callable[[], Any]] = {"plain": plain, "as the library": lambda frames=frames: tower(frames)}
        for name, cost in alternate(runs, repeats).items():
            found[name][str(number)] = round(cost.seconds / number, 4)
    return found


def build_language_model(sizes: Sizes, attention: str, dropout: float, fused: bool = False) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes.vocabulary, bos_token_id=0, eos_token_id=0,
        n_positions=max(CONTEXTS), n_embd=sizes.width, n_layer=min(LAYERS, sizes.layers),
        n_head=sizes.heads, attn_pdrop=dropout, attn_implementation=attention,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    if fused:
        fuse_gelu(model)
    return model


def measure_language_model(
    sizes: Sizes, repeats: int, bf16: bool, is_kept: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """CPU microseconds a token and page faults a step, by the number of rows and by their length."""
    models = {name: build_language_model(sizes, **kind) for name, kind in KINDS.items()}
    by_rows = [(rows, LENGTH) for rows in BATCHES]
    by_length = [(1, length) for length in CONTEXTS]
    shapes = {"rows": by_rows, "length": by_length} if is_kept else {RETURNED: by_rows}
    axes = [*shapes, *(f"{axis}: page faults a step" for axis in shapes)]
    found: dict[str, dict[str, dict[str, float]]] = {axis: {name: {} for name in KINDS} for axis in axes}
    for axis, sized in shapes.items():
        for rows, length in sized:
            ids = torch.randint(0, sizes.vocabulary, (rows, length))  # (rows, length)

            def step(model: GPT2LMHeadModel, ids: torch.Tensor = ids) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    hidden = model.transformer(ids, use_cache=False).last_hidden_state
                hidden.float().square().mean().backward()
                model.zero_grad()

            runs = {name: lambda model=model, step=step: step(model) for name, model in models.items()}
            size = str(length if axis == "length" else rows)
            for name, cost in alternate(runs, repeats).items():
                found[axis][name][size] = round(1e6 * cost.seconds / ids.numel(), 1)
                found[f"{axis}: page faults a step"][name][size] = cost.faults
            print(axis, rows, length, {name: list(found[axis][name].values())[-1] for name in KINDS}, file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else RECIPE
    try:
        result = {
            "machine": describe_machine(),
            "tower_seconds_a_frame": measure_tower(sizes, args.repeats),
        }
        costs: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {}}
        for is_kept in (False, True):
            if is_kept:
                keep_freed_memory()
            for name in costs:
                costs[name] |= measure_language_model(sizes, args.repeats, name == "bf16", is_kept)
        result["language_model_microseconds_a_token"] = costs
    finally:
        torch.set_num_threads(threads)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
