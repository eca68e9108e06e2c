"""`python -m llava.demo.grounding --quick` from data to figures, and what its parts make of answers."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import pytest
from PIL import Image

from llava.demo.common import choose_examples
from llava.demo.grounding.__main__ import main, write_base_model
from llava.demo.grounding.evaluation import best_fixed_answer, case_lines, score_answer, score_lines, summarise
from llava.geometry import Box, TimeSpan
from llava.serve.generate import Answer
from llava.types import Coordinates, Media, Record, Turn


def make_record(coordinates: Coordinates) -> Record:
    turns = (Turn("user", "dov'è la luna rosa? <image>"), Turn("assistant", ""))
    return Record("a", turns, (Media("image", "a.png"),), coordinates=coordinates)


BOX_RECORD = make_record(
    Coordinates(spatial_width_output_locations=(0.2, 0.6), spatial_height_output_locations=(0.0, 0.5))
)
SPAN_RECORD = make_record(Coordinates(temporal_output_locations=(0.25, 0.75)))


def test_quick_demo_runs_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--compare_placeholder", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "--grounding lape, on 6 held-out pictures and 6 held-out clips" in printed
    assert "elapsed:" in printed
    results = json.loads((tmp_path / "grounding.json").read_text(encoding="utf-8"))
    assert set(results["scores"]) == {"lape", "placeholder"}
    for kind in ("pictures", "clips"):
        assert results["scores"]["placeholder"][kind]["mIoU"]["value"] == 0
        assert results["scores"]["placeholder"][kind]["unparsable"]["value"] == 1
    assert len(results["cases"]["lape"]) == 12
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 12
    with Image.open(tmp_path / "pictures" / "clips_0.png") as picture:
        assert picture.width > 500


def test_brackets_of_answers_are_one_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_base_model(tmp_path, ["dov'è la luna rosa?"], 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert [len(tokenizer.tokenize(bracket)) for bracket in "[]{}"] == [1, 1, 1, 1]


def test_no_sample_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num_train_clips", "0"]) == 2
    assert "--num_train_clips" in capsys.readouterr().err


def test_the_first_box_of_an_answer_is_scored() -> None:
    case = score_answer(BOX_RECORD, Answer("", [Box(0.2, 0.0, 0.6, 0.25), Box(0.2, 0.0, 0.6, 0.5)]))
    assert case.reference == Box(0.2, 0.0, 0.6, 0.5)
    assert case.question == "dov'è la luna rosa? <image>"
    assert case.scores["mIoU"] == pytest.approx(0.5)


def test_an_answer_of_the_other_kind_tells_nothing() -> None:
    case = score_answer(SPAN_RECORD, Answer("", [Box(0.2, 0.0, 0.6, 0.25)]))
    assert case.found is None
    assert case.scores["unparsable"] == 1
    assert "said nothing" in case_lines([case])


def test_the_best_fixed_answer_is_one_of_the_references() -> None:
    spans = [TimeSpan(0.0, 0.5), TimeSpan(0.0, 1.0), TimeSpan(0.5, 1.0)]
    assert best_fixed_answer(spans) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_figures_are_means_of_cases() -> None:
    right, wrong = (score_answer(SPAN_RECORD, Answer("", [], [TimeSpan(*s)])) for s in ((0.25, 0.75), (0.0, 0.25)))
    box = score_answer(BOX_RECORD, Answer("", [Box(0.2, 0.0, 0.6, 0.5)]))
    assert summarise([right, wrong])["mIoU"]["value"] == 0.5
    lines = score_lines("lape", [box], [right, wrong])
    assert "mIoU 1.000" in lines
    assert "50.0% at IoU 0.5 or more" in lines


def test_examples_ask_different_things_first() -> None:
    first = score_answer(SPAN_RECORD, Answer(""))
    other = score_answer(
        Record("b", (Turn("user", "quando?"),), (Media("video", "b.mp4"),), coordinates=SPAN_RECORD.coordinates),
        Answer(""),
    )
    assert choose_examples([first, first, other], 2, attrgetter("question")) == [first, other]
