"""The evaluation command, with something that answers at once in place of a model."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_answerer import GROUNDING, FakeSource, places_of
from PIL import Image

from llava.draw import ANSWER_COLOUR, REFERENCE_COLOUR
from llava.eval.metrics import score_rec
from llava.eval.run import evaluate, main, parse_arguments
from llava.eval.store import PredictionStore
from llava.grounding.syntax import box_text, parse_boxes

NUM_SAMPLES = 11


@pytest.fixture
def source(tiny_vision, tmp_path: Path) -> FakeSource:
    return FakeSource(tiny_vision, tmp_path / "asked.txt")


@pytest.fixture
def rec_data(media_dir: Path, tmp_path: Path) -> Path:
    rows = [
        {"id": f"s{i}", "image": ("a.png", "b.jpg")[i % 2], "sent": f"thing {i}.", "bbox": [0.1, 0.1, 0.6, 0.7]}
        for i in range(NUM_SAMPLES)
    ]  # fmt: skip
    path = tmp_path / "rec.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(rec_data: Path, media_dir: Path, tmp_path: Path) -> list[str]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return [
        "--task", "rec", "--model_path", str(model), "--data", str(rec_data), "--image_folder", str(media_dir),
        "--video_folder", str(media_dir), "--out", str(tmp_path / "out"), "--batch_size", "3", "--device", "cpu",
        "--num_pictures", "0", "--no_blind_check",
    ]  # fmt: skip


def run(words: list[str], source: FakeSource, *more: str) -> dict:
    return evaluate(parse_arguments([*words, *more]), source)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """--num_processes begins with copies of this process, which have nothing to import."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr("llava.eval.engine.multiprocessing.get_context", lambda method: context)
    # A training run in this process may have left handlers of its own, and no process would end.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def asked(source: FakeSource) -> list[str]:
    return source.log.read_text().splitlines() if source.log.exists() else []


def predictions(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_what_a_run_writes(words, source, tmp_path: Path, media_dir: Path) -> None:
    content = run(words, source, "--num_pictures", "2")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "pictures", "predictions.jsonl", "scores.json", "settings.json",
    ]  # fmt: skip
    rows = predictions(out)
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(NUM_SAMPLES)]
    expected = [score_rec(parse_boxes(places_of(row["question"]), GROUNDING), (0.1, 0.1, 0.6, 0.7)) for row in rows]
    for row, scores in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert rows[3] | {"scores": 0, "boxes": 0} == {
        "index": 3, "id": "s3", "source": "rec.jsonl, line 4", "media": [str(media_dir / "b.jpg")],
        "question": "Where is thing 3.?", "reference": {"boxes": [[0.1, 0.1, 0.6, 0.7]], "span": None, "captions": []},
        "answer": f"3 together: {places_of('Where is thing 3.?')}", "boxes": 0, "spans": rows[3]["spans"], "scores": 0,
    }  # fmt: skip
    assert json.loads((out / "scores.json").read_text()) == content
    assert content["num_samples"] == NUM_SAMPLES
    assert content["unparsable"] == 0
    mean = sum(row["mIoU"] for row in expected) / NUM_SAMPLES
    assert content["scores"]["mIoU"]["value"] == pytest.approx(mean, abs=1e-5)
    assert content["scores"]["mIoU"]["low"] <= mean <= content["scores"]["mIoU"]["high"]
    assert set(content["versions"]) == {"llava", "python", "torch", "transformers"}
    best, *_, worst = sorted(rows, key=lambda row: -row["scores"]["mIoU"])
    pictures = sorted(path.name for path in (out / "pictures").iterdir())
    assert pictures[0] == f"best_01_{best['id']}.png"
    assert pictures[2] == f"worst_01_{worst['id']}.png"
    assert [name[:8] for name in pictures] == ["best_01_", "best_02_", "worst_01", "worst_02"]
    with Image.open(out / "pictures" / pictures[0]) as picture:
        colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {REFERENCE_COLOUR, ANSWER_COLOUR} <= colours


