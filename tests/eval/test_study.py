"""Studies: the file, resuming, what is noticed, and the table. Trainings and scores are made up here."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from llava.eval.choices import Choice
from llava.eval.likelihood import LikelihoodScorer
from llava.eval.study import __main__ as command
from llava.eval.study import cells, scoring
from llava.eval.study.plan import Study, read_study
from llava.eval.study.prepare import hash_data
from llava.eval.study.statistics import compare, paired_t_test, student_p
from llava.eval.study.table import draw_curve

SCORE_MODEL = scoring.score_model

PLAN: dict[str, object] = {
    "output_dir": "out",
    "values": {"rate": "0.01"},
    "seeds": [3, 5],
    "baseline": "a",
    "train": {"model_name_or_path": "gpt2", "data_path": "data.jsonl", "learning_rate": "{rate}", "plain_lm": True},
    "variants": {"a": None, "b": {"learning_rate": 0.02, "plain_lm": None}},
    "score": {"data": ["blimp"], "tasks": ["blimp"]},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files of a study and with trainings and scores that take no time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "blimp").mkdir()
    write_items("Il gatto dorme.")
    write_plan()
    monkeypatch.setattr(cells, "start_training", start)
    monkeypatch.setattr(scoring, "score_model", score)
    monkeypatch.setattr(command, "check_flags", lambda study, cells: [])
    return tmp_path


def write_items(*good: str) -> None:
    rows = [{"sentence_good": text, "sentence_bad": "b", "UID": "u", "field": "f"} for text in good]
    Path("blimp", "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_plan(**changes: object) -> None:
    Path("study.yaml").write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))


def start(words: Sequence[str], log: Path, study: Study, show: Callable[[str], None]) -> int:
    """A training that writes what one leaves behind."""
    run = Path(words[words.index("--output_dir") + 1])
    run.mkdir(parents=True)
    (run / "words").write_text(" ".join(words))
    (run / "exposure.jsonl").write_text('{"step": 1, "words": 10}\n{"step": 2, "words": 20, "answer_words": 15}\n')
    (run / "trainer_state.json").write_text('{"global_step": 2, "log_history": [{"train_loss": 1.5}]}')
    (run / "eval_results.json").write_text(json.dumps({"eval_loss": 2.0 + len(log.parts)}))
    return 0


def score(study: Study, plan: object, model: Path, show: Callable[[str], None]) -> dict[str, scoring.TaskScores]:
    """Variant b is right on more items."""
    right = 8 if "/b/" in model.as_posix() else 5
    outcomes = {"u": [1.0] * right + [0.0] * (10 - right), "v": [1.0] * 10}
    return {
        "blimp": {
            "official": (right + 10) / 20, "adjusted": (right + 10) / 20, "ties": 0.0, "num_items": 20,
            "groups": {}, "outcomes": outcomes, "weights": {"u": 0.5, "v": 0.5}, "items_hash": "1",
        }
    }  # fmt: skip


def test_a_study_trains_scores_and_compares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["study.yaml"]) == 0
    table = capsys.readouterr().out
    (line,) = [line for line in table.splitlines() if line.startswith("| b | 2 | 20 | 90.00 ± 0.00")]
    assert "+15.00" in line
    assert "2 of 2" in line
    results = json.loads(Path("out/results.json").read_text())
    (row,) = [row for row in results["rows"] if row["variant"] == "b"]
    assert row["comparison"]["by_seed"] == pytest.approx([0.15, 0.15])
    assert row["comparison"]["num_items"] == 20
    assert results["missing"] == []
    assert "difference_by_seed" in Path("out/table.csv").read_text().splitlines()[0]
    words = Path("out/b/seed-5/run/words").read_text()
    assert "--learning_rate 0.02 --seed 5 --output_dir out/b/seed-5/run --resume_from_checkpoint auto" in words
    assert "plain_lm" not in words
    assert "--learning_rate 0.01 --plain_lm true" in Path("out/a/seed-3/run/words").read_text()


def test_the_same_command_keeps_what_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["study.yaml", "--cell", "0"]) == 0
    begun: list[str] = []

    def start_once(words: Sequence[str], log: Path, study: Study, show: Callable[[str], None]) -> int:
        begun.append(str(log))
        return cells.STOPPED if len(begun) == 2 else start(words, log, study, show)

    monkeypatch.setattr(cells, "start_training", start_once)
    assert command.main(["study.yaml"]) == cells.STOPPED
    assert json.loads(Path("out/results.json").read_text())["missing"] == ["b, seed 3", "a, seed 5", "b, seed 5"]
    assert command.main(["study.yaml"]) == 0
    assert [Path(log).parts[1:3] for log in begun] == [
        ("b", "seed-3"), ("a", "seed-5"), ("a", "seed-5"), ("b", "seed-5")
    ]  # fmt: skip
    assert json.loads(Path("out/a/seed-5/trained.json").read_text())["attempts"] == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"variants": {"a": None, "b": {"learning_rate": 0.03}}}, "b, seed 3 .*flags.learning_rate was '0.02' and is"),
        ({"values": {"rate": "0.5"}}, "a, seed 3 was trained as something else: values.rate was '0.01' and is '0.5'"),
        ({"train": {**PLAN["train"], "weight_decay": 1}}, "flags.weight_decay was not given and is '1'"),  # type: ignore[dict-item]
    ],
)
def test_a_changed_variant_is_an_error(
    folder: Path, change: dict[str, object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert command.main(["study.yaml"]) == 0
    write_plan(**change)
    assert command.main(["study.yaml"]) == 2
    assert re.search(expected, capsys.readouterr().err)


def test_changed_data_and_changed_scoring(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["study.yaml"]) == 0
    write_plan(score={"data": ["blimp"], "fast": True})  # Scored anew, not trained.
    assert command.main(["study.yaml", "--table"]) == 2
    assert "no cell is done" in capsys.readouterr().err
    assert command.main(["study.yaml"]) == 0
    Path("data.jsonl").write_text("{} ")
    assert command.main(["study.yaml"]) == 2
    assert "files.data.jsonl was" in capsys.readouterr().err
    Path("data.jsonl").write_text("{}")
    write_plan(train={**PLAN["train"], "logging_steps": 7})  # type: ignore[dict-item]
    assert command.main(["study.yaml"]) == 0, "what is logged may change"


@pytest.mark.parametrize(
    ("plan", "items", "said"),
    [
        ({"data": ["blimp"], "tasks": ["blmip"]}, ("a",), "study.yaml: score: --tasks 'blmip': known are blimp"),
        ({"data": ["blimp"]}, ("a", ""), "study.yaml: score: blimp/a.jsonl, line 2: 'sentence_good' is ''"),
    ],
)
def test_what_is_scored_is_read_before_anything_is_trained(
    folder: Path, plan: dict[str, object], items: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(score=plan)
    write_items(*items)
    assert command.main(["study.yaml"]) == 2
    assert said in capsys.readouterr().err
    assert not list(Path("out").rglob("train.log"))


def test_tasks_with_pictures_are_scored_with_others_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blind:
        def score(self, choices: Sequence[Choice], on_scored: Callable[[int], None]) -> list[tuple[float, ...]]:
            return [(0.0, -1.0)] * len(choices)

    Path("blimp").rename("vqa")
    Path("vqa/images").mkdir()
    rows = [{"question": "q", "target_ans": "a", "distractors": ["b"], "idx_in_hf_dataset": n} for n in range(3)]
    Path("vqa/a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in range(3):
        Path(f"vqa/images/{n}.png").write_bytes(b"x")
    monkeypatch.setattr(scoring, "score_model", SCORE_MODEL)
    monkeypatch.setattr(LikelihoodScorer, "from_folder", lambda path: Blind())
    write_plan(score={"data": ["vqa"]})
    assert command.main(["study.yaml"]) == 0
    assert "Blind check of b, seed 5, vqa: 100.0 with its own pictures or clips, 100.0" in capsys.readouterr().out


def test_other_items_under_the_same_path_are_scored_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["study.yaml"]) == 0
    write_items("Il cane dorme.")
    assert command.main(["study.yaml", "--table"]) == 2
    assert "no cell is done" in capsys.readouterr().err
    Path("blimp").rename("elsewhere")
    assert command.main(["study.yaml", "--table"]) == 0, "data that are there no more tell nothing"


def test_a_training_that_fails_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: Sequence[str], log: Path, study: Study, show: Callable[[str], None]) -> int:
        log.write_text("step 1\nerror: --learning_rate is bad\nbye\n")
        return 2

    monkeypatch.setattr(cells, "start_training", fail)
    assert command.main(["study.yaml"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: study.yaml: a, seed 3: its training ended with status 2: error: --learning_rate")
    monkeypatch.setattr(cells, "start_training", lambda *given: -signal.SIGTERM)
    assert command.main(["study.yaml"]) == cells.STOPPED, "a signal before the training listens"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"varients": {}}, "unknown key 'varients'; did you mean 'variants'?"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]; expected at least one, and each once"),
        ({"seeds": [True]}, "seeds has True"),
        ({"baseline": "c"}, "baseline is 'c', which is no variant; known: a, b"),
        ({"variants": {"a": {}, "b": {}}}, "variants a and b are the same"),
        ({"variants": {"a": {}, "A": {"learning_rate": 1}}}, "differs from 'a' in case alone"),
        ({"variants": {"..": {}}}, "the name becomes a folder"),
        ({"variants": {"a": {"seed": 1}}}, "seed is given by the study itself; list them under 'seeds'"),
        ({"variants": {"a": {"data_path": "{shard}"}}}, "{shard} in '{shard}' is no value of this study"),
        ({"variants": {"a": {"model": {"config": "x"}}}}, "has both 'model' and 'model_name_or_path'"),
        ({"score": {"data": ["blimp"], "task": ["blimp"]}}, "score: unknown key 'task'; did you mean 'tasks'?"),
        ({"score": {"data": ["nowhere"]}}, "score: data: nowhere: no such file or folder"),
        ({"train": {"model_name_or_path": "m", "data_path": "no.jsonl"}}, "data_path: no.jsonl: no such file or"),
        ({"prepare": [{"run": "true"}]}, "prepare, step 1: expected 'run', a command, and 'makes'"),
        ({"processes": 0}, "processes is 0; expected a whole number from 1"),
    ],
)
def test_mistakes_in_the_file_are_one_line(
    folder: Path, change: dict[str, object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(**change)
    assert command.main(["study.yaml", "--dry_run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: study.yaml")
    assert expected in line


def test_flags_are_checked_by_the_parser_of_training_and_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm_python: str
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.executable", warm_python)
    write_plan(variants={"a": None, "b": {"leraning_rate": 1}})
    assert command.main(["study.yaml", "--dry_run"]) == 2
    assert (
        "study.yaml: variant b: unknown flag --leraning_rate; did you mean --learning_rate" in capsys.readouterr().err
    )
    assert not Path("out").exists(), "a dry run leaves nothing"


def test_a_file_laid_over_another(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    below = {**PLAN, "train": {**PLAN["train"], "image_folder": "{here}/x"}, "plugins": ["p"]}  # type: ignore[dict-item]
    (tmp_path / "below" / "study.yaml").write_text(yaml.safe_dump(below, sort_keys=False))
    path = tmp_path / "over.yaml"
    path.write_text("base: below/study.yaml\nvalues: {rate: 0.3}\ntrain: {video_folder: '{here}/y'}\nseeds: [7]\n")
    study = read_study(path)
    words = " ".join(study.train_words(study.cells[0]))
    assert f"--learning_rate 0.3 --plain_lm true --image_folder {tmp_path}/below/x --video_folder {tmp_path}/y" in words
    assert study.folders == (tmp_path, tmp_path / "below")
    assert [cell.seed for cell in study.cells] == [7, 7]
    path.write_text("base: over.yaml\n")
    with pytest.raises(ValueError, match="expected another study's file"):
        read_study(path)


def test_duplicate_names_and_wrong_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--set", "rat=1"], ["--cell", "4"], ["--variants", "c"], ["--seeds", "4"]):
        assert command.main(["study.yaml", "--list", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words[0] in line
    Path("study.yaml").write_text("variants:\n  a: {}\n  a: {}\n")
    assert command.main(["study.yaml"]) == 2
    assert "'a'" in capsys.readouterr().err
    assert command.main(["nothing.yaml"]) == 2
    assert "nothing.yaml: no such file" in capsys.readouterr().err


def test_steps_run_once_and_a_changed_one_is_noticed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(word: str) -> None:
        made = {"run": ["sh", "-c", f"echo {word} >> {{output_dir}}/made"], "makes": "{output_dir}/made"}
        write_plan(prepare=[made])

    plan("one")
    for _ in range(2):
        assert command.main(["study.yaml", "--prepare"]) == 0
    assert Path("out/made").read_text() == "one\n"
    plan("two")
    assert command.main(["study.yaml", "--prepare"]) == 2
    assert "step 1 has changed" in capsys.readouterr().err
    for record in Path("out/prepared").glob("*.json"):  # As a step leaves it that was killed.
        record.unlink()
    assert command.main(["study.yaml", "--prepare"]) == 0
    assert Path("out/made").read_text() == "two\n"


def test_list_and_slurm_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["study.yaml", "--cell", "1"])
    capsys.readouterr()
    assert command.main(["study.yaml", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["  0  a  seed 3  new", "  1  b  seed 3  scored"]
    write_plan(slurm={"gres": "gpu:1"})
    assert command.main(["study.yaml", "--set", "rate=0.01", "--seeds", "5", "--sbatch"]) == 0
    script = Path("out/study.sbatch").read_text()
    assert "#SBATCH --array=2,3\n" in script
    assert "#SBATCH --gres=gpu:1\n" in script
    assert 'study.yaml --set rate=0.01 --cell "$SLURM_ARRAY_TASK_ID"' in script
    write_plan(slurm={"nodes": 2})
    assert command.main(["study.yaml", "--sbatch"]) == 2
    assert "slurm: nodes is 2, but a cell is trained on one node" in capsys.readouterr().err


def test_random_weights_are_shared_by_variants_not_by_seeds(tmp_path: Path) -> None:
    train = {"data_path": "d"}
    small = {"b": {"model": {"config": "small"}}, "c": {"learning_rate": 1}, "a": {}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**PLAN, "train": train, "variants": small, "model": {"config": "m"}}))
    study = read_study(path)
    folders = {(cell.variant, cell.seed): study.model_folder(cell) for cell in study.cells}
    assert folders["a", 3] == folders["c", 3] != folders["a", 5]
    assert folders["b", 3] not in (folders["a", 3], folders["a", 5])


# Statistics.


def test_student_p_is_that_of_the_tables() -> None:
    for t, freedom in ((12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.228, 10), (2.201, 11)):
        assert student_p(t, freedom) == pytest.approx(0.05, abs=2e-4)
    assert paired_t_test([0.1]) is None
    assert paired_t_test([0.0, 0.0]) is None
    assert paired_t_test([0.5, 0.5]) is None


def test_the_interval_has_the_spread_of_seeds_and_of_items() -> None:
    rng = np.random.default_rng(0)
    zeros = [{"u": np.zeros(4000), "v": np.zeros(4000)} for _ in range(4)]
    effects = [0.10, 0.14, 0.18, 0.22]  # Standard deviation over seeds 0.0516, of the mean 0.0258.
    ones = [{name: (rng.random(4000) < effect).astype(float) for name in "uv"} for effect in effects]
    found = compare(ones, zeros, replicates=4000)
    assert found.difference == pytest.approx(0.16, abs=0.01)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.0258, rel=0.2)
    assert found.p_value < 0.01
    few = [{"u": values["u"][:40]} for values in ones], [{"u": values["u"][:40]} for values in zeros]
    small = compare(*few)
    assert small.high - small.low > 1.2 * (found.high - found.low), "few items count too"
    alone = compare(few[0][:1], few[1][:1])
    assert math.isclose(alone.difference, few[0][0]["u"].mean())
    assert alone.p_seeds is None
    same = compare(few[0], few[0])
    assert (same.difference, same.p_value) == (0, 1)


def test_other_items_are_no_pair() -> None:
    with pytest.raises(ValueError, match="not scored on the same items"):
        compare([{"u": np.zeros(3)}], [{"u": np.zeros(4)}])


def test_outcomes_share_a_tie() -> None:
    items, scores = [("u", 0), ("u", 0), ("u", 1), ("v", 2)], [(1, 0), (1, 1), (1, 0), (2, 2, 2)]
    found = scoring.group_outcomes(items, scores)
    assert found["u"] == [1, 0.5, 0]
    assert found["v"] == pytest.approx([1 / 3])


def test_data_behind_a_pattern_and_a_mixture_are_hashed(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}')
    (tmp_path / "mix.yaml").write_text("datasets:\n  - json_path: a.jsonl\n  - json_path: b.jsonl\n")
    words = [tmp_path / "*.jsonl", tmp_path / "{a,b}.jsonl", tmp_path / "mix.yaml"]
    before = [hash_data(word) for word in words]
    assert all(before)
    (tmp_path / "b.jsonl").write_text('{"text": "y"}')
    assert all(old != hash_data(word) for old, word in zip(before, words, strict=True))
    assert hash_data(tmp_path / "none.jsonl") == hash_data(Path("hub:owner/name")) == ""


def test_milestones_have_the_words_that_they_were_trained_on(tmp_path: Path) -> None:
    for name, sources in (("chck_1M", None), ("chck_20k", {"a.txt": {"words": 21_000}, "b.txt": {"words": 427}})):
        (tmp_path / name).mkdir()
        if sources:
            (tmp_path / name / "exposure.json").write_text(json.dumps({"step": 28, "sources": sources}))
    found = [(number, path.name) for number, path in scoring.find_milestones(tmp_path)]
    assert found == [(21_427, "chck_20k"), (1_000_000, "chck_1M")]


def test_the_curve_has_a_panel_for_each_task_with_milestones():
    row = {"task": "blimp", "variant": "a", "words": 10.0, "score": 0.5, "spread": 0.01, "items": 9}
    one = [row, {**row, "words": 20.0, "spread": None}]
    two = [*one, *({**line, "task": "ewok"} for line in one), {**row, "task": "comps"}]
    assert draw_curve([row], "s") is None
    chart, taller = draw_curve(one, "s"), draw_curve(two, "s")
    assert chart is not None
    assert taller is not None
    assert chart.height < taller.height < 2 * chart.height + 1


def test_the_curve_says_where_milestones_were_scored_on_fewer_items(monkeypatch):
    row = {"task": "blimp", "variant": "a", "words": 10.0, "score": 0.5, "spread": None, "items": 9}
    said = []
    monkeypatch.setattr("llava.eval.study.table.draw_chart", lambda *args, **kwargs: said.append(args[3]))
    monkeypatch.setattr("llava.eval.study.table.stack", lambda *args, **kwargs: None)
    for items in (9, 1234):
        draw_curve([row, {**row, "words": 20.0, "items": items}], "s")
    assert said == ["blimp, percent", "blimp, percent of 9 items; in the end 1,234"]
