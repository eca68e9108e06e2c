"""`python -m llava.eval.babylm`: official files, going on, tables, comparisons, the check of sizes, the blind check."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llava.eval.babylm.__main__ import main, parse_arguments, score_models
from llava.eval.babylm.compare import compare_folders, mcnemar
from llava.eval.babylm.official import check_results
from llava.eval.babylm.tasks import read_sizes
from llava.eval.blind import check_blindness, swap
from llava.eval.choices import Choice


class FakeScorer:
    """Scores by a hash of the text, or as it is told, and remembers what it was asked."""

    def __init__(self, score: Callable[[Choice, str], float] | None = None, fail_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._score = score or (lambda choice, text: -float(zlib.crc32(text.encode()) % 1000))
        self._fail_after = fail_after

    def score(
        self, choices: Sequence[Choice], on_scored: Callable[[int], None] | None = None
    ) -> list[tuple[float, ...]]:
        if self._fail_after is not None and len(self.asked) >= self._fail_after:
            raise KeyboardInterrupt
        self.asked += [choice.id for choice in choices]
        if on_scored is not None:
            on_scored(len(choices))
        return [tuple(self._score(choice, one.text) for one in choice.candidates) for choice in choices]


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two paradigms of BLiMP, wugs, and questions about four pictures."""
    root = tmp_path / "data"
    for uid in ("wh_island", "causative"):
        rows = [
            {"sentence_good": f"{uid} {n} è.", "sentence_bad": f"{uid} {n} b.", "UID": uid, "field": "syntax"}
            for n in range(6)
        ]
        write_rows(root / "blimp_filtered" / f"{uid}.jsonl", rows)
    write_rows(root / "wug_past_tense" / "w.jsonl", [{"sentences": f"a{n}\tb{n}", "ratio": n / 6} for n in range(6)])
    questions = [
        {"question": "What?", "target_ans": f"t{n}", "distractors": ["x", "y"], "idx_in_hf_dataset": n}
        for n in range(4)
    ]
    write_rows(root / "vqa_filtered" / "v.jsonl", questions)
    (root / "vqa_filtered" / "images").mkdir()
    for n in range(4):
        (root / "vqa_filtered" / "images" / f"{n}.png").write_bytes(b"x")
    return root


def score(data: Path, out: Path, scorer: FakeScorer, *flags: str, model: str = "some/model.v1"):
    words = ["--model_path", model, "--data", str(data), "--out", str(out), *flags]
    return score_models(parse_arguments(words), lambda model, revision: scorer)


def test_official_files(data: Path, tmp_path: Path) -> None:
    score(data, tmp_path, FakeScorer(lambda choice, text: float(" b." not in text)), "--tasks", "blimp", "wug_past")
    root = tmp_path / "model" / "main" / "zero_shot" / "causal"
    text = (root / "blimp" / "blimp_filtered" / "predictions.json").read_text()
    # Byte for byte what json.dump gives, as the official pipeline writes it.
    assert text.startswith(
        '{"causative": {"predictions": [{"id": "causative_0", "pred": "causative 0 \\u00e8."}, {"id"'
    )
    assert [len(group["predictions"]) for group in json.loads(text).values()] == [6, 6]
    report = (root / "blimp" / "blimp_filtered" / "best_temperature_report.txt").read_text()
    assert report == (
        "TEMPERATURE: 1.00\n\n### UID ACCURACY\ncausative: 100.00\nwh_island: 100.00\n\n"
        "### FIELD ACCURACY\nsyntax: 100.00\n\n### AVERAGE ACCURACY\n100.00\n\n"
    )
    wug = json.loads((root / "wug_past" / "wug_past_tense" / "predictions.json").read_text())
    assert wug["wug_past"]["predictions"][1] == {"id": "wug_past_1", "pred": "a1", "prob": 0.5}