def test_a_run_goes_on_where_it_was_killed(words, source, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run([*words, "--out", str(whole)], source)
    before = asked(source)
    with pytest.raises(ValueError, match=r"sample 's7' \(rec.jsonl, line 8\): the prompt has 900 tokens"):
        run(words, source.changed(fails_at="thing 7."))
    part = tmp_path / "out" / "predictions-00.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    # Killed while it wrote: the fifth row is there, of the sixth a half.
    part.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    source.log.unlink()
    run(words, source)
    # The second batch is asked as a whole, or its padding would not be what it was.
    assert asked(source) == before[3:]
    out = tmp_path / "out"
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert not part.exists()


def test_a_finished_run_only_scores_again(words, source, tmp_path: Path) -> None:
    first = run(words, source)
    scores = tmp_path / "out" / "scores.json"
    before = scores.read_bytes(), (tmp_path / "out" / "predictions.jsonl").read_bytes()
    scores.unlink()
    source.log.unlink()
    assert run(words, source.changed(dies_at="thing"), "--num_pictures", "0") == first
    assert asked(source) == []
    assert (scores.read_bytes(), (tmp_path / "out" / "predictions.jsonl").read_bytes()) == before
    assert not (tmp_path / "out" / "pictures").exists()


def test_two_processes_say_what_one_says(words, source, forked, monkeypatch, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run([*words, "--out", str(whole)], source)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"ended with signal SIGKILL .* goes on where it stopped"):
        run(words, source.changed(dies_at="thing 4."), "--num_processes", "2")
    assert (out / "predictions-01.jsonl").read_bytes() == b""
    monkeypatch.undo()  # The rest by new processes, as everywhere else.
    run(words, source, "--num_processes", "2")
    assert (out / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert sorted(set(asked(source))) == sorted({f"Where is thing {i}.?" for i in range(NUM_SAMPLES)})


def test_other_settings_do_not_go_on(words, source, forked, tmp_path: Path) -> None:
    run(words, source)
    for more, name in (
        (["--max_new_tokens", "5"], "max_new_tokens 128, here it is 5"),
        (["--prompt", "{expression}"], "prompt null"),
        (["--sub_bin"], "sub_bin false"),
        (["--limit", "3"], "limit null"),
    ):
        with pytest.raises(ValueError, match=f"has an evaluation with {name}.* or --overwrite to begin anew"):
            run(words, source, *more)
    assert len(predictions(tmp_path / "out")) == NUM_SAMPLES
    assert run(words, source, "--limit", "3", "--overwrite")["num_samples"] == 3
    # How the work is cut and shared does not change the answers' meaning.
    assert run(words, source, "--limit", "3", "--batch_size", "1", "--num_processes", "2")["num_samples"] == 3


def test_changed_data_and_models_are_other_settings(words, source, rec_data: Path, tmp_path: Path) -> None:
    run(words, source)
    text = rec_data.read_text()
    rec_data.write_text(text.replace("thing 3.", "something"))
    with pytest.raises(ValueError, match="an evaluation with samples"):
        run(words, source)
    rec_data.write_text(text)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"new")
    with pytest.raises(ValueError, match="an evaluation with model_files"):
        run(words, source)


def test_settings_may_change_while_nothing_is_answered(words, source) -> None:
    with pytest.raises(ValueError, match="900 tokens"):
        run(words, source.changed(fails_at="thing"))
    assert run(words, source, "--max_new_tokens", "5")["num_samples"] == NUM_SAMPLES


def test_one_run_at_a_time(words, source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = PredictionStore(str(out), {})
    with pytest.raises(ValueError, match="another evaluation is writing there"):
        run(words, source)
    del other
    run(words, source)


def test_damaged_predictions_are_named(words, source, tmp_path: Path) -> None:
    run(words, source)
    path = tmp_path / "out" / "predictions.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"predictions.jsonl, line 2: it is no prediction; delete the line"):
        run(words, source)


def test_bad_samples(words, source, rec_data: Path, media_dir: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in rec_data.read_text().splitlines()]
    rows[4]["image"] = "missing.png"
    rec_data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = rf"sample 's4' \(rec.jsonl, line 5\): {media_dir}/missing.png: no such file; .*--on_bad_sample skip"
    with pytest.raises(ValueError, match=message):
        run(words, source)
    assert len(asked(source)) == 3
    content = run(words, source.changed(fails_at="thing 7."), "--on_bad_sample", "skip")
    bad = [
        ("s4", f"{media_dir}/missing.png", "no such file"),
        ("s7", "", "the prompt has 900 tokens, but the model's context is 512"),
    ]
    assert [(row["id"], row["file"], row["reason"]) for row in content["bad_samples"]] == bad
    assert content["unparsable"] == pytest.approx(2 / NUM_SAMPLES)
    rows = predictions(tmp_path / "out")
    assert rows[4]["scores"] == {"mIoU": 0, "IoU>=0.5": 0, "unparsable": 1}
    assert rows[8]["answer"].startswith("1 together")
    # Without the flag they are tried again.
    with pytest.raises(ValueError, match="sample 's4'"):
        run(words, source)


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("rec", [{"image": name, "sent": "it", "bbox": [9, 9, 60, 50]} for name in ("a.png", "missing.png")]),
        ("tvg", [{"video": name, "caption": "it", "timestamp": [0.3, 0.9]} for name in ("a.mp4", "missing.mp4")]),
        (
            "svg",
            [
                {"video": name, "caption": "it", "timestamp": [0.3, 0.9], "boxes": [[0, 0, 1, 1]]}
                for name in ("a.mp4", "missing.mp4")
            ],
        ),
    ],
)
def test_missing_files_whose_size_or_length_is_needed(
    words, source, media_dir: Path, tmp_path: Path, task: str, rows: list[dict]
) -> None:
    """Without them the reference is not known; the sample still counts 0."""
    data = tmp_path / "needs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*words, "--task", task, "--data", str(data), "--box_format", "xyxy"]
    with pytest.raises(ValueError, match=r"sample '2' \(needs.jsonl, line 2\): .*/missing.*: no such file"):
        run(words, source)
    assert asked(source) == []
    content = run(words, source, "--on_bad_sample", "skip")
    assert content["unparsable"] == 0.5
    assert [row["id"] for row in content["bad_samples"]] == ["2"]
    assert len(asked(source)) == 1


