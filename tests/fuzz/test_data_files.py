"""Data files: what is accepted says what was written, in all spellings and by all ways; the rest is named."""

from __future__ import annotations

import copy
import gzip
import json
import math
from typing import Any
from unittest import mock

import pytest
from fuzzing import attempt, cases, names
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import any_texts, conversations, damaged, free_texts, loose_samples, spelled

from llava.constants import PLACEHOLDER
from llava.data import raw_samples
from llava.data.placeholders import placeholder_kinds
from llava.data.raw_samples import PlainText, read_block, read_blocks, read_samples
from llava.data.record_rows import count_parts, dump_record, load_record
from llava.data.records import parse_record, read_records
from llava.types import Record

SOURCE = "f.json, sample 1"


def parse(sample: object) -> Record:
    return parse_record(sample, SOURCE, "/media", "/media")


@cases(offline=700, in_ci=60)
@given(st.data())
def test_every_spelling_of_a_sample_gives_the_same_record(data):
    turns = data.draw(conversations())
    sample = data.draw(spelled(turns))
    kept = copy.deepcopy(sample)
    record = parse(sample)
    assert sample == kept
    assert [turn.role for turn in record.turns] == [role for role, _ in turns]
    for turn, (_, pieces) in zip(record.turns, turns, strict=True):
        assert placeholder_kinds(turn.text) == [kind for kind, _ in pieces if kind != "text"]
        written = "".join(words for kind, words in pieces if kind == "text")
        # Only parts that follow a picture get a line of their own.
        assert "".join(PLACEHOLDER.sub("", turn.text).split()) == "".join(written.split())
        if all(kind == "text" for kind, _ in pieces):
            assert turn.text == written
    shown = [(kind, f"/media/{path}") for _, pieces in turns for kind, path in pieces if kind != "text"]
    assert [(item.kind, item.path) for item in record.media] == sorted(shown, key=lambda pair: pair[0] == "video")
    assert load_record(dump_record(record)) == record
    assert record.id == str(sample.get("id", "f.json:1"))


def texts_of(sample: dict[str, Any]) -> list[str]:
    """The texts of turns that are texts."""
    found = next((sample[key] for key in ("conversations", "messages", "conversation") if sample.get(key)), [])
    turns = found if isinstance(found, list) else []
    values = [turn.get("value") if turn.get("value") is not None else turn.get("content") for turn in turns]
    return [value for value in values if isinstance(value, str)]


@cases(offline=1200, in_ci=120)
@given(loose_samples)
def test_a_sample_is_refused_by_name_or_read_as_it_stands(sample):
    kept = copy.deepcopy(sample)
    record = attempt(parse, sample)
    assert repr(sample) == repr(kept)
    if isinstance(record, ValueError):
        assert names(record, SOURCE)
        return
    assert repr(attempt(parse, sample)) == repr(record)
    assert load_record(dump_record(record)) == record
    kinds = placeholder_kinds(" ".join(turn.text for turn in record.turns))
    assert sorted(kinds) == sorted(item.kind for item in record.media)
    assert all(item.path.startswith("/media/") or item.root for item in record.media)
    assert all(0 <= number <= 1 for numbers in vars(record.coordinates).values() for number in numbers)
    written = texts_of(sample)
    if "<image>" not in "".join(written):  # It may be the family's word for a video.
        assert all(any(text in turn.text for turn in record.turns) for text in written)
    assert count_parts(record)[:3] == (kinds.count("image"), kinds.count("video"), len(record.turns))
    for turn in record.turns:
        turn.text.encode()


# Whole files.


def same(value: object) -> object:
    """A value that equals that of the same JSON; NaN equals nothing."""
    return "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)


def drain(samples) -> tuple[list[object], str]:
    """What comes, and what an error says in the end."""
    found = []

    def read() -> None:
        found.extend((same(str(item) if isinstance(item, ValueError) else item), place) for item, place in samples)

    end = attempt(read)
    return found, str(end or "")


