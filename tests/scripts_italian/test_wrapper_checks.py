"""test_gpt2_wrapper.py passes on the wrapper as it is and fails on one that is broken."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script
from transformers import GenerationMixin

from llava.model import llava_arch
from llava.model.language_model.llava_gpt2 import LlavaGPT2ForCausalLM, LlavaGPT2Model


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts_italian/test_gpt2_wrapper.py")


@pytest.fixture(scope="module")
def bench(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    bench = script.Bench(tmp_path_factory.mktemp("bench"))
    bench.build()
    return bench


def run(script: ModuleType, bench: Any, capsys: pytest.CaptureFixture[str], *starts: str) -> list[str]:
    """The lines of the checks whose names start so; the FAIL lines must be as many as are counted."""
    checks = [(name, function) for name, function in script.CHECKS if name.startswith(starts)]
    count = script.run_checks(checks, bench)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks) == len(starts)
    assert sum(line.startswith("FAIL  ") for line in lines) == count
    return lines


def test_all_pass(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("pass  ") for line in lines) == len(script.CHECKS)
    assert lines[-1] == f"{len(script.CHECKS)} of {len(script.CHECKS)} checks passed"


def test_exit_status_of_a_broken_wrapper(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llava_arch, "splice", lambda ids, embeddings, features, visual: embeddings)
    monkeypatch.setattr(script, "CHECKS", [c for c in script.CHECKS if c[0].startswith(("gradients", "model types"))])
    assert script.main([]) == 1
    assert "FAIL  gradients reach" in capsys.readouterr().out


def test_a_check_that_raises_fails(
    script: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*args: Any) -> None:
        raise RuntimeError("shapes cannot be\nmultiplied")

    monkeypatch.setattr(llava_arch, "splice", explode)
    intact, broken = run(script, bench, capsys, "the head stays tied", "the loss at supervised")
    assert intact.startswith("pass  ")
    assert broken.startswith("FAIL  ")
    assert "RuntimeError: shapes cannot be multiplied" in broken


def test_untied_head(
    script: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = type(bench).load

    def load_untied(self: Any, vision: bool = True) -> Any:
        loaded = original(self, vision)
        loaded.model.lm_head.weight = torch.nn.Parameter(loaded.model.lm_head.weight.detach().clone())
        return loaded

    monkeypatch.setattr(type(bench), "load", load_untied)
    assert run(script, bench, capsys, "the head stays tied")[0].startswith("FAIL  ")


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "check"),
    [
        (LlavaGPT2Model, "embed_tokens", property(lambda self: self.wpe), "model, embed_tokens"),
        (LlavaGPT2ForCausalLM, "generate", GenerationMixin.generate, "visual tokens are never"),
    ],
)
def test_broken_parts(
    script: ModuleType,
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: type,
    name: str,
    replacement: Any,
    check: str,
) -> None:
    monkeypatch.setattr(owner, name, replacement)
    assert run(script, bench, capsys, check)[0].startswith("FAIL  ")


def test_pytest_does_not_collect_the_script() -> None:
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
