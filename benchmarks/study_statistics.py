"""How often do the tests of ``llava.eval.study`` see a difference where there is none?

python benchmarks/study_statistics.py --out benchmarks/study_statistics.json

Models are made up: each item has a difficulty, and each seed of each variant is better or worse than the mean by a
normal draw. Both variants are drawn alike, so that a test at 5 % should call 5 % of the studies significant.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.eval.study.statistics import compare

NUM_GROUPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_studies", type=int, default=300)
    args = parser.parse_args()
    rows = []
    for spread, items in ((0.01, 200), (0.03, 200), (0.03, 20)):
        for seeds in (2, 3, 5):
            found = [draw_study(spread, items, seeds, number) for number in range(args.num_studies)]
            bootstrap, t_test = (float(np.mean([told[index] < 0.05 for told in found])) for index in (0, 1))
            rows.append(
                {"spread_of_seeds": spread, "items": NUM_GROUPS * items, "seeds": seeds,
                 "bootstrap_below_0.05": round(bootstrap, 3), "t_test_below_0.05": round(t_test, 3)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    args.out.write_text(json.dumps({"studies": args.num_studies, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def draw_study(spread: float, items: int, seeds: int, number: int) -> tuple[float, float]:
    """p of both tests for two variants that do not differ."""
    rng = np.random.default_rng((number, seeds, items, round(1000 * spread)))
    difficulty = rng.beta(5, 3, (NUM_GROUPS, items))

    def draw_models() -> list[dict[str, np.ndarray]]:
        shares = [np.clip(difficulty + rng.normal(0, spread), 0, 1) for _ in range(seeds)]
        return [{str(g): (rng.random(items) < share[g]).astype(float) for g in range(NUM_GROUPS)} for share in shares]

    found = compare(draw_models(), draw_models(), replicates=400, seed=number)
    assert found.p_seeds is not None
    return found.p_value, found.p_seeds


if __name__ == "__main__":
    main()
