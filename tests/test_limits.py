"""What grows without end is counted before it is made: aliases, braces, canvases, texts, media, templates."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import turns
from transformers import AutoTokenizer

from llava.config import VisionConfig
from llava.data import records
from llava.data.files import find_entries
from llava.data.formats import build_format
from llava.data.placeholders import expand_placeholders
from llava.data.records import read_records
from llava.geometry import parse_pinpoints
from llava.io import read_yaml
from llava.model.vocabulary import load_tokenizer
from llava.types import Turn


@pytest.fixture(autouse=True)
def quick():
    """Each of them is refused, not worked off."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 20


ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{ALIASES}datasets: *a8\n", "aliases .* stand for more than 200,000 values"),
        (f"{MERGES}datasets: [*a8]\n", "aliases .* stand for more than 200,000 values"),
        ("datasets: &a [*a, *a]\n", "aliases .* stand for more than 200,000 values"),
        ("datasets:\n" + " - json_path: x\n" * 300_000, "more than 4,194,304 bytes, which no settings have"),
    ],
    ids=["aliases", "merges", "itself", "large"],
)
def test_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_entries([str(tmp_path / "mix.yaml")])


def test_a_few_aliases_are_what_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("a: &a {x: [1, 2]}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    (tmp_path / "empty.yaml").write_text("")
    read = read_yaml(tmp_path / "some.yaml", "some.yaml")
    assert read == {"a": {"x": [1, 2]}, "b": {"x": [1, 2], "y": 3}, "c": [{"x": [1, 2]}] * 2}
    assert read_yaml(tmp_path / "empty.yaml", "empty.yaml") is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x" + "{a,b}" * 28 + ".json", "its braces stand for 268,435,456 files, and at most 10,000 are read"),
        ("x{" + "a," * 3_000_000 + "a}", "has 6,000,004 characters; give a folder, or a pattern"),
    ],
)
def test_braces(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_entries([pattern])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["(1x1),...,(3000x3000)", "(1x1),...,(1" + "0" * 30 + "x2)", "(1x2)," * 100_000])
def test_canvases(text: str) -> None:
    with pytest.raises(ValueError, match=r"--image_grid_pinpoints .*at most 1,000"):
        parse_pinpoints(text, 56)


def test_texts_and_media_of_a_sample(tmp_path: Path) -> None:
    limit = records._LONGEST_TEXT
    lines = [
        {"id": "long", "conversations": turns("", "a" * (limit + 1))},
        {"id": "many", "image": ["a.png"] * 10_001, "conversations": turns("<image>" * 10_001, "ciao")},
        {"id": "good", "conversations": turns("", "ciao")},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "text.txt").write_text("a" * (limit + 1) + "\n")
    found = read_records(str(path), on_bad_sample="skip")
    assert [bool(record.fault) for record in found] == [True, True, False]
    assert "its text has 4,000,002 characters, and a sample has at most 4,000,000" in str(found[0].fault)
    assert "has 10,001 images and videos, and a sample has at most 10,000" in str(found[1].fault)
    with pytest.raises(ValueError, match=r"text\.txt, line 1: its text has 4,000,001 characters"):
        read_records(str(tmp_path / "text.txt"))


def test_spans_that_no_context_holds(tiny_vision: VisionConfig) -> None:
    with pytest.raises(ValueError, match="its images and videos take more than 1,048,576 tokens"):
        expand_placeholders([Turn("user", "<video>")], tiny_vision, [10**6])


# Chat templates and tokenizers, which come with a model.

TEMPLATES = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "runs more than 100,000 lines",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}":
        "makes a text of more than 10,000,000 characters",
    "{% set ns = namespace(x=['aaaa']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}":
        "makes a text of more than 10,000,000 characters",
    "{{ 'a' * 10000000000 }}": "it multiplies",
    "{% generation %}{{ 'a' * 10000000000 }}{% endgeneration %}": "it multiplies",
    "{% set n = 1000 %}{% set n = n * n %}{{ 'a' * n }}": "it multiplies",
    "{{ 10 ** 10 }}": "it raises to a power",
    "{{ '%09999999d' % 1 }}": "it has the number",
    "{{ 'a'.center(1000000000) }}": "it has the number 1000000000",
    "{{ (messages|string).replace('', messages|string).replace('', messages|string) }}": "what it replaces",
    "{{ " + "messages[0].content" + " ~ 'a'" * 60_000 + " }}": "it has 360,025 characters",
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=[said[:40] for said in TEMPLATES.values()])
def test_chat_templates(tokenizer_dir: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"the chat template of the tokenizer of .*{TEMPLATES[template]}"):
        build_format("chat", tokenizer)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_tokenizers_that_make_texts_longer(tokenizer_dir: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for number, message in ((60, r"times as long in its (normalizer|decoder)"), (6, None)):
        content[part] = {"type": "Sequence", f"{part}s": [step] * number}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        if message is None:
            load_tokenizer(str(folder))
        else:
            with pytest.raises(ValueError, match=message):
                load_tokenizer(str(folder))


# Archives and lists of files.


def test_a_compressed_line_is_read_no_further_than_a_line_may_be(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "text.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"a" * 10**6)
    assert (tmp_path / "text.txt.gz").stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"text\.txt\.gz, line 1: longer than 67108864 bytes"):
        read_records(str(tmp_path / "text.txt.gz"))


def test_a_list_of_tables_names_files_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    state = {"_data_files": [{"filename": "../secret.arrow"}]}
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"its state\.json names .*secret\.arrow, which lies outside of it"):
        find_entries([str(tmp_path / "data")])
