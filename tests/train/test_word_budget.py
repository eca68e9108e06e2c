"""Words, counted on what is trained: exposure.jsonl, --word_limit and --milestones, over epochs, ranks and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.model.loading import load_model
from llava.train import exposure
from llava.train.budget import WordBudget
from llava.train.checkpoint import find_changes, find_damage, list_checkpoints
from llava.train.milestones import TRACKS, Milestone, milestone_name, parse_milestones, parse_words
from llava.train.train import build_trainer, main, train
from llava.train.trainer import LlavaTrainer
from tests.train.test_training import flags, write_json


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven samples of 5 to 15 words, the first 3 of them a question's."""
    samples = [
        {"id": i, "conversations": [{"from": "human", "value": "che cosa fa?"},
                                    {"from": "gpt", "value": " ".join(["il gatto"] + ["dorme"] * i)}]}
        for i in range(11)
    ]  # fmt: skip
    return write_json(tmp_path_factory.mktemp("data") / "texts.json", samples)


def argv(model: Path, data: Path, output: Path, **changes) -> list[str]:
    steps = {"save_strategy": "no", "max_steps": None, "per_device_train_batch_size": 2, "logging_steps": 3}
    return flags(model, None, data, output, **{**steps, **changes})


def run(model: Path, data: Path, output: Path, **changes) -> LlavaTrainer:
    return main(argv(model, data, output, **changes))


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "exposure.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "number"), [("10M", 10**7), ("1_000_000", 10**6), ("1.1M", 1_100_000), ("2B", 2 * 10**9)]
)
def test_numbers_of_words(text: str, number: int) -> None:
    assert parse_words(text, "--word_limit") == number


@pytest.mark.parametrize("text", ["", "0", "ten", "-1M", "1.0000001M", "1M2"])
def test_what_is_no_number_of_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"--word_limit is .*expected a number of words"):
        parse_words(text, "--word_limit")


def test_milestones_of_the_tracks() -> None:
    assert [len(TRACKS[name]) for name in ("strict_small", "strict")] == [19, 28]
    assert milestone_name(TRACKS["strict"][-1]) == "chck_1000M"
    assert parse_milestones("2M,500k,1M") == [500_000, 10**6, 2 * 10**6]
    assert parse_milestones("none") == []
    with pytest.raises(ValueError, match=r"--milestones is 'strickt'.*strict_small, strict"):
        parse_milestones("strickt")


def test_a_run_of_so_many_words(gpt2_dir: Path, texts: Path, tmp_path: Path, capsys) -> None:
    trainer = run(gpt2_dir, texts, tmp_path / "out", word_limit=250)
    # 11 samples of 5 + i words: 110 an epoch, of which 77 are answers'.
    assert "words of an epoch: 110" in capsys.readouterr().out
    last = lines(tmp_path / "out")[-1]
    assert last["event"] == "end"
    assert 250 <= last["words"] < 250 + 30
    assert last["step"] == trainer.state.global_step == trainer.state.max_steps
    assert last["samples"] - last["samples"] // 11 * 11 < 11


class KilledError(Exception):
    """Ends a run as a kill does: nothing more is written."""


def run_killed_at(step: int, monkeypatch: pytest.MonkeyPatch, *words, **changes) -> None:
    before = LlavaTrainer.training_step

    def train_step(self, *args, **named):
        if self.state.global_step == step:
            raise KilledError
        return before(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "training_step", train_step)
        with pytest.raises(KilledError):
            run(*words, **changes)


