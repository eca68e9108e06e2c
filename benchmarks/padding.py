"""How much of a batch is padding, and how unequal ranks' work is, by sampling strategy.

    python benchmarks/padding.py

Lengths are generated: 40 % text of 5 to 400 tokens, the others captions behind 360 visual tokens. Only batches
are made, nothing is trained. The result is written beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from llava.data.samplers import BY_MODALITY, STRATEGIES, DataOrder, RankBatchSampler

NUM_SAMPLES, BATCH, ACCUMULATION, RANKS = 100_000, 8, 2, 8


def generate_lengths() -> np.ndarray:
    """Tokens of each sample, negative for text."""
    rng = np.random.default_rng(0)
    text = -rng.integers(5, 400, NUM_SAMPLES)
    captions = 360 + rng.poisson(20, NUM_SAMPLES)
    return np.where(rng.random(NUM_SAMPLES) < 0.4, text, captions)


def measure(strategy: str, signed: np.ndarray) -> dict[str, float]:
    """Shares over an epoch."""
    lengths = np.abs(signed)
    order = DataOrder(
        NUM_SAMPLES,
        BATCH * ACCUMULATION * RANKS,
        strategy,
        lengths=signed if strategy == BY_MODALITY else lengths,
    )
    ranks = [list(RankBatchSampler(order, BATCH, ACCUMULATION, RANKS, rank)) for rank in range(RANKS)]
    tokens = positions = waited = mixed = 0
    for together in zip(*ranks, strict=True):
        padded = [len(batch) * lengths[batch].max() if batch else 0 for batch in together]
        tokens += sum(int(lengths[batch].sum()) for batch in together)
        positions += sum(padded)
        waited += RANKS * max(padded)
        mixed += sum(len(set(np.sign(signed[batch]))) > 1 for batch in together)
    return {
        "padding": round(1 - tokens / positions, 4),
        "ranks_waiting": round(1 - positions / waited, 4),
        "micro_batches_of_both_modalities": round(mixed / sum(map(len, ranks)), 4),
    }


def main() -> None:
    signed = generate_lengths()
    result = {
        "samples": NUM_SAMPLES, "batch": BATCH, "accumulation": ACCUMULATION, "ranks": RANKS,
        "strategies": {strategy: measure(strategy, signed) for strategy in STRATEGIES},
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