def test_an_interrupted_run_goes_on(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llava.eval.babylm.model_scores._AT_ONCE", 5)
    whole = FakeScorer()
    score(data, tmp_path / "whole", whole, "--tasks", "blimp")
    first, second = FakeScorer(fail_after=5), FakeScorer()
    with pytest.raises(KeyboardInterrupt):
        score(data, tmp_path / "broken", first, "--tasks", "blimp")
    assert not list((tmp_path / "broken").rglob("predictions.json"))
    path = next((tmp_path / "broken").rglob("item_scores.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"id": "wh_isl')
    score(data, tmp_path / "broken", second, "--tasks", "blimp")
    assert first.asked + second.asked == whole.asked
    assert path.read_bytes() == next((tmp_path / "whole").rglob("item_scores.jsonl")).read_bytes()
    assert score(data, tmp_path / "broken", second, "--tasks", "blimp")[0].results["blimp"].num_items == 12
    assert len(second.asked) == 7


def test_scores_of_other_settings_are_not_gone_on_with(data: Path, tmp_path: Path) -> None:
    score(data, tmp_path, FakeScorer(), "--tasks", "blimp")
    with pytest.raises(ValueError, match=r"item_scores.jsonl: was made with another dtype; .*--overwrite"):
        score(data, tmp_path, FakeScorer(), "--tasks", "blimp", "--dtype", "bfloat16")
    again = FakeScorer()
    score(data, tmp_path, again, "--tasks", "blimp", "--dtype", "bfloat16", "--overwrite")
    assert len(again.asked) == 12


def test_other_groups_of_the_same_pairs_are_scored_anew(tmp_path: Path) -> None:
    table = tmp_path / "p.tsv"
    table.write_text("good\tbad\tx\ty\n" + "".join(f"g{n}\tb{n}\tk\t{'ak'[n % 2]}\n" for n in range(4)))
    words = ["--model_path", "m", "--pairs", str(table), "--out", str(tmp_path / "out"), "--group_columns"]
    score_models(parse_arguments([*words, "x"]), lambda model, revision: FakeScorer())
    with pytest.raises(ValueError, match="was made with another items"):
        score_models(parse_arguments([*words, "y"]), lambda model, revision: FakeScorer())


def test_a_picture_that_was_replaced_is_scored_anew(data: Path, tmp_path: Path) -> None:
    score(data, tmp_path, FakeScorer(), "--tasks", "vqa", "--no_blind_check")
    (data / "vqa_filtered" / "images" / "2.png").write_bytes(b"another")
    again = FakeScorer(lambda choice, text: float("t2" in text))
    for _ in range(2):
        score(data, tmp_path, again, "--tasks", "vqa", "--no_blind_check")
    assert again.asked == ["vqa_2"]
    assert [
        row["scores"]
        for row in map(json.loads, next(tmp_path.rglob("item_scores.jsonl")).open())
        if row.get("id") == "vqa_2"
    ][1:] == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("changed", ["merges.txt", "../tower/model.safetensors"])
def test_a_changed_vocabulary_or_tower_makes_another_model(data: Path, tmp_path: Path, changed: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "tower").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"mm_vision_tower": str(tmp_path / "tower")}))
    words = (data, tmp_path / "out", FakeScorer(), "--tasks", "blimp")
    score(*words, model=str(tmp_path / "m"))
    (tmp_path / "m" / changed).write_text("a")
    with pytest.raises(ValueError, match="was made with another model_files"):
        score(*words, model=str(tmp_path / "m"))


