"""The evaluation command with a tiny grounded model, from the command line to the scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import turns

from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.eval.annotations import MediaFolders, read_annotations
from llava.eval.run import main
from llava.eval.store import EvalSample, Reference
from llava.eval.tasks import TASKS
from llava.geometry import Box, TimeSpan
from llava.grounding.syntax import box_text
from llava.serve.generate import Captioner, PromptWriter, Request
from llava.types import Coordinates, Media


@pytest.fixture(scope="module")
def checkpoint(load_tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grounded")
    loaded = load_tiny("llava_llama", grounding="lape", image_aspect_ratio="pad")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def evaluate(checkpoint: Path, out: Path, task: str, rows: list[dict], media_dir: Path, *more: str) -> list[dict]:
    data = out.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--task", task, "--model_path", str(checkpoint), "--data", str(data), "--out", str(out), "--device", "cpu"]
    folders = ["--image_folder", str(media_dir), "--video_folder", str(media_dir)]
    assert main([*words, *folders, "--batch_size", "2", "--max_new_tokens", "12", *more]) == 0
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_boxes_of_a_model(checkpoint: Path, media_dir: Path, tmp_path: Path, capsys) -> None:
    """A question that ends where a box begins is answered with a box, whatever the weights."""
    rows = [
        {"id": name, "image": name, "sent": f"the {place} one", "bbox": [0.2, 0.2, 0.8, 0.8]}
        for name, place in (("a.png", "left"), ("b.jpg", "right"), ("a.png", "very last"))
    ]
    found = evaluate(checkpoint, tmp_path / "out", "rec", rows, media_dir, "--prompt", "{expression} [")
    assert [row["scores"]["unparsable"] for row in found] == [0, 0, 0]
    captioner = Captioner.from_checkpoint(str(checkpoint), device="cpu")
    for row in found:
        request = Request([Media("image", row["media"][0])], row["question"])
        (answer,) = captioner.answer([request], max_new_tokens=12)
        assert row["answer"] == answer.text
        assert row["boxes"] == [pytest.approx(box, abs=1e-6) for box in answer.boxes]
    assert "mIoU" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 3


def test_a_time_that_the_question_gives(checkpoint: Path, media_dir: Path, tmp_path: Path) -> None:
    row = {"video": "a.mp4", "caption": "it moves", "span": [0.2, 0.6], "boxes": [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]]}
    template = "{expression} {span} ["
    (found,) = evaluate(checkpoint, tmp_path / "out", "svg", [row], media_dir, "--prompt", template, "--sub_bin")
    assert found["question"] == "it moves {<TEMP-INPUT><TEMP-INPUT>} ["
    request = Request(
        [Media("video", str(media_dir / "a.mp4"))],
        found["question"],
        "",
        Coordinates(temporal_input_locations=(0.2, 0.6)),
    )
    captioner = Captioner.from_checkpoint(str(checkpoint), device="cpu")
    (answer,) = captioner.answer([request], sub_bin=True, max_new_tokens=12)
    assert found["boxes"] == [pytest.approx(box, abs=1e-6) for box in answer.boxes]
    assert set(found["scores"]) >= {"tIoU", "sIoU", "vIoU"}


@pytest.mark.parametrize("human", ["<image>\nDov'è {box}?", "<image> Un uomo {box}", "In {box}: <image> che cosa?"])
def test_questions_are_the_beginnings_of_training_samples(load_tiny, media_dir: Path, tmp_path: Path, human) -> None:
    """To the token, and in the same square."""
    loaded = load_tiny("llava_llama", grounding="lape", image_aspect_ratio="pad")
    numbers = {"spatial_width_input_locations": [0.1, 0.6], "spatial_height_input_locations": [0.2, 0.7]}
    conversation = turns(human.format(box=box_text("INPUT")), "una stella")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": conversation, "variables": numbers}]))
    dataset = SupervisedDataset(
        read_records(str(data), str(media_dir)), loaded.tokenizer, loaded.vision, 512, grounding=loaded.model.grounding
    )
    (sample,) = read_annotations("captions", [str(data)], MediaFolders(images=str(media_dir)))
    question, coordinates = TASKS.get("caption").ask(sample)
    captioner = Captioner(loaded, "cpu")
    writer = PromptWriter(captioner.tokenizer, captioner.text_format, captioner.vision, captioner.grounding)
    prompt = writer.write(Request(sample.media, question, sample.system, coordinates))
    example = dataset[0]
    assert prompt.ids == example.input_ids[: len(prompt.ids)]
    assert len(prompt.ids) > len(example.input_ids) - 12
    assert prompt.coordinates == example.coordinates


def test_a_template_is_filled_with_the_numbers_of_the_reference() -> None:
    """Widths are x, heights are y; no two of the numbers are alike."""
    reference = Reference((Box(0.1, 0.2, 0.6, 0.7),), TimeSpan(0.3, 0.8), ("una stella",))
    sample = EvalSample("1", "x.json, sample 1", (Media("video", "a.mp4"),), reference=reference, expression="il gatto")
    question, coordinates = TASKS.get("elc").ask(sample, "{box}: {expression}?")
    assert question == f"{box_text('INPUT')}: il gatto?"
    assert box_text("INPUT") == "[<WIDTH-INPUT><HEIGHT-INPUT><WIDTH-INPUT><HEIGHT-INPUT>]"
    assert coordinates == Coordinates(
        spatial_width_input_locations=(0.1, 0.6), spatial_height_input_locations=(0.2, 0.7)
    )
    question, coordinates = TASKS.get("svg").ask(sample, "{span} {expression}")
    assert question == "{<TEMP-INPUT><TEMP-INPUT>} il gatto"
    assert coordinates == Coordinates(temporal_input_locations=(0.3, 0.8))


def test_a_prompt_shows_all_media_or_none(load_tiny, media_dir: Path) -> None:
    captioner = Captioner(load_tiny("llava_llama"), "cpu")
    with pytest.raises(ValueError, match=r"shows .*'image', 'image'.*, but the request has .*'image'"):
        captioner.answer([Request([Media("image", str(media_dir / "a.png"))], "<image> e <image>")])


def test_captions_of_a_model(checkpoint: Path, media_dir: Path, tmp_path: Path) -> None:
    rows = [{"image": name, "captions": ["un uomo", "una donna"]} for name in ("a.png", "b.jpg")]
    found = evaluate(checkpoint, tmp_path / "out", "caption", rows, media_dir, "--num_pictures", "0", "--limit", "1")
    assert len(found) == 1
    assert set(found[0]["scores"]) >= {"BLEU-4", "ROUGE-L", "CIDEr"}


def test_other_files_are_no_models(media_dir: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": str(media_dir / "a.png"), "caption": "x"}))
    words = ["--task", "caption", "--data", str(data), "--image_folder", str(media_dir), "--out", str(tmp_path / "out")]
    assert main([*words, "--model_path", str(tmp_path)]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
