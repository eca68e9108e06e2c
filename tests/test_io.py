"""Files are written as a whole or not at all, and lines of JSON survive a writer that was killed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llava import io


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, durable: bool, shared: bool) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with io.write_beside(path, durable=durable, shared=shared) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")

    def write_half() -> None:
        with io.write_beside(path) as beside:
            beside.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_one_file_have_paths_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "index"
    with io.write_beside(path, shared=True) as first:
        first.write_text("1")
        with io.write_beside(path, shared=True) as second:
            assert first != second
            second.write_text("2")
        assert path.read_text() == "2"
    assert path.read_text() == "1"


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    path = tmp_path / "file"
    monkeypatch.setattr(io, "sync", lambda it: synced.append((it.name, path.exists())))
    io.write_json(path, "content")
    assert synced == [("file.part", False), (tmp_path.name, True)]


def test_json_of_any_text_can_be_read_back(tmp_path: Path) -> None:
    value = {"name": "caffè \udcff", "numbers": [1, 2.5]}
    io.write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == value
    assert "caffè" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_lines_go_on_behind_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert io.read_json_lines(path) == []
    io.cut_unfinished_line(path)
    rows = [{"id": "è"}, {"id": "\udcff"}]
    with path.open("ab") as file:
        io.append_json_lines(file, rows)
        file.write(b'{"id": "ha')
    assert io.read_json_lines(path) == rows
    io.cut_unfinished_line(path)
    with path.open("ab") as file:
        io.append_json_lines(file, [{"id": "c"}])
    assert io.read_json_lines(path) == [*rows, {"id": "c"}]
    path.write_bytes(b"1\n{,}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        io.read_json_lines(path)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 1_000_000)
    assert io.hash_file(tmp_path / "file") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert io.hash_json({"a": 1, "b": Path("x")}, 16) == io.hash_json({"b": "x", "a": 1})[:16]