def test_two_processes_do_not_write_into_one_file(data: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def start_another(choice: Choice, text: str) -> float:
        with pytest.raises(ValueError, match="another process writes its scores there"):
            score(data, tmp_path, FakeScorer(), "--tasks", "blimp", "--dtype", "bfloat16", "--overwrite")
        told.append(text)
        return 0.0

    score(data, tmp_path, FakeScorer(start_another), "--tasks", "blimp")
    assert len(told) == 24


def test_tables(data: Path, tmp_path: Path) -> None:
    (results,) = score(data, tmp_path, FakeScorer(), "--tasks", "blimp", "wug_past")
    folder = tmp_path / "model" / "main"
    rows = list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))
    assert [(row["task"], row["kind"], row["group"]) for row in rows] == [
        ("blimp", "all", "all"), ("blimp", "UID", "causative"), ("blimp", "UID", "wh_island"),
        ("blimp", "field", "syntax"), ("wug_past", "all", "all"), ("wug_past", "UID", "wug_past"),
    ]  # fmt: skip
    content = json.loads((folder / "scores.json").read_text())
    assert content["tasks"]["blimp"]["official"] == results.results["blimp"].official
    assert {"llava", "torch", "transformers", "python"} == set(content["versions"])
    assert "| blimp | 12 | 0 |" in (folder / "scores.md").read_text().replace("| model.v1 | blimp", "| blimp")


def test_tasks_that_were_scored_before_stay_in_the_tables(data: Path, tmp_path: Path) -> None:
    def tasks(model: str = "some/model.v1", *flags: str) -> list[str]:
        score(data, tmp_path, FakeScorer(), *flags, model=model)
        return sorted(json.loads((tmp_path / "model" / "main" / "scores.json").read_text())["tasks"])

    assert tasks("some/model.v1", "--tasks", "blimp") == ["blimp"]
    assert tasks("some/model.v1", "--tasks", "wug_past") == ["blimp", "wug_past"]
    assert "| blimp |" in (tmp_path / "model" / "main" / "scores.md").read_text()
    # Of another model in its place nothing is kept.
    assert tasks("other/model.v1", "--tasks", "wug_past", "--overwrite") == ["wug_past"]


def test_a_model_that_looks_is_not_blind_and_one_that_does_not_is(data: Path, tmp_path: Path, capsys) -> None:
    def looks(choice: Choice, text: str) -> float:
        return float(text == f"What? t{Path(choice.media[0].path).stem}")

    (seeing,) = score(data, tmp_path / "a", FakeScorer(looks), "--tasks", "vqa")
    check = seeing.blind["vqa"]
    assert (check.score, check.other_score, check.is_blind) == (100.0, pytest.approx(100 / 3), False)
    assert "warning" not in capsys.readouterr().err
    (blind,) = score(data, tmp_path / "b", FakeScorer(), "--tasks", "vqa")
    assert (blind.blind["vqa"].drop, blind.blind["vqa"].is_blind) == (0.0, True)
    assert "warning: vqa: " in capsys.readouterr().err
    assert "BLIND" in (tmp_path / "b" / "model" / "main" / "scores.md").read_text()
    (unchecked,) = score(data, tmp_path / "c", FakeScorer(), "--tasks", "vqa", "--no_blind_check")
    assert unchecked.blind == {}


@pytest.mark.parametrize("shown", ["abcd", "aabbc", "aabbccdd", "aaabbb", "ab", "aaab"])
def test_nobody_keeps_what_is_shown(shown: str) -> None:
    for seed in range(20):
        swapped = swap(list(shown), str, seed)
        assert swapped is not None
        assert (sorted(swapped) == sorted(shown)) == (shown != "aaab")
        assert all(one != other for one, other in zip(shown, swapped, strict=True))


@pytest.mark.parametrize("shown", ["", "a", "aaa"])
def test_there_may_be_no_other_picture(shown: str) -> None:
    assert swap(list(shown), str, 0) is None


def test_a_score_that_rises_is_blind_too() -> None:
    assert check_blindness(np.array([0.0, 100.0, 0.0]), np.array([100.0, 100.0, 100.0])).is_blind


