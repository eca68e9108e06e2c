"""Items of every task but BLiMP have the winners of a float64 model that reads one candidate after the other."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from llava.eval.babylm.tasks import TASKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def likelihood_tasks() -> ModuleType:
    return load_script("benchmarks/likelihood_tasks.py")


def test_winners_are_those_of_each_candidate_alone_in_float64(
    likelihood_tasks: ModuleType, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(tmp_path / f"{number}.jpg")
    size = likelihood_tasks.Size(width=32, layers=2, tower_width=32, tower_layers=3, side=56)
    monkeypatch.setattr(likelihood_tasks, "PARITY", size)
    flags = ["--tokenizer", str(llama_dir), "--pictures", str(tmp_path), "--out", str(tmp_path / "found.json")]
    likelihood_tasks.main([*flags, "--items", "10", "--parity", str(llama_dir)])
    tasks = json.loads((tmp_path / "found.json").read_text())["parity"][llama_dir.name]
    assert {*tasks} == {*TASKS, "pairs"} - {"blimp"}
    for task, told in tasks.items():
        assert told["items"] == told["same_winner"] == 10, (task, told)
        assert told["largest_difference_of_scores"] < 1e-3, (task, told)
        if task in ("winoground", "vqa"):
            assert told["median_change_of_a_score_by_another_picture"] > 1e-3, (task, told)
