"""Pairs of one's own: JSON lines and tables with columns of any name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.eval.babylm.pairs import PairColumns, build_pair_tasks
from llava.eval.babylm.tasks import read_items
from llava.eval.choices import Candidate


def read(path: Path, text: str, columns: PairColumns | None = None):
    path.write_text(text, encoding="utf-8")
    return read_items(build_pair_tasks([str(path)], columns or PairColumns())[0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("blimp_it.jsonl", '{"good": "La \\"casa\\".", "bad": "Il casa."}\n'),
        ("multi.tsv", '\ufeffsen\twrong_sen\nLa "casa".\tIl casa.\n'),
        ("multi.csv", 'n,sentence_good,sentence_bad\r\n1,"La ""casa"".",Il casa.\r\n'),
    ],
)
def test_known_columns(tmp_path: Path, name: str, text: str) -> None:
    (item,) = read(tmp_path / name, text)
    assert [one.text for one in item.choice.candidates] == ['La "casa".', "Il casa."]
    assert (item.uid, item.gold) == (Path(name).stem, 0)


def test_named_columns_with_groups_prefix_and_label(tmp_path: Path) -> None:
    columns = PairColumns(("a", "b", "c"), "before", ("kind", "lang"), "right")
    text = "before\ta\tb\tc\tright\tkind\tlang\nThe dog\truns\trun\trunning\t1\tverb\tit\nThe dog\tx\ty\tz\tc\t2\ten\n"
    first, second = read(tmp_path / "p.tsv", text, columns)
    assert first.choice.candidates == tuple(Candidate(f"The dog {word}", 7) for word in ("run", "runs", "running"))
    assert (first.uid, first.fields, first.predictions) == ("verb", {"lang": "it"}, ("run", "runs", "running"))
    assert (second.predictions[0], second.uid) == ("z", "2")
    (spaced,) = read(tmp_path / "s.tsv", "p\tgood\tbad\nThe cat\t sits\tsit\n", PairColumns(prefix="p"))
    assert [one.text for one in spaced.choice.candidates] == ["The cat sits", "The cat sit"]


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("x\ty\n1\t2\n", PairColumns(), r"p.tsv, line 2: has the columns 'x', 'y'; say with --pair_columns"),
        ("x\ty\n1\t2\t3\n", PairColumns(("x", "y")), "line 2: has 3 cells; line 1 names 2"),
        ("x\ty\n1\t2\n", PairColumns(("x", "z")), "line 2: has no 'z', but 'x', 'y'"),
        ("x\ty\n1\t\n", PairColumns(("x", "y")), "line 2: 'y' is ''; expected a text"),
        ("x\ty\tr\n1\t2\t2\n", PairColumns(("x", "y"), label="r"), "line 2: 'r' is '2'; expected a number below 2"),
        ("x\tx\n1\t2\n", PairColumns(("x", "x")), "names a column twice"),
        ("x\ty\n", PairColumns(("x", "y")), "has no line"),
        ("", PairColumns(("x", "y")), "has no line"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, columns: PairColumns, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "p.tsv", text, columns)


def test_files_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "blimp.tsv").write_text("x")
    for name, said in (("a.txt", "expected a file that ends in"), ("b.tsv", "no such file"), ("blimp.tsv", "rename")):
        with pytest.raises(ValueError, match=said):
            build_pair_tasks([str(tmp_path / name)], PairColumns())
    (tmp_path / "latin.tsv").write_bytes("good\tbad\nè\tb\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.tsv, behind line 0: is no text in UTF-8"):
        read_items(build_pair_tasks([str(tmp_path / "latin.tsv")], PairColumns())[0])