def test_comparisons(data: Path, tmp_path: Path, capsys) -> None:
    score(data, tmp_path, FakeScorer(lambda choice, text: float(" b." not in text)), "--tasks", "blimp", model="good")
    score(data, tmp_path, FakeScorer(lambda choice, text: float(" b." in text)), "--tasks", "blimp", model="bad")
    (found,) = compare_folders(tmp_path / "bad" / "main", tmp_path / "good" / "main")
    assert (found.first, found.second, found.difference, found.low) == (0.0, 100.0, 100.0, 100.0)
    assert (found.only_first, found.only_second, found.num_items) == (0, 12, 12)
    assert found.p_value == pytest.approx(2 / 2**12)
    assert main(["--compare", str(tmp_path / "bad" / "main"), str(tmp_path / "good" / "main")]) == 0
    assert "| blimp/blimp_filtered | 0.00 | 100.00 | +100.00 [+100.00, +100.00] | 0 / 12 |" in capsys.readouterr().out
    (data / "blimp_filtered" / "causative.jsonl").unlink()
    score(data, tmp_path, FakeScorer(), "--tasks", "blimp", model="other")
    score(data, tmp_path, FakeScorer(), "--tasks", "wug_past", model="bad")
    assert main(["--compare", str(tmp_path / "good" / "main"), str(tmp_path / "bad" / "main")]) == 0
    assert f"not compared, only in {tmp_path / 'bad' / 'main'}: wug_past/wug_past_tense" in capsys.readouterr().err
    with pytest.raises(ValueError, match="were scored on other items"):
        compare_folders(tmp_path / "bad" / "main", tmp_path / "other" / "main")


def test_correlations_are_compared_as_correlations(data: Path, tmp_path: Path, capsys) -> None:
    def agrees(sign: float) -> FakeScorer:
        return FakeScorer(lambda choice, text: sign * int(text[1:]) if text[0] == "a" else 0.0)

    for model, scorer in (
        ("for", agrees(1.0)), ("against", agrees(-1.0)), ("constant", FakeScorer(lambda choice, text: 0.0))
    ):  # fmt: skip
        score(data, tmp_path, scorer, "--tasks", "wug_past", model=model)
    (found,) = compare_folders(tmp_path / "against" / "main", tmp_path / "for" / "main")
    assert (found.first, found.second, found.difference) == pytest.approx((-100, 100, 200))
    assert (found.low, found.high) == pytest.approx((200, 200))
    assert (found.only_first, found.only_second, found.p_value) == (None, None, None)
    assert main(["--compare", str(tmp_path / "constant" / "main"), str(tmp_path / "for" / "main")]) == 0
    assert "| wug_past/wug_past_tense | none | 100.00 |  |  |  | 6 |" in capsys.readouterr().out
    path = next((tmp_path / "constant").rglob("best_temperature_report.txt"))
    assert path.read_text() == (
        "TEMPERATURE: 1.00\n\n### UID SPEARMAN'S RHO\navg: nan\n\n### AVERAGE SPEARMAN'S RHO\nnan\n\n"
    )
    assert "NaN" not in next((tmp_path / "constant").rglob("scores.json")).read_text()
    write_rows(data / "wug_past_tense" / "w.jsonl", [{"sentences": f"a{n}\tb{n}", "ratio": n / 7} for n in range(6)])
    with pytest.raises(ValueError, match="was made with another items"):  # Comparisons take people's shares from there.
        score(data, tmp_path, agrees(1.0), "--tasks", "wug_past", model="for")


def test_mcnemar() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert 0 < mcnemar(20_000, 21_000) < 1e-5


