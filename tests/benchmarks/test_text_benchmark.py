"""The benchmark of batches of captions runs every kind, and each trains as many steps as it says."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import load_script


def test_a_quick_run_reports_every_kind(tmp_path: Path, capsys) -> None:
    text = load_script("benchmarks/text.py")
    output = tmp_path / "result.json"
    sizes = ["--width", "64", "--layers", "1", "--vocabulary", "300"]
    text.main([*sizes, "--rounds", "1", "--steps", "1", "--output", str(output)])
    report = json.loads(output.read_text())
    assert set(report["supervised_tokens_per_cpu_second"]) == set(text.KINDS)
    assert all(rate > 0 for rate in report["supervised_tokens_per_cpu_second"].values())
    assert "73 packs of 512 tokens" in capsys.readouterr().out