def test_a_killed_and_resumed_run_leaves_what_an_uninterrupted_one_does(
    gpt2_dir: Path, texts: Path, tmp_path: Path, monkeypatch
) -> None:
    """Over three epochs of six micro-batches, two of which make a step; milestones lie in steps before the kill."""
    changes = {"word_limit": 300, "milestones": "50,60,200,300", "gradient_accumulation_steps": 2}
    changes |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    trainer = run(gpt2_dir, texts, whole, **changes)
    run_killed_at(6, monkeypatch, gpt2_dir, texts, parted, **changes)
    assert (parted / "chck_200").is_dir()  # Behind the checkpoint of step 4.
    written = (parted / "chck_200" / "model.safetensors").stat().st_mtime_ns
    called: list[Milestone] = []
    resumed = build_trainer(argv(gpt2_dir, texts, parted, **changes, resume_from_checkpoint="auto"))
    resumed.word_budget.hooks.append(called.append)
    train(resumed)

    assert (parted / "exposure.jsonl").read_text() == (whole / "exposure.jsonl").read_text()
    milestones = [line["milestones"] for line in lines(whole) if line["event"] == "milestone"]
    assert milestones == [["chck_50", "chck_60"], ["chck_200"], ["chck_300"]]
    assert [(m.name, m.folder) for m in called] == [(f"chck_{n}", parted / f"chck_{n}") for n in (200, 300)]
    assert [m.step for m in called] == [line["step"] for line in lines(whole) if line["event"] == "milestone"][1:]
    assert (parted / "chck_200" / "model.safetensors").stat().st_mtime_ns == written
    for name in ("chck_50", "chck_60", "chck_200", "chck_300", "."):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (whole, parted))
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert find_changes(parted / name) is None if name != "." else True
    assert not (parted / "chck_300" / "optimizer.pt").exists()
    assert "model only" in str(find_damage(parted / "chck_300"))
    assert [path.name for path in list_checkpoints(parted)] == [f"checkpoint-{trainer.state.global_step}"]
    load_model(str(parted / "chck_60"))
    with pytest.raises(ValueError, match=r"holds a run \(.*chck_"):
        run(gpt2_dir, texts, parted, **changes)
    run(gpt2_dir, texts, parted, **changes, resume_from_checkpoint="auto")  # is finished
    assert (parted / "exposure.jsonl").read_text() == (whole / "exposure.jsonl").read_text()


def test_a_recount_says_whether_the_file_is_right(gpt2_dir: Path, texts: Path, tmp_path: Path, capsys) -> None:
    (texts.parent / "corpus.train").write_text("\n".join(["una riga " + "lunga " * (9 * i) for i in range(1, 8)]))
    argv_of = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2.5}
    argv_of |= {"model_max_length": 40, "train_sampling_strategy": "group_by_length"}
    for chunking in ("none", "document", "concatenate"):
        output = tmp_path / chunking
        words = argv(gpt2_dir, texts, output, **argv_of, text_chunking=chunking)
        words[words.index("--data_path") + 1 : words.index("--data_path") + 1] = [str(texts.parent / "corpus.train")]
        main(words)
        last = lines(output)[-1]
        assert set(last["sources"]) == {"corpus.train", "texts.json"}
        assert (last["cut_words"] > 0) == (chunking == "none")
        assert exposure.main([str(output)]) == 0
        assert "every number equals the recount" in capsys.readouterr().out
    assert last["sources"]["corpus.train"]["words"] >= 2 * (7 * 2 + 9 * 28)
    text = (output / "exposure.jsonl").read_text()
    (output / "exposure.jsonl").write_text(text.replace(f'"words": {last["words"]}', f'"words": {last["words"] + 1}'))
    assert exposure.main([str(output)]) == 1
    assert (
        f"step {last['step']}: words: written {last['words'] + 1}, recounted {last['words']}" in capsys.readouterr().out
    )
    texts.with_name("corpus.train").write_text("un altro testo")
    assert exposure.main([str(output)]) == 2
    assert "not the content that the run" in capsys.readouterr().err
    assert exposure.main([str(tmp_path)]) == 2


def test_milestones_that_a_resumed_run_does_not_write_are_named(tmp_path: Path, caplog) -> None:
    for name, step in (("chck_100", 5), ("chck_300", 15), ("chck_500", 25), ("chck_350", 18)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "exposure.json").write_text(json.dumps({"step": step}))
    budget = WordBudget(SimpleNamespace(count_words=lambda: 200), lambda milestone: None)  # type: ignore[arg-type]
    args: Any = SimpleNamespace(
        output_dir=str(tmp_path), milestone_numbers=[100, 150, 200, 300, 500], word_limit_number=400
    )
    assert not budget.begin(args, 10)
    gone, later = caplog.messages
    assert "chck_150, chck_200 will not be written: the run goes on behind 200 words" in gone
    assert ": chck_350, chck_500 is of a step behind 10" in later
    caplog.clear()
    assert not budget.begin(args)
    assert not caplog.messages