def agree(one: tuple[list[object], str], other: tuple[list[object], str]) -> bool:
    """Whether the same came; before an error one may have come further."""
    common = min(len(one[0]), len(other[0]))
    return one == other or (bool(one[1]) and one[1] == other[1] and one[0][:common] == other[0][:common])


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and the bytes of a data file, whole or damaged."""
    suffix = draw(st.sampled_from((".json", ".jsonl", ".txt", ".txt.gz")))
    if suffix.startswith(".txt"):
        lines = draw(st.lists(any_texts.map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=6))
        content = b"\n".join(lines)
        content = gzip.compress(content, mtime=0) if suffix == ".txt.gz" else content
    else:
        sample = st.one_of(conversations().flatmap(spelled), loose_samples)
        samples = draw(st.lists(sample, max_size=4))
        ascii_only = draw(st.booleans())
        texts = [json.dumps(sample, ensure_ascii=ascii_only) for sample in samples]
        space = draw(st.sampled_from(("", " ", "\n", "\r\n", "\t\n ")))
        text = f"{space}\n".join(texts) if suffix == ".jsonl" else f"{space}[{f'{space},{space}'.join(texts)}]{space}"
        content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        content = b"\xef\xbb\xbf" + content
    if draw(st.booleans()):
        content = draw(damaged(content))
    return f"d{suffix}", content


_TWICE = "an object that has a key twice"


def parse_strictly(content: bytes) -> object:
    """The value of JSON, in which objects that have a key twice are ``_TWICE``; None where it is none."""
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else _TWICE,
        )
    except (ValueError, RecursionError):
        return None


def is_read(item: object, value: object) -> bool:
    """Whether a sample is what JSON says; one that has a key twice is an error in its place."""
    return "twice in one place" in str(item) if _TWICE in repr(value) else item == same(value)


@cases(offline=900, in_ci=40)
@example(("d.json", b"[0.5, 1e3]"), 1)  # a window that ends behind a point made two numbers of one
@example(("d.json", b"\xef\xbb\xbf\x80[]"), 1)  # behind a byte order mark bytes were counted from the mark
@example(("d.txt", b"\xef\xbb"), 1)
@example(("d.json", b'[{"a": 1, "image": "b", "image": "c"}]'), 1)  # the last of equal keys was taken without a word
@example(("d.jsonl", b'{"a": {"b": 1, "b": 2}}\n{"a": 1}'), 3)
@given(files(), st.sampled_from((1, 3, 7, 64, 1 << 22)))
def test_files_are_read_alike_as_a_whole_in_pieces_and_in_blocks(tmp_path_factory, file, size):
    name, content = file
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    whole = drain(read_samples(str(path), keep_errors=True))
    with mock.patch.object(raw_samples, "_BYTES_AT_ONCE", size):
        assert agree(drain(read_samples(str(path), keep_errors=True)), whole)
    with mock.patch.object(raw_samples, "_BLOCK_BYTES", size), mock.patch.object(raw_samples, "_MOST_PIECES", 2):
        blocks = read_blocks(str(path))
        assert agree(drain(pair for block in blocks for pair in read_block(str(path), block)), whole)
    found, error = whole
    assert not error or str(path) in error
    if name == "d.json":
        value = parse_strictly(content)
        if isinstance(value, list):
            assert not error
            assert [place for _, place in found] == [f"d.json, sample {i}" for i in range(1, len(value) + 1)]
            assert all(is_read(item, written) for (item, _), written in zip(found, value, strict=True))
        else:
            assert error
    elif name == "d.jsonl":
        lines = [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        assert [place for _, place in found] == [f"d.jsonl, line {i}" for i, _ in lines]
        for (item, _), (_, line) in zip(found, lines, strict=True):
            value = parse_strictly(line)
            assert is_read(item, value) or (value is None and "d.jsonl, line" in str(item))
    elif name == "d.txt" and not error:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            return
        lines = [line.removeprefix("\ufeff").strip() for line in text.split("\n")]
        assert [item for item, _ in found] == [same(PlainText(line)) for line in lines if line]


@cases(offline=500, in_ci=25)
@example([("d.json", b"[]"), ("d.jsonl", b"{}")])  # a file without samples beside another
@given(st.lists(files(), min_size=1, max_size=2))
def test_an_index_gives_the_records_of_a_fresh_read(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("data")
    paths = []
    for number, (name, content) in enumerate(contents):
        paths.append(folder / f"{number}{name}")
        paths[-1].write_bytes(content)
    options: dict[str, Any] = {"on_bad_sample": "skip", "image_folder": "", "video_folder": ""}
    fresh = attempt(read_records, list(map(str, paths)), **options)
    cached = [
        attempt(read_records, list(map(str, paths)), cache_dir=str(folder / "cache"), **options) for _ in range(2)
    ]
    if isinstance(fresh, ValueError):
        assert names(fresh, *map(str, paths))
        assert [str(error) for error in cached] == [str(fresh)] * 2
        return
    for again in cached:
        assert list(again) == list(fresh)
        assert again.faults == fresh.faults
        assert again.fingerprint == cached[0].fingerprint
        for column in ("num_words", "num_turns", "num_images", "text_bytes"):
            assert again.numbers(column).tolist() == fresh.numbers(column).tolist()
    strict = attempt(read_records, list(map(str, paths)), image_folder="", video_folder="")
    assert isinstance(strict, ValueError) == bool(fresh.faults)
    if fresh.faults:
        assert any(path.name in str(strict) for path in paths)


@cases(offline=300, in_ci=15)
@given(
    st.lists(free_texts.filter(str.strip), min_size=1, max_size=5), st.sampled_from((".parquet", ".arrow")), st.data()
)
def test_a_table_says_what_lines_say(tmp_path_factory, texts, suffix, data):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("table")
    samples = [
        {
            "id": str(i), "image": f"{i}.png" if i % 2 else None,
            "conversations": [{"from": "human", "value": "<image>" * (i % 2)}, {"from": "gpt", "value": text}],
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip
    table = pa.Table.from_pylist(samples)
    path = folder / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    lines = folder / "t.jsonl"
    lines.write_text("\n".join(map(json.dumps, samples)))
    records, plain = (list(read_records(str(file))) for file in (path, lines))
    assert [(r.id, r.turns, r.media) for r in records] == [(r.id, r.turns, r.media) for r in plain]
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = attempt(read_records, str(path), on_bad_sample="skip")
    if isinstance(found, ValueError):
        assert names(found, str(path))


def test_a_table_whose_names_are_no_text_is_named(tmp_path):
    import pyarrow as pa

    table = pa.table({"conversations": [["a"]]})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    damage = (tmp_path / "t.arrow").read_bytes().replace(b"conversations", b"\x80onversations")
    (tmp_path / "t.arrow").write_bytes(damage)
    with pytest.raises(ValueError, match=r"t\.arrow: cannot be read as arrow"):
        read_records(str(tmp_path / "t.arrow"))


@pytest.fixture(autouse=True)
def few_cores(monkeypatch):
    """No processes for files of a few bytes, whatever the machine."""
    monkeypatch.setattr("llava.data.records.num_cores", lambda: 1)
