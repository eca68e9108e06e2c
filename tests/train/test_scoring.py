"""Scores while training: the run stays the same bit for bit, and its tables are whole whatever happens."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.eval.babylm.__main__ import parse_arguments, score_models
from llava.eval.babylm.results import ACCURACY, CORRELATION, GroupResult, TaskResult
from llava.eval.blind import BlindCheck
from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from llava.train.preemption import Preempted
from llava.train.score_plan import ScorePlan
from llava.train.score_table import ScoreTable
from llava.train.scoring import ScoringCallback
from llava.train.train import build_trainer, train
from llava.train.trainer import LlavaTrainer
from tests.train.test_training import flags, write_json

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}


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
        self.name, self.swapped = name, None
        pair = (Candidate("Il gatto dorme."), Candidate("Il gatto dormono."))
        self.choices = [Choice(str(i), pair) for i in range(number)]

    def summarize(self, scores):
        groups = (GroupResult("UID", "a", 1.0, 1.0, 0, len(scores)),)
        total = sum(one for one, _ in scores)
        return TaskResult(self.name, ACCURACY, total, 50.0, None, None, 0, len(scores), 50.0, groups)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(5)]
    return write_json(tmp_path_factory.mktemp("data") / "texts.json", samples)


def prepare(dropout_dir: Path, texts: Path, output: Path, **changes) -> LlavaTrainer:
    return build_trainer(flags(dropout_dir, None, texts, output, **RUN, **changes))


def scored(trainer: LlavaTrainer, tasks: Sequence[str] = ("blimp", "ewok"), every: int = 2) -> RunningScorer:
    """Let a trainer score tasks."""
    scorer = RunningScorer(trainer)
    plan = ScorePlan([Task(name) for name in tasks], lambda: scorer, [every], False)
    trainer.add_callback(ScoringCallback(trainer, plan, ScoreTable(Path(trainer.args.output_dir))))
    return scorer


def read(output: Path, name: str = "scores.csv") -> list[dict[str, str]]:
    with (output / name).open(newline="") as file:
        return list(csv.DictReader(file))


def places(output: Path) -> list[tuple[int, str]]:
    return [(int(row["step"]), row["task"]) for row in read(output)]


@pytest.fixture(scope="module")
def plain(dropout_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing scores."""
    output = tmp_path_factory.mktemp("plain") / "out"
    train(prepare(dropout_dir, texts, output))
    return output


@pytest.fixture(scope="module")
def run(dropout_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaTrainer]:
    """The same, scored after every second step."""
    output = tmp_path_factory.mktemp("scored") / "out"
    trainer = prepare(dropout_dir, texts, output)
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


def test_scores_are_cut_to_the_step_gone_on_from(dropout_dir, texts, plain, run, tmp_path: Path) -> None:
    output = shutil.copytree(run[0], tmp_path / "out")
    wanted = read(output)
    # As a kill leaves it after step 5: the next scores are half written, and no model is there.
    for name in ("checkpoint-6", "model.safetensors", "trainer_state.json"):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output / "run_identity.json").unlink()
    trainer = prepare(dropout_dir, texts, output, resume_from_checkpoint="auto")
    scored(trainer)
    train(trainer)
    assert read(output) == wanted
    assert_same_run(output, plain)


@pytest.mark.parametrize("call", [6, 14])  # In the first task of step 4, and in its second one.
def test_scores_that_a_signal_breaks_off_are_made_up_for(dropout_dir, texts, plain, run, tmp_path, call: int) -> None:
    output, calls = tmp_path / "out", iter(range(100))
    trainer = prepare(dropout_dir, texts, output)
    scorer = scored(trainer)

    def strike() -> None:
        if trainer.state.global_step == 4 and next(calls) == (0 if call == 6 else 1):
            signal.raise_signal(signal.SIGTERM)

    scorer.before = strike
    with pytest.raises(Preempted):
        train(trainer)
    assert places(output) == [(2, "blimp"), (2, "ewok"), *([(4, "blimp")] if call == 14 else [])]
    again = prepare(dropout_dir, texts, output, resume_from_checkpoint="auto")
    scored(again)
    train(again)
    assert read(output) == read(run[0])
    assert_same_run(output, plain)