def test_results_are_held_against_the_official_sizes(tmp_path: Path, capsys) -> None:
    sizes = read_sizes()["full"]["supplement"]
    data = tmp_path / "data" / "supplement_filtered"
    for uid, size in sizes.items():
        rows = [{"sentence_good": f"{n} a", "sentence_bad": f"{n} b"} for n in range(size - (uid == "hypernym"))]
        write_rows(data / f"{uid}.jsonl", rows)
    score(tmp_path / "data", tmp_path, FakeScorer())
    folder = tmp_path / "model" / "main"
    assert check_results(folder, False, ["supplement"]) == [
        "supplement: hypernym has 841 items; the collation expects 842"
    ]
    lines = check_results(folder, False)
    assert any(line.startswith("blimp: ") and line.endswith("where the collation looks, is missing") for line in lines)
    assert main(["--check", str(folder), "--tasks", "supplement"]) == 1
    # Of a fast run, or of a zip of another name.
    write_rows(folder / "zero_shot" / "causal" / "blimp" / "blimp_en_drawn" / "predictions.json", [{}])
    (line,) = check_results(folder, False, ["blimp"])
    assert line.endswith("there is blimp_en_drawn, which it does not take for that")
    write_rows(data / "hypernym.jsonl", [{"sentence_good": f"{n} a", "sentence_bad": f"{n} b"} for n in range(842)])
    score(tmp_path / "data", tmp_path, FakeScorer(), "--overwrite")
    assert main(["--check", str(folder), "--tasks", "supplement"]) == 0
    assert main(["--check", str(folder), "--tasks", "blmip"]) == 2
    assert "and not of blmip" in capsys.readouterr().err
    assert main(["--check", str(folder), "--tasks", "supplement"]) == 0
    assert "complete" in capsys.readouterr().out


def test_the_check_knows_groups_whatever_their_case(tmp_path: Path) -> None:
    # The collation's sizes are in lower case; the data and so the predictions are not.
    groups = {uid.replace("_np_", "_NP_").replace("principle_a_", "principle_A_"): size for uid, size in
              read_sizes()["full"]["blimp"].items()}  # fmt: skip
    assert "complex_NP_island" in groups
    path = tmp_path / "zero_shot" / "causal" / "blimp" / "blimp_filtered" / "predictions.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({uid: {"predictions": [{}] * size} for uid, size in groups.items()}))
    assert check_results(tmp_path, False, ["blimp"]) == []


def test_a_drawn_part_is_not_taken_for_the_official_fast_data(data: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "own.jsonl", [{"good": f"{n} a", "bad": f"{n} b"} for n in range(3)])
    flags = ("--tasks", "blimp", "wug_past", "--fast", "--pairs", str(tmp_path / "own.jsonl"))
    score(data, tmp_path, FakeScorer(), *flags)
    root = tmp_path / "model" / "main" / "zero_shot" / "causal"
    assert sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("predictions.json")) == [
        "blimp/blimp_filtered_drawn", "pairs/own_drawn", "wug_past/wug_past_tense"
    ]  # fmt: skip
    assert any(line.startswith("blimp: ") and "is missing" in line for line in check_results(root.parents[1], True))


def test_rows_that_repeat_are_said(data: Path, tmp_path: Path, capsys) -> None:
    path = data / "blimp_filtered" / "causative.jsonl"
    first, *others = path.read_text().splitlines()
    same = json.dumps(json.loads(first) | {"sentence_bad": json.loads(first)["sentence_good"]})
    path.write_text("\n".join([first, *others, first, same]))
    score(data, tmp_path, FakeScorer(), "--tasks", "blimp")
    said = capsys.readouterr().err
    assert (
        f"warning: blimp: 1 rows say what an earlier one says, and count again: {path}, line 7 (as {path}, line 1)"
        in said
    )
    assert f"warning: blimp: 1 rows have the same candidate twice, which always ties: {path}, line 8" in said


def test_mistakes_are_one_line(data: Path, tmp_path: Path, capsys) -> None:
    for words, said in (
        ([], "--model_path is missing"),
        (["--model_path", "m"], "--data is missing"),
        (["--model_path", "m", "--data", str(tmp_path / "none")], "there is no such file or folder"),
        (["--model_path", "m", "--data", str(data), "--tasks", "blimq"], "--tasks 'blimq': known are blimp"),
        (["--model_path", "a/m", "b/m", "--data", str(data)], "results of two models would go to"),
        (["--check", str(data)], "has no zero_shot/causal"),
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert said in error[-1]
    assert not (tmp_path / "out").exists()


def test_a_task_that_is_missing_is_said(data: Path, tmp_path: Path, capsys) -> None:
    score(data, tmp_path, FakeScorer(), "--tasks", "blimp", "ewok")
    assert "missing: ewok: " in capsys.readouterr().err