def test_references_may_be_corrected(words, source, rec_data: Path) -> None:
    before = run(words, source)["scores"]["mIoU"]["value"]
    rec_data.write_text(rec_data.read_text().replace("[0.1, 0.1, 0.6, 0.7]", "[0.2, 0.2, 0.8, 0.8]"))
    assert run(words, source)["scores"]["mIoU"]["value"] != before
    assert len(asked(source)) == NUM_SAMPLES


def test_all_samples_bad_is_an_error(words, source) -> None:
    with pytest.raises(ValueError, match="all 11 samples are bad; the first: 's0': the prompt has 900 tokens"):
        run(words, source.changed(fails_at="thing"), "--on_bad_sample", "skip")
    with pytest.raises(ValueError, match="trained on text alone"):
        run(words, source.changed(vision=None), "--on_bad_sample", "skip", "--overwrite")


SPAN = {"temporal_output_locations": [0.2, 0.6]}
BOX = {"spatial_width_output_locations": [0.1, 0.6], "spatial_height_output_locations": [0.1, 0.7]}


@pytest.mark.parametrize(
    ("task", "answer", "variables", "text", "main_score"),
    [
        ("rec", box_text(), BOX, "[<WIDTH-010><HEIGHT-010><WIDTH-059><HEIGHT-069>]", "mIoU"),
        ("tvg", "{<TEMP-OUTPUT><TEMP-OUTPUT>}", SPAN, "{<TEMP-020><TEMP-059>}", "mIoU"),
        (
            "stvg",
            "{<TEMP-OUTPUT><TEMP-OUTPUT>}" + box_text(),
            SPAN | BOX,
            "{<TEMP-020><TEMP-059>}[<WIDTH-010><HEIGHT-010><WIDTH-059><HEIGHT-069>]",
            "vIoU",
        ),
        (
            "elc",
            "it moves {<TEMP-OUTPUT><TEMP-OUTPUT>}" + box_text(),
            SPAN | BOX,
            "it moves {<TEMP-020><TEMP-059>}[<WIDTH-010><HEIGHT-010><WIDTH-059><HEIGHT-069>]",
            "vIoU",
        ),
        ("svg", box_text(), BOX, "[<WIDTH-010><HEIGHT-010><WIDTH-059><HEIGHT-069>]", "vIoU"),
        ("caption", "it moves now and then", {}, "it moves now and then", "CIDEr"),
    ],
)
def test_every_task_from_the_librarys_own_data(
    words, source, tmp_path: Path, task: str, answer: str, variables: dict, text: str, main_score: str
) -> None:
    """A right answer scores (about) 1 under every task, and an empty one 0 and unparsable."""
    human, given = "<video>\nWhat?", variables
    if task == "svg":
        human, given = (
            "<video>\nWhere is it {<TEMP-INPUT><TEMP-INPUT>}?",
            BOX | {"temporal_input_locations": [0.2, 0.6]},
        )
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    other = [turns[0], turns[1] | {"value": answer.replace("now and then", "then and a day")}]
    samples = [
        {"id": i, "video": "a.mp4", "conversations": t, "variables": given} for i, t in enumerate((turns, other))
    ]
    (tmp_path / "own.json").write_text(json.dumps(samples))
    words = [*words, "--task", task, "--data", str(tmp_path / "own.json")]
    run(words, source.changed(text=text))
    first = predictions(tmp_path / "out")[0]
    assert first["scores"]["unparsable"] == 0
    assert first["scores"][main_score] > 0.9
    assert first["question"] == human  # As it stands, as in training.
    content = run([*words, "--out", str(tmp_path / "other")], source.changed(text=" "))
    assert content["scores"][main_score]["value"] == 0
    assert content["unparsable"] == (0 if task == "caption" else 1)