def test_what_cannot_be_scored_is_an_error_before_the_first_step(dropout_dir, texts, tmp_path: Path) -> None:
    trainer = prepare(dropout_dir, texts, tmp_path / "out")
    scorer = scored(trainer)

    def fail() -> None:
        raise ValueError("blimp.jsonl, line 3: too long")

    scorer.before = fail
    with pytest.raises(ValueError, match=r"--score_data: blimp cannot be scored: blimp.jsonl, line 3: too long"):
        train(trainer)
    assert trainer.state.global_step == 0


def test_a_failure_later_costs_the_scores_and_not_the_run(dropout_dir, texts, plain, tmp_path: Path, caplog) -> None:
    output = tmp_path / "out"
    trainer = prepare(dropout_dir, texts, output)
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
    row = table.add(2, None, TaskResult("wug_adj", CORRELATION, 0.1 + 0.2, None, None, 0.5, 0, 5, 0.0, ()))
    again = ScoreTable(tmp_path)
    again.begin(3)
    assert again.rows == [row]
    again.begin(1)
    assert not (tmp_path / "scores.csv").exists()


def test_blind_checks_are_cut_with_their_scores(tmp_path: Path) -> None:
    result = TaskResult("vqa", ACCURACY, 50.0, 50.0, None, None, 0, 5, 50.0, ())
    table, check = ScoreTable(tmp_path), BlindCheck(50.0, 1 / 3, 50 - 1 / 3, -0.5, 1.0, True)
    for step in (2, 4):
        table.add(step, 10 * step, result, check)
    rows = read(tmp_path, "scores_blind_check.csv")
    assert rows[0] == {"step": "2", "words": "20", "task": "vqa", "score": "50.0", "other_score": str(1 / 3),
                       "drop": str(50 - 1 / 3), "low": "-0.5", "high": "1.0", "is_blind": "1"}  # fmt: skip
    again = ScoreTable(tmp_path)
    again.begin(4)
    assert again.checks == table.checks
    # A kill between the tables of a step: the check is there, its score is not.
    lines = (tmp_path / "scores.csv").read_text().splitlines(keepends=True)
    (tmp_path / "scores.csv").write_text("".join(lines[:-1]))
    again.begin(4)
    assert read(tmp_path, "scores_blind_check.csv") == rows[:1]
    again.begin(0)
    assert not (tmp_path / "scores_blind_check.csv").exists()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("blimp", "supplement"):
        (folder / name).mkdir()
        rows = [{"sentence_good": f"Il gatto {i} dorme.", "sentence_bad": f"Il gatto {i} dormono.", "UID": "agreement",
                 "field": "morphology"} for i in range(5)]  # fmt: skip
        (folder / name / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_flags_ask_for_scores_at_steps_and_milestones(dropout_dir, texts, tasks, plain, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    # A text has four words, and the first two steps have five texts: 24 words are reached with step 3.
    times = {"score_at": "steps:5", "milestones": "24", "score_data": tasks, "score_tasks": "blimp"}
    argv = flags(dropout_dir, None, texts, output, **RUN, **times)
    argv.insert(argv.index("steps:5"), "milestones")
    train(build_trainer(argv))
    assert "scored after every 5 steps, at each of 1 milestones and after the last step, 10 sentences" in (
        capsys.readouterr().out
    )
    assert [(row["step"], row["words"], row["items"]) for row in read(output)] == [
        ("3", "36", "5"), ("5", "56", "5"), ("6", "60", "5"),
    ]  # fmt: skip
    assert_same_run(output, plain)


def test_pictures_are_checked_as_by_the_command(
    dropout_dir, tower_dir, mixed_data, tmp_path: Path, monkeypatch, caplog, capsys
) -> None:
    """Scores with other items' pictures: the same figures as afterwards by hand, and nothing trained is another."""
    pairs, steps = tmp_path / "winoground", RUN | {"max_steps": 2}
    (pairs / "images").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 250 - 60 * i, 90)).save(pairs / "images" / f"{i}.png")
    rows = [{"caption_0": f"Il {i}.", "caption_1": f"Il {i} gatto.", "image": f"{i}.png"} for i in range(4)]
    (pairs / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain, output = tmp_path / "plain", tmp_path / "out"
    train(build_trainer(flags(dropout_dir, tower_dir, mixed_data, plain, **steps)))
    trainer = build_trainer(
        flags(dropout_dir, tower_dir, mixed_data, output, **steps, score_data=pairs, score_at="steps:1")
    )
    score = LikelihoodScorer.score

    def look(self: LikelihoodScorer, choices: Sequence[Choice], on_scored=None) -> list[tuple[float, ...]]:
        """From the second step on, the second caption is the likelier one of a picture that is not its own."""
        told = score(self, choices, on_scored)
        seen = trainer.state.global_step >= 2
        other = [Path(c.media[0].path).stem not in c.candidates[0].text for c in choices]
        return [(a, b + 100 * (seen and no)) for (a, b), no in zip(told, other, strict=True)]

    monkeypatch.setattr(LikelihoodScorer, "score", look)
    train(trainer)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    assert (
        "16 sentences each time: winoground (4 items, and again with other items' pictures)" in capsys.readouterr().out
    )
    told = read(output, "scores_blind_check.csv")
    assert [(row["step"], row["task"], row["is_blind"]) for row in told] == [
        ("1", "winoground", "1"), ("2", "winoground", "0"),
    ]  # fmt: skip
    command = ["--model_path", str(output), "--data", str(pairs), "--out", str(tmp_path / "results")]
    (results,) = score_models(parse_arguments(command))
    check = results.blind["winoground"].to_json()
    assert check["drop"] == 100
    assert {name: float(told[1][name]) for name in check} == check
    (line,) = (record for record in caplog.records if "BLIND" in record.getMessage())
    assert (line.levelname, line.getMessage().split(":")[0]) == ("WARNING", "step 1")
    logged = next(e for e in reversed(trainer.state.log_history) if "score/winoground" in e)
    assert (logged["score/winoground_other_pictures"], logged["score/winoground_drop"]) == (0.0, 100.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score_data": "nowhere"}, r"--score_data nowhere: there is no such file or folder"),
        ({"score_tasks": "blmp"}, r"--score_tasks 'blmp': known are blimp"),
        ({"score_tasks": "ewok"}, r"--score_tasks: ewok: .* has no data of it"),
        ({"score_at": "epochs"}, r"--score_at 'epochs': known are milestones and steps:N"),
        ({"score_at": "milestones"}, r"--score_at milestones needs --milestones"),
        ({"score_data": None, "score_at": "steps:2"}, r"--score_at is given without --score_data"),
        ({"score_data": None, "score_tasks": "blimp"}, r"--score_tasks: blimp: needs --score_data"),
        ({"do_train": "false", "eval_data_path": "x", "do_eval": "true"}, r"--do_train is false"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(dropout_dir, texts, tasks, tmp_path, changes, said) -> None:
    argv = flags(dropout_dir, None, texts, tmp_path / "out", **{"score_data": tasks, **changes})
    with pytest.raises(ValueError, match=said):
        build_trainer(argv)


def test_items_that_changed_are_said_and_so_are_repeats(dropout_dir, texts, tasks, tmp_path: Path, caplog) -> None:
    data = shutil.copytree(tasks / "blimp", tmp_path / "blimp") / "pairs.jsonl"
    identities = []
    for text in (data.read_text(), data.read_text().replace("Il gatto 1", "Il gatto 0")):
        data.write_text(text)
        trainer = build_trainer(flags(dropout_dir, None, texts, tmp_path / "out", score_data=tmp_path, **RUN))
        assert trainer.checkpoints.identity is not None
        identities.append(replace(trainer.checkpoints.identity, length={"steps": 6}))
    (said,) = identities[1].compare(identities[0]).allowed
    assert said.startswith("the items that it is scored on (--score_data) was {'blimp': ")
    assert [m for m in caplog.messages if "blimp: 1 rows say what an earlier one says" in m]


def test_a_sentence_over_the_context_is_named_with_its_line(dropout_dir, texts, tmp_path: Path) -> None:
    (tmp_path / "blimp").mkdir()
    row = {"sentence_good": "a b" * 600, "sentence_bad": "b", "UID": "u", "field": "f"}
    (tmp_path / "blimp" / "u.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"u\.jsonl, line 1: a candidate has \d+ tokens, but the context"):
        build_trainer(flags(dropout_dir, None, texts, tmp_path / "out", score_data=tmp_path / "blimp"))
