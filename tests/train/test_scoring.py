"""Scores while training: the run stays the same bit for bit, and its tables are whole whatever happens."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava.eval.likelihood import Candidate, Choice
from llava.train.preemption import Preempted
from llava.train.score_plan import ScorePlan
from llava.train.score_table import ScoreRow, ScoreTable
from llava.train.scoring import ScoringCallback
from llava.train.train import build_trainer, train
from llava.train.trainer import LlavaTrainer
from tests.train.test_training import flags, write_json


class RunningScorer:
    """Runs the model in its present mode, and draws from every generator that there is."""

    def __init__(self, trainer: LlavaTrainer) -> None:
        self.trainer = trainer
        self.before: Callable[[], None] = lambda: None

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        self.before()
        random.random(), np.random.rand(), torch.rand(1)
        scores = []
        for choice in choices:
            ids = [self.trainer.processing_class(c.text, return_tensors="pt").input_ids for c in choice.candidates]
            scores.append(tuple(float(self.trainer.model(input_ids=i, labels=i).loss) for i in ids))
            if on_scored is not None:
                on_scored(1)
        return scores


class Task:
    def __init__(self, name: str, number: int = 3) -> None:
        self.name = name
        pair = (Candidate("Il gatto dorme."), Candidate("Il gatto dormono."))
        self.choices = [Choice(str(i), pair) for i in range(number)]

    def summarize(self, scores):
        row = {"score": sum(one for one, _ in scores), "adjusted": 50.0, "ties": 0, "items": len(scores), "low": None,
               "high": None, "chance": 50.0, "metric": "accuracy, %"}  # fmt: skip
        return row, [{"kind": "UID", "name": "a", "score": 1.0, "adjusted": 1.0, "ties": 0, "items": len(scores)}]


@pytest.fixture(scope="module")
def model_dir(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout."""
    folder = shutil.copytree(gpt2_dir, tmp_path_factory.mktemp("model") / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.2, "embd_pdrop": 0.2}))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(5)]
    return write_json(tmp_path_factory.mktemp("data") / "texts.json", samples)


def prepare(model_dir: Path, texts: Path, output: Path, **changes) -> LlavaTrainer:
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    return build_trainer(flags(model_dir, None, texts, output, **steps, **changes))


def scored(trainer: LlavaTrainer, tasks: Sequence[str] = ("blimp", "ewok"), every: int = 2) -> RunningScorer:
    """Let a trainer score tasks."""
    scorer = RunningScorer(trainer)
    plan = ScorePlan([Task(name) for name in tasks], scorer, [every], False)
    trainer.add_callback(ScoringCallback(trainer, plan, ScoreTable(Path(trainer.args.output_dir))))
    return scorer


def read(output: Path, name: str = "scores.csv") -> list[dict[str, str]]:
    with (output / name).open(newline="") as file:
        return list(csv.DictReader(file))


def places(output: Path) -> list[tuple[int, str]]:
    return [(int(row["step"]), row["task"]) for row in read(output)]


@pytest.fixture(scope="module")
def plain(model_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing scores."""
    output = tmp_path_factory.mktemp("plain") / "out"
    train(prepare(model_dir, texts, output))
    return output


@pytest.fixture(scope="module")
def run(model_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaTrainer]:
    """The same, scored after every second step."""
    output = tmp_path_factory.mktemp("scored") / "out"
    trainer = prepare(model_dir, texts, output)
    scored(trainer)
    train(trainer)
    return output, trainer


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random states and losses of two runs are equal bit for bit."""
    for name in ("model.safetensors", "checkpoint-4/model.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("optimizer.pt", "rng_state.pth"):
        ours, theirs = (torch.load(folder / "checkpoint-6" / name, weights_only=False) for folder in (one, other))
        assert str(ours) == str(theirs)
    state = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, other)]
    ours, theirs = ([(e["step"], e["loss"], e["grad_norm"]) for e in history if "loss" in e] for history in state)
    assert ours == theirs
    assert len(ours) == 6


