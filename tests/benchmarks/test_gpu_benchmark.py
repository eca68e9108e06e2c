"""The script for a GPU tries itself on the CPU: a check, a limit of time, and what no time is left for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from conftest import load_script


def test_checks_run_without_a_gpu(tmp_path: Path, capsys) -> None:
    gpu = load_script("benchmarks/gpu.py")
    output = tmp_path / "result.json"
    assert gpu.main(["--out", str(output), "--only", "check_packs"]) == 0
    result = json.loads(output.read_text())
    assert result["check_packs"]["ok"]
    assert set(result["check_packs"]["relative_difference"]) == {"eager", "sdpa"}
    assert "check_packs" in capsys.readouterr().out


def test_a_section_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load_script("benchmarks/gpu.py")

    def slow(bench):
        yield "first", {"tokens_per_second": 1.0}
        time.sleep(5)

    found: dict = {}
    parts = list(gpu.run_section(slow, None, 0.2, found))
    assert len(parts) == 2
    assert found["first"] == {"tokens_per_second": 1.0}
    assert "took longer than 0 s" in found["error"]
