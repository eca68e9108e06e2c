"""The benchmarks of memory and of growth run, at tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script finds those beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("epoch", "train_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux' /proc")
def test_an_estimate_stands_beside_what_was_held(tmp_path: Path, capsys) -> None:
    memory, threads = load_script("benchmarks/memory.py"), torch.get_num_threads()
    memory.write_parts(tmp_path, memory.QUICK, 2)
    memory.print_case("4 frames, bf16", tmp_path, is_quick=True)
    torch.set_num_threads(threads)
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["positions"][0] == memory.QUICK.batch
    assert said["estimated"] > 0
    assert said["held"] > 0


def test_costs_are_told_for_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = load_script("benchmarks/growth.py")
    for name, values in {"FRAMES": (1, 5), "BATCHES": (1, 2), "LENGTH": 16, "CONTEXTS": (16, 32)}.items():
        monkeypatch.setattr(growth, name, values)
    growth.main(["--quick", "--repeats", "1", "--output", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert {len(costs) for costs in found["tower_seconds_a_frame"].values()} == {2}
    for dtype in ("fp32", "bf16"):
        assert set(found["language_model_microseconds_a_token"][dtype]["rows"]) == set(growth.KINDS)
