"""What an inspection shows: its text, its page, its command line; and that it leaves no trace."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ITALIAN, turns
from looking import Look, make_look

from llava.inspect.__main__ import main
from llava.train.arguments import PARTS

ATTACK = "<script>alert(1)</script><img src=http://x.example/y>"


class Elements(HTMLParser):
    """The names and attributes of all elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def look(gpt2_dir, tower_dir, mixed_data, tmp_path, capsys) -> Look:
    return make_look(gpt2_dir, tower_dir, mixed_data, tmp_path, capsys)


@pytest.fixture
def hostile_data(media_dir: Path) -> Path:
    """Clips and texts whose ids and captions are written like elements of a page."""
    samples = [
        {"id": f"{ATTACK}{i}", "video": name, "conversations": turns("<video>", f"{ATTACK} {ITALIAN[i]}")}
        for i, name in enumerate(("a.mp4", "b.mp4"))
    ]
    samples.append({"id": "text", "conversations": turns("", ITALIAN[2]), "nota": "x"})
    path = media_dir / "hostile.json"
    path.write_text(json.dumps(samples))
    return path


def test_the_page_is_whole_and_has_no_element_of_the_data(look, hostile_data, tmp_path) -> None:
    page = tmp_path / "new" / "look.html"
    status, text = look("--html", str(page), data_path=hostile_data)
    assert status == 0, text
    assert text.endswith(f"written: {page}\n")
    found = Elements(page.read_text())
    assert "script" not in found.names
    assert ATTACK in found.text
    assert found.names.count("img") == 6  # Three frames of each clip.
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in found.sources)
    for words in ("supervised: learned", "<vid_patch> x 10", "12 fast", "0.75 s", *PARTS):
        assert words in found.text, words
    assert 'nothing reads the key "nota"' in found.text
    # What it has looked at is as it was: no folder of the run, no lock, no checkpoint.
    assert not (tmp_path / "out").exists()


def test_a_large_model_is_not_run_if_it_is_to_be_fast(look, monkeypatch) -> None:
    monkeypatch.setattr("llava.inspect.passes._MOST_FAST", 1.0)
    status, text = look("--fast")
    assert status == 0
    assert "makes no passes of" in text
    assert "loss of the text alone" in text
    assert "gradient of" not in text


def test_memory_and_disk_that_are_too_small(look, monkeypatch) -> None:
    monkeypatch.setattr("llava.inspect.costs.free_space", lambda folder: 1000)
    status, text = look("--memory", "0.0001")
    assert status == 1
    assert re.search(r"error: memory: memory of a step, at most: .*--per_device_train_batch_size", text)
    assert re.search(r"error: disk: .*give another folder", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--htlm", "x.html"], "unknown flag --htlm; did you mean --html"),
        (["--html", "recipe.yaml"], "--html recipe.yaml: expected the name of a file that ends with .html"),
        (["--accept", "frozen"], "--accept names frozen; known: refused, "),
        (["--batches", "0"], "--batches is 0; it must be at least 1"),
        (["--memory", "-1"], "--memory is -1.0; it must be at least 0"),
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate"),
        (["--data_path", "x.json", "--output_dir", "o"], "--model_name_or_path is missing"),
        (["--model_name_or_path", "nowhere", "--data_path", "x.json", "--output_dir", "o"], "nowhere"),
        (["--config", "nowhere.yaml"], "--config 'nowhere.yaml': no such file"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: list[str], message: str, capsys) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_with_another_run_is_refused(look, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    status, text = look()
    assert status == 1
    assert "refused: the trainer stops here: --output_dir" in text


def test_device_flags_do_not_matter(look) -> None:
    status, text = look(fp16="true", deepspeed="zero2")
    assert status == 0, text
    assert "looked at on the CPU, in float32 and without --fp16 True, --deepspeed zero2" in text