def test_templates(words, source, rec_data: Path) -> None:
    run(words, source, "--prompt", "Find: {expression}")
    assert asked(source)[0] == "Find: thing 0."
    with pytest.raises(ValueError, match=r"--prompt has \{span\}; known for this task: \{expression\}"):
        run(words, source, "--prompt", "{expression} in {span}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "nothing"], "unknown task 'nothing'; known: caption, elc, rec, stvg, svg, tvg"),
        (["--model_path", "/nowhere"], "--model_path '/nowhere' is no folder"),
        (["--data", "/nowhere.json"], "--data /nowhere.json: no such file"),
        (["--task", "tvg"], "rec.jsonl, line 1: needs"),
        (["--out", __file__], "not a folder"),
        (["--device", "cuda:1", "--num_processes", "2"], "--device cuda:1 with --num_processes 2"),
        (["--plugins", "no_such_plugin"], "--plugins no_such_plugin: no such module"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, capsys, more: list[str], message: str) -> None:
    assert main([*words, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("more", [["--batch_size", "0"], ["--num_processes", "0"], ["--limit", "0"], ["--bits", "3"]])
def test_values_out_of_range_end_with_status_2(words, more: list[str]) -> None:
    assert main([*words, *more]) == 2


def test_the_blind_check_asks_once_more_with_other_pictures(words, source, tmp_path: Path, media_dir, capsys) -> None:
    words.remove("--no_blind_check")
    content = run(words, source)
    # What is said depends on the question alone: this model does not look.
    check = content["blind_check"]
    assert check["score"] == check["other_score"] == pytest.approx(100 * content["scores"]["mIoU"]["value"])
    assert check["is_blind"]
    assert "warning: rec, mIoU: " in capsys.readouterr().err
    own, other = predictions(tmp_path / "out"), predictions(tmp_path / "out" / "blind_check")
    assert [row["id"] for row in own] == [row["id"] for row in other]
    assert all(
        one["media"] != two["media"] and one["reference"] == two["reference"]
        for one, two in zip(own, other, strict=True)
    )
    assert sum(path == str(media_dir / "a.png") for row in other for path in row["media"]) == 5
    # Nothing is asked again, and the scores are the same.
    source.log.unlink()
    assert run(words, source.changed(dies_at="thing")) == content
    # Another evaluation in its place has another check.
    again = run([*words, "--limit", "4", "--overwrite"], source)
    assert len(predictions(tmp_path / "out" / "blind_check")) == again["num_samples"] == 4


def test_there_is_no_blind_check_where_all_see_the_same(words, source, tmp_path: Path, capsys) -> None:
    words.remove("--no_blind_check")
    assert "blind_check" not in run([*words, "--limit", "1"], source)
    assert "no blind check" in capsys.readouterr().err


def test_a_blind_check_that_was_broken_off_goes_on(words, source, tmp_path: Path) -> None:
    first = run(words, source)
    words.remove("--no_blind_check")
    source.log.unlink()
    with pytest.raises(ValueError, match="the prompt has 900 tokens"):
        run(words, source.changed(fails_at="thing 7."))
    source.log.unlink()
    content = run(words, source)
    assert asked(source) == [f"Where is thing {i}.?" for i in range(6, NUM_SAMPLES)]
    assert content | {"blind_check": None} == first | {"blind_check": None}