def test_weights_are_those_of_a_run_that_is_not_scored(plain: Path, run: tuple[Path, LlavaTrainer]) -> None:
    output, trainer = run
    assert_same_run(output, plain)
    assert places(output) == [(step, task) for step in (2, 4, 6) for task in ("blimp", "ewok")]
    logged = {e["step"]: e["score/blimp"] for e in trainer.state.log_history if "score/blimp" in e}
    # The model is scored without dropout, and with the weights of that step.
    assert logged == {int(row["step"]): float(row["score"]) for row in read(output) if row["task"] == "blimp"}
    assert len(set(logged.values())) == 3
    assert len(read(output, "scores_by_group.csv")) == 6
    assert (output / "scores.png").stat().st_size > 5000


def test_scores_are_cut_to_the_step_gone_on_from(model_dir, texts, plain, run, tmp_path: Path) -> None:
    output = shutil.copytree(run[0], tmp_path / "out")
    wanted = read(output)
    # As a kill leaves it after step 5: the next scores are half written, and no model is there.
    for name in ("checkpoint-6", "model.safetensors", "trainer_state.json"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output / "run_identity.json").unlink()
    trainer = prepare(model_dir, texts, output, resume_from_checkpoint="auto")
    scored(trainer)
    train(trainer)
    assert read(output) == wanted
    assert_same_run(output, plain)


@pytest.mark.parametrize("call", [6, 14])  # In the first task of step 4, and in its second one.
def test_scores_that_a_signal_breaks_off_are_made_up_for(model_dir, texts, plain, run, tmp_path, call: int) -> None:
    output, calls = tmp_path / "out", iter(range(100))
    trainer = prepare(model_dir, texts, output)
    scorer = scored(trainer)

    def strike() -> None:
        if trainer.state.global_step == 4 and next(calls) == (0 if call == 6 else 1):
            signal.raise_signal(signal.SIGTERM)

    scorer.before = strike
    with pytest.raises(Preempted):
        train(trainer)
    assert places(output) == [(2, "blimp"), (2, "ewok"), *([(4, "blimp")] if call == 14 else [])]
    again = prepare(model_dir, texts, output, resume_from_checkpoint="auto")
    scored(again)
    train(again)
    assert read(output) == read(run[0])
    assert_same_run(output, plain)


def test_what_cannot_be_scored_is_an_error_before_the_first_step(model_dir, texts, tmp_path: Path) -> None:
    trainer = prepare(model_dir, texts, tmp_path / "out")
    scorer = scored(trainer)

    def fail() -> None:
        raise ValueError("blimp.jsonl, line 3: too long")

    scorer.before = fail
    with pytest.raises(ValueError, match=r"--score_data: blimp cannot be scored: blimp.jsonl, line 3: too long"):
        train(trainer)
    assert trainer.state.global_step == 0


def test_a_failure_later_costs_the_scores_and_not_the_run(model_dir, texts, plain, tmp_path: Path, caplog) -> None:
    output = tmp_path / "out"
    trainer = prepare(model_dir, texts, output)
    scorer = scored(trainer)

    def fail() -> None:
        if trainer.state.global_step == 4:
            raise torch.OutOfMemoryError("out of memory")

    scorer.before = fail
    train(trainer)
    assert {step for step, _ in places(output)} == {2, 6}
    assert "blimp is not scored at this step, training goes on" in caplog.text
    assert "scores of step 4 are missing" in caplog.text
    assert_same_run(output, plain)


def test_a_table_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("model,points\na,3\n")
    with pytest.raises(ValueError, match="its columns are model, points"):
        ScoreTable(tmp_path).check()


def test_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = ScoreTable(tmp_path)
    row = ScoreRow(2, None, "wug_adj", 0.1 + 0.2, None, 0, 5, None, 0.5, None, "Spearman's rho")
    table.add(row, [])
    again = ScoreTable(tmp_path)
    again.begin(3)
    assert again.rows == [row]
    again.begin(1)
    assert not (tmp_path / "scores.csv").exists()
