"""Two ranks of different modality, by every engine: the weights of one process, and unused modules left alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script

from llava.model.loading import load_model

ROOT = Path(__file__).parents[2]
JOBS = {"zero1": ("mixed",), "zero2": ("mixed", "grounded")}
"""Of engines that do not do them all: both share DeepSpeed's optimizer, and hold whole weights as DDP does."""


@pytest.fixture(scope="module")
def ranks() -> ModuleType:
    """The benchmark's schedules and its worker."""
    return load_script("benchmarks/mixed_ranks.py")


@pytest.fixture(scope="module")
def jobs(ranks: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """The jobs of an engine by name; those of "alone" are done already, in one process."""
    folder = tmp_path_factory.mktemp("ranks")
    model, tower = ranks.write_models(folder)
    texts = ["t t / t t", "tt t / t -"]

    def build(engine: str) -> dict:
        def job(name: str, schedule: list[str], tower: str | None = tower, **flags):
            return ranks.Job(model, tower, str(folder / engine / name), schedule, flags)

        return {
            "mixed": job("mixed", ranks.AWKWARD),
            "checkpointed": job("checkpointed", ranks.AWKWARD[1:4], **ranks.VARIANTS["trained tower"]),
            "grounded": job("grounded", ranks.AWKWARD[1:6], **ranks.VARIANTS["coordinates"]),
            "blind": job("blind", texts, tower=None),
            "seeing": job("seeing", texts),
        }

    for job in build("alone").values():
        ranks.train(job, None)
    return build


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_an_engine_on_two_ranks_does_what_one_process_does(
    ranks: ModuleType, jobs, engine: str, warm_python: str
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    alone, own = jobs("alone"), {name: job for name, job in jobs(engine).items() if name in JOBS.get(engine, (name,))}
    ranks.launch(engine, list(own.values()), python=warm_python)
    for name in own:
        assert ranks.difference(alone[name], own[name]) < ranks.ALLOWED_DIFFERENCE, name
        expected = ranks.watched(alone[name])["moved"]
        assert [ranks.watched(own[name], rank)["moved"] for rank in (0, 1)] == [expected, expected]
    moved = ranks.watched(own["mixed"])["moved"]
    seeing = ["language_model", "mm_projector", "vision_resampler"]
    assert moved == [seeing, seeing[:1], seeing, seeing, seeing, seeing[:2], seeing[:1], seeing]
    if "blind" in own:
        for rank in (0, 1):
            blind, seeing = (ranks.watched(own[name], rank)["gradients"] for name in ("blind", "seeing"))
            assert blind == seeing
            assert all(blind)
    if "checkpointed" in own:
        assert load_model(own["checkpointed"].output).new_parameters == []
