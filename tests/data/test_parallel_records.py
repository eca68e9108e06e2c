"""Large data files, which several processes parse: the index, the errors and their order are those of one process."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llava.data import index, raw_samples, record_rows, records, spellings, worker_pool
from llava.data.decoding import DecoderProcess
from llava.data.records import read_records
from llava.data.worker_pool import map_blocks, serve
from llava.types import ERROR, SKIP


@pytest.fixture
def parallel(monkeypatch):
    """Switches between several processes with blocks of a few samples, and one process."""
    monkeypatch.setattr(raw_samples, "_BLOCK_BYTES", 600)
    monkeypatch.setattr(index, "RECORDS_AT_ONCE", 7)
    monkeypatch.setattr(record_rows, "RECORDS_AT_ONCE", 7)
    monkeypatch.setattr(records, "num_cores", lambda: 2)

    def switch(on: bool) -> None:
        monkeypatch.setattr(records, "_LONG_FILE", 0 if on else 1 << 60)

    switch(on=True)
    return switch


def make_sample(number: int) -> dict[str, object]:
    """One of many kinds, some of them bad."""
    text = ["un gatto è qui", "tre 🙂 <WIDTH-INPUT>", r"dice \<image> e basta", "«sì» " * 20][number % 4]
    turns = [{"from": "human", "value": "<image>\nChe c'è?"}, {"from": "gpt", "value": text}]
    sample = {"id": f"s{number}", "image": f"a/{number}.jpg", "conversations": turns}
    if number % 4 == 1:
        sample["variables"] = {"spatial_width_input_locations": [number / 100]}
    return sample | [
        {}, {"id": number}, {"id": None}, {"id": "s0"}, {"image": ["x.jpg"]}, {"image": ""}, {"image": "../x.jpg"},
        {"caption": "unread"}, {"conversations": []}, {"meta": {"split": [3, 4]}}, {"score": float("nan")},
        {"size": 10**40}, {"title": "\ud83d"}, {"video": "v.mp4"}, {"image": None, "video": "v.mp4"},
    ][number % 15]  # fmt: skip


def write(folder: Path, kind: str) -> Path:
    samples = [json.dumps(make_sample(number)) for number in range(60)]
    samples[31] = '{"id": "double", "id": "key", "conversations": [{"from": "gpt", "value": "uno"}]}'
    path = folder / f"data{kind}"
    if kind == ".json":
        path.write_text("[\n" + " ,\n\n".join(samples) + "\n]\n")
    elif kind == ".jsonl":
        samples[33] = '{"id": 1'
        path.write_bytes("\ufeff".encode() + b"\r\n".join(s.encode() for s in samples) + b"\n \n\n" + b'{"a": "\xff"}')
    else:
        lines = b"\n".join(b"riga %d <image> \xc3\xa8" % n if n % 9 else b" " for n in range(60)) + b"\n\xff\n"
        path.write_bytes(gzip.compress(lines) if kind == ".txt.gz" else lines)
    return path


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".txt.gz"])
def test_the_index_is_that_of_one_process_byte_for_byte(tmp_path, parallel, kind, monkeypatch):
    path = write(tmp_path, kind)
    found = {}
    for on in (True, False):
        parallel(on)
        cache = tmp_path / f"cache{on}"
        mixture = read_records(str(path), cache_dir=str(cache), on_bad_sample=SKIP)
        (file,) = cache.glob("*.arrow")
        found[on] = file.read_bytes(), list(mixture), records.describe_notes(mixture), mixture.faults
        if kind == ".json":
            in_memory = read_records(str(path), on_bad_sample=SKIP)
            assert (list(in_memory), in_memory.faults) == (found[on][1], found[on][3])
    assert found[True] == found[False]
    assert len(found[True][1]) > 50
    assert len(found[True][3]) >= (1 if kind == ".txt.gz" else 10)


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        (".json", '{"id": 7, "conversations": 3}', r"sample '7' \(data.json, sample 24\): needs \"conversations\""),
        (".json", '{"id": 7, "conv', r"data.json: not JSON: line 25: Invalid control character"),
        (".jsonl", '{"id": 7, "conversations": 3}', r"sample '7' \(data.jsonl, line 24\): needs \"conversations\""),
        (".jsonl", '{"id": 7', r"data.jsonl, line 24: not JSON: Expecting .* delimiter: line 2 column 1"),
    ],
)
def test_an_error_of_a_later_block_names_its_line_and_the_first_is_told(tmp_path, parallel, kind, bad, message):
    lines = [json.dumps(make_sample(60 * number)) for number in range(40)]
    lines[23], lines[24] = bad, "{'a'"  # The list breaks off in the block of the bad sample.
    path = tmp_path / f"data{kind}"
    path.write_text("[\n" + ",\n".join(lines) + "\n]" if kind == ".json" else "\n".join(lines))
    found = []
    for on in (True, False):
        parallel(on)
        with pytest.raises(ValueError, match=message) as error:
            read_records(str(path), cache_dir=str(tmp_path / "cache"), on_bad_sample=ERROR)
        found.append(str(error.value))
        assert not list((tmp_path / "cache").glob("*.arrow"))
    assert found[0] == found[1]


def test_a_file_that_changes_while_it_is_read(tmp_path, parallel, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(make_sample(60 * number)) + "\n" for number in range(40)))

    def meanwhile(name):
        yield from raw_samples.read_blocks(name)
        with path.open("a") as file:
            file.write("{}\n")

    monkeypatch.setattr(records, "read_blocks", meanwhile)
    with pytest.raises(ValueError, match=r"data.jsonl: it changed while it was read"):
        read_records(str(path), cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").glob("*.arrow"))


def test_bytes_of_media_stay_when_the_processes_are_gone(tmp_path, parallel):
    sample = make_sample(0) | {"image": "data:image/png;base64,aGFsbG8="}
    (tmp_path / "data.jsonl").write_text(json.dumps(sample))
    (record,) = read_records(str(tmp_path / "data.jsonl"))
    assert Path(record.media[0].path).read_bytes() == b"hallo"


def answer_oddly() -> None:
    def answer(block: bytes) -> bytes:
        if block == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        if block == b"bug":
            raise KeyError("nobody thought of this")
        if block == b"slow":
            time.sleep(0.2)
        print("a message that is no reply")
        return b"<" + block + b">"

    serve(lambda job: answer)


def test_blocks_are_answered_in_order_and_taken_as_they_are_needed():
    taken = []
    blocks = (taken.append(n) or (b"slow" if n == 0 else str(n).encode()) for n in range(50))
    answers = map_blocks(answer_oddly, b"job", blocks, 2, "data.json")
    assert [next(answers), next(answers)] == [b"<slow>", b"<1>"]
    assert len(taken) <= 7
    assert list(answers) == [f"<{n}>".encode() for n in range(2, 50)]


def test_what_python_prints_as_it_starts_is_no_reply(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('Welcome to the cluster.')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list(map_blocks(answer_oddly, b"job", iter([b"a", b"b"]), 1, "data.json")) == [b"<a>", b"<b>"]
    decoder = DecoderProcess()
    assert decoder.end(5.0) == 0


@pytest.mark.parametrize(
    ("block", "kind", "message"),
    [
        (b"die", ValueError, "data.json: one of the processes that read it was ended by signal 9; perhaps"),
        (b"bug", RuntimeError, "nobody thought of this"),
    ],
)
def test_a_process_that_ends_or_fails_is_told_and_no_process_is_left(monkeypatch, block, kind, message):
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(worker_pool.subprocess, "Popen", Noted)
    answers = map_blocks(answer_oddly, b"job", iter([b"a", block, *[b"b"] * 20]), 2, "data.json")
    assert next(answers) == b"<a>"
    assert [process.poll() for process in started] == [None, None] or block == b"die"
    with pytest.raises(kind, match=message):
        list(answers)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_the_usual_spelling_is_read_as_all_others_are(monkeypatch):
    rng = random.Random(0)
    texts = ["<image>\nuno", "due", "<video> e <image>", r"\<image>", "", "<video>", 3, None, ["a", {"type": "image"}]]
    media = [None, "", "a.jpg", "b.mp4", ["a.jpg"], [], {"path": "a.jpg"}, 5]
    plain = spellings._read_plain
    read_quickly = 0

    def look(sample):
        try:
            return spellings.read_raw(sample, "here")
        except ValueError as error:
            return str(error)

    for _ in range(8000):
        role, text = rng.choice([("from", "value"), ("role", "content"), ("from", "content")])
        turns = [
            {role: rng.choice(["human", "gpt", 4]), text: rng.choice(texts)} | ({"x": 1} if rng.random() < 0.05 else {})
            for _ in range(rng.randint(0, 3))
        ]
        sample = {rng.choice(["conversations"] * 9 + ["messages"]): turns}
        for key, chance in (("image", 0.4), ("video", 0.4), ("images", 0.03), ("frames", 0.1), ("score", 0.1)):
            if rng.random() < chance:
                sample[key] = rng.choice(media)
        quick = look(sample)
        read_quickly += plain(sample, [key for key in ("frames",) if sample.get(key)]) is not None
        with monkeypatch.context() as patch:
            patch.setattr(spellings, "_read_plain", lambda *_: None)
            assert look(sample) == quick, sample
    assert read_quickly > 300


def test_rows_are_written_as_json_would(tmp_path, parallel):
    parallel(on=False)
    mixture = read_records(str(write(tmp_path, ".jsonl")), on_bad_sample=SKIP)
    for record in mixture:
        row = record_rows.dump_record(record)
        assert json.dumps(json.loads(row)) == row
        assert record_rows.load_record(row).turns == record.turns
