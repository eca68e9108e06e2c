"""How much of a batch is padding, and how unequal ranks' work is: by sampling strategy, by tokens and in packs.

    python benchmarks/padding.py

Lengths are generated: 40 % text of 5 to 400 tokens, the others captions behind 360 visual tokens. Only batches
are made, nothing is trained. The result is written beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from llava.data.samplers import BY_MODALITY, RANDOM, STRATEGIES, DataOrder, RankBatchSampler

NUM_SAMPLES, BATCH, ACCUMULATION, RANKS = 100_000, 8, 2, 8


def generate_lengths() -> np.ndarray:
    """Tokens of each sample, negative for text."""
    rng = np.random.default_rng(0)
    text = -rng.integers(5, 400, NUM_SAMPLES)
    captions = 360 + rng.poisson(20, NUM_SAMPLES)
    return np.where(rng.random(NUM_SAMPLES) < 0.4, text, captions)


def measure(strategy: str, signed: np.ndarray, batch_size: int = BATCH, **units: int) -> dict[str, float]:
    """Shares over an epoch; with ``units``, those of ``DataOrder``, ``batch_size`` counts packs or batches."""
    lengths = np.abs(signed)
    order = DataOrder(
        NUM_SAMPLES,
        batch_size * ACCUMULATION * RANKS,
        strategy,
        lengths=signed if strategy == BY_MODALITY else lengths,
        **units,
    )
    ranks = [list(RankBatchSampler(order, batch_size, ACCUMULATION, RANKS, rank)) for rank in range(RANKS)]
    tokens = positions = waited = mixed = 0
    for together in zip(*ranks, strict=True):
        if "pack_length" in units:
            padded = [sum_of_rows(lengths[batch], units["pack_length"]) for batch in together]
        else:
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


def sum_of_rows(lengths: np.ndarray, pack_length: int) -> int:
    """Positions of a batch of packs, each filled up to the longest of them."""
    rows = [0]
    for length in lengths.tolist():
        if rows[-1] + length > pack_length:
            rows.append(0)
        rows[-1] += length
    return len(rows) * max(rows)


def main() -> None:
    signed = generate_lengths()
    result = {
        "samples": NUM_SAMPLES, "batch": BATCH, "accumulation": ACCUMULATION, "ranks": RANKS,
        "strategies": {strategy: measure(strategy, signed) for strategy in STRATEGIES},
        "packs": measure(RANDOM, signed, batch_size=2, pack_length=1024),
        "tokens": measure(RANDOM, signed, batch_size=1, max_tokens=2048),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
