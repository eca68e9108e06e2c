"""Plain text as it comes: lines of files, compressed or not, folders, patterns, and columns of tables."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llava.data.records import read_records
from llava.data.train_tokenizer import read_texts
from llava.data.words import count_words

LINES = "Il gatto dorme.\n\n  La ragazza\tcorre via. \r\nun tag <image> nel testo"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder as BabyLM's: files of two kinds, one compressed, beside files that are none."""
    folder = tmp_path / "corpus"
    (folder / "part").mkdir(parents=True)
    (folder / "b.train").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    (folder / "part" / "c.txt.gz").write_bytes(gzip.compress("è così\nsì".encode()))
    (folder / "README.txt").write_text("about these files")
    (folder / "notes.md").write_text("no corpus")
    (folder / ".hidden.txt").write_text("no corpus")
    return folder


def texts(paths, **options) -> list[str]:
    return [" | ".join(turn.text for turn in record.turns) for record in read_records(paths, **options)]


def test_lines_are_samples(corpus: Path, tmp_path: Path) -> None:
    records = read_records(str(corpus / "b.train"), cache_dir=str(tmp_path / "cache"))
    assert [record.id for record in records] == ["b.train:1", "b.train:3", "b.train:4"]
    assert [record.source for record in records][1] == "b.train, line 3"
    # A placeholder in running text is a word: no picture goes with it.
    assert texts(str(corpus / "b.train")) == ["Il gatto dorme.", "La ragazza\tcorre via.", r"un tag \<image> nel testo"]
    assert records.numbers("num_words").tolist() == [3, 4, 5]
    assert list(read_texts(str(corpus / "b.train")))[1] == "La ragazza\tcorre via."


@pytest.mark.parametrize("path", ["corpus", "corpus/**/*.t*[nz]", "corpus/{b.train,part/c.txt.gz}"])
def test_folders_and_patterns(corpus: Path, path: str, caplog) -> None:
    found = read_records(str(corpus.parent / path))
    assert [record.id for record in found] == ["b.train:1", "b.train:3", "b.train:4", "c.txt.gz:1", "c.txt.gz:2"]
    assert (f"{corpus}/README.txt, {corpus}/notes.md" in caplog.text) == (path == "corpus")
    assert ".hidden" not in caplog.text


def test_a_file_that_is_named_twice_is_said(corpus: Path, caplog) -> None:
    assert len(read_records([str(corpus / "b.train"), str(corpus / "*.train")])) == 6
    assert f"named more than once, and trained on as often: {corpus}/b.train" in caplog.text


def test_columns_of_tables(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["Il gatto", "dorme qui"], "year": [1, 2]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "Il gatto"}\n{"conversations": [{"from": "gpt", "value": "dorme qui"}]}'
    )
    for name in ("a.parquet", "saved", "a.jsonl"):
        assert texts(str(tmp_path / name), text_column="text") == ["Il gatto", "dorme qui"]
    with pytest.raises(
        ValueError, match=r'row 1: has neither turns nor "txt", which --text_column names; it has: text, year'
    ):
        texts(str(tmp_path / "a.parquet"), text_column="txt")
    with pytest.raises(ValueError, match=r'row 1: "year" \(--text_column\) must be a text, found int'):
        texts(str(tmp_path / "a.parquet"), text_column="year")
    with pytest.raises(ValueError, match=r"row 1.*--text_column text"):
        texts(str(tmp_path / "a.parquet"))


BAD = {
    "empty.txt": (b"", "empty.txt: the file has no text; it is empty"),
    "blank.txt": (b"\n \n", "blank.txt: the file has no text, only blank lines"),
    "latin.txt": ("uno\ncosì è".encode("latin-1"), r"latin.txt, line 2: not UTF-8 \(byte 3 of the line\)"),
    "binary.txt": (b"a\nb\0c", "binary.txt, line 2: has a byte that no text has"),
    "wide.txt": ("uno".encode("utf-16"), "wide.txt, line 1: has a byte that no text has"),
    "cut.txt.gz": (gzip.compress(b"uno\ndue\n" * 99)[:-9], r"cut.txt.gz, behind line \d+: not a whole gzip file"),
    "none.txt.gz": (b"uno due", r"none.txt.gz, behind line 0: not a whole gzip file"),
    "odd.txt": (b"<im_start> uno", "odd.txt, line 1.*a name kept for visual tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_corpus_is_one_line_with_its_place(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_records(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*.arrow"))


def test_folders_without_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder without a corpus in it; known kinds: \.txt"):
        read_records(str(tmp_path))
    with pytest.raises(ValueError, match="no file has such a name"):
        read_records(str(tmp_path / "*.txt"))


def test_what_a_word_is(visual_tokenizer) -> None:
    assert count_words("<image>\nUn gatto\u00a0nero, <video>dorme") == 4
    assert count_words("il cane [<WIDTH-OUTPUT><HEIGHT-OUTPUT><WIDTH-OUTPUT><HEIGHT-OUTPUT>] corre") == 3
    assert count_words(r"un tag \<image> qui") == 4
