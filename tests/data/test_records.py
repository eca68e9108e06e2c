"""Data files: what is read, and the one clear error for each thing that can be wrong with them."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest

from llava.data import raw_samples
from llava.data.index import RecordStore
from llava.data.raw_samples import read_samples
from llava.data.records import parse_record, read_records
from llava.types import Media, Record, Turn

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
TEXT = [{"from": "human", "value": ""}, {"from": "gpt", "value": "un gatto"}]


def write(folder: Path, content, name: str = "data.json") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def read_one(folder: Path, sample) -> Record:
    return read_records(write(folder, [sample]))[0]


def test_both_spellings_of_a_conversation(tmp_path):
    family = [{"from": "human", "value": "chi è?"}, {"from": "gpt", "value": "un gatto"}]
    chat = [{"role": "user", "content": "chi è?"}, {"role": "assistant", "content": "un gatto"}]
    first, second = read_records(
        write(tmp_path, [{"id": "a", "conversations": family}, {"id": "b", "conversations": chat}])
    )
    assert first.turns == second.turns == (Turn("user", "chi è?"), Turn("assistant", "un gatto"))
    assert first.media == ()
    assert first.split is None


def test_numeric_id_becomes_a_string(tmp_path):
    assert [read_one(tmp_path, {"id": n, "conversations": TEXT}).id for n in (0, 17, "x")] == ["0", "17", "x"]


def test_json_lines_with_blank_lines_windows_ends_and_byte_order_mark(tmp_path):
    lines = [json.dumps({"id": n, "conversations": TEXT}).encode() for n in range(3)]
    path = write(tmp_path, b"\xef\xbb\xbf" + lines[0] + b"\r\n\n   \n" + lines[1] + b"\n" + lines[2], "data.jsonl")
    records = read_records(path)
    assert [record.id for record in records] == ["0", "1", "2"]
    assert [record.source for record in records] == ["data.jsonl, line 1", "data.jsonl, line 4", "data.jsonl, line 5"]


def test_json_lines_end_with_newlines_only(tmp_path):
    text = "prima\u2028dopo\u0085fine"
    sample = {"id": 1, "conversations": [{"from": "gpt", "value": text}]}
    path = write(tmp_path, json.dumps(sample, ensure_ascii=False).encode(), "data.jsonl")
    assert read_records(path)[0].turns[0].text == text


def test_relative_paths_start_from_their_data_file_or_the_given_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    home = str(tmp_path / "sub")
    conversation = [{"from": "human", "value": "<image> <video> <image>"}]
    sample = {"id": 1, "image": ["a.png", f"{home}/b.png"], "video": "c.mp4", "conversations": conversation}
    path = write(tmp_path / "sub", [sample])
    images = (Media("image", f"{home}/a.png", len(home)), Media("image", f"{home}/b.png", len(home)))
    assert read_records(path)[0].media == (*images, Media("video", f"{home}/c.mp4", len(home)))
    monkeypatch.chdir(tmp_path)
    clips = f"{tmp_path}/clips"
    assert read_records("sub/data.json", video_folder="clips")[0].media == (
        *images, Media("video", f"{clips}/c.mp4", len(clips)),
    )  # fmt: skip


def test_several_files_are_joined_in_order(tmp_path):
    first = write(tmp_path, [{"id": 1, "conversations": TEXT}], "a.json")
    second = write(tmp_path, json.dumps({"id": 2, "conversations": TEXT}).encode(), "b.jsonl")
    assert [record.id for record in read_records([second, first])] == ["2", "1"]


def test_split_empty_media_and_unknown_keys(tmp_path):
    sample = {
        "id": 1, "video": "a.mp4", "image": [], "meta": {"split": [3, 9], "fps": 8}, "variables": {"x": []},
        "source": "webvid", "conversations": [{"from": "human", "value": "<video>"}],
    }  # fmt: skip
    assert read_one(tmp_path, sample).split == (3, 9)


def conversation(text: str, **changes) -> dict:
    return {"id": "s7", "conversations": [{"from": "gpt", "value": text}], **changes}


MALFORMED = {
    "no object": (["x"], "expected an object, found list"),
    "float id": ({"id": 1.0, "conversations": TEXT}, '"id" is 1.0, a number with a point; write 1, or "1.0" in quotes'),
    "no number": ({"id": float("nan"), "conversations": TEXT}, 'needs an "id".* found nan'),
    "endless id": ({"id": 10**2000, "conversations": TEXT}, '"id" has 2001 characters'),
    "boolean id": ({"id": True, "conversations": TEXT}, 'needs an "id"'),
    "empty id": ({"id": "", "conversations": TEXT}, 'needs an "id"'),
    "no conversations": ({"id": "s7"}, 'needs "conversations"'),
    "empty conversations": ({"id": "s7", "conversations": []}, 'needs "conversations"'),
    "text for conversations": ({"id": "s7", "conversations": "ciao"}, 'needs "conversations"'),
    "text for a turn": ({"id": "s7", "conversations": ["ciao"]}, "turn 1: expected an object"),
    "no role": ({"id": "s7", "conversations": [{"value": "x"}]}, "turn 1: unknown role None"),
    "unknown role": ({"id": "s7", "conversations": [*TEXT, {"from": "bot", "value": "x"}]}, "turn 3: unknown role"),
    "list for a role": ({"id": "s7", "conversations": [{"from": [], "value": "x"}]}, r"unknown role \[\]"),
    "no value": ({"id": "s7", "conversations": [{"from": "gpt"}]}, '"value" must be a string, found null'),
    "number for a value": (conversation(5), "must be a string, found int"),
    "reserved token": (conversation("ecco <vid_patch>"), "'<vid_patch>', a name kept for visual tokens"),
    "half a character": (conversation("ciao \ud83d"), "half a character"),
    "number for an image": (conversation("<image>", image=3), '"image" must be a path'),
    "empty path": (conversation("<video>", video=""), "1 <video>, but the sample has 0 video files"),
    "object in a list": (conversation("<image>", image=[{}]), '"image" must be a path'),
    "no placeholder": (conversation("ciao", image="a.png"), "0 <image>, but the sample has 1 image file;"),
    "no media": (conversation("<video>"), "1 <video>, but the sample has 0 video files"),
    "too many placeholders": (conversation("<image> <image>", image="a.png"), "2 <image>"),
    "wrong kind": (conversation("<video>", image="a.png"), "0 <image>, but the sample has 1 image file"),
    "split of one": (conversation("<video>", video="a", meta={"split": [3]}), '"meta.split" must be'),
    "split backwards": (conversation("<video>", video="a", meta={"split": [3, 2]}), '"meta.split" must be'),
    "negative split": (conversation("<video>", video="a", meta={"split": [-1, 2]}), '"meta.split" must be'),
    "split of floats": (conversation("<video>", video="a", meta={"split": [0.5, 2]}), '"meta.split" must be'),
    "split of two": (conversation("<video> <video>", video=["a", "b"], meta={"split": [0, 2]}), "2 videos"),
    "list for meta": (conversation("ciao", meta=[1]), '"meta" must be an object'),
    "list for variables": (conversation("ciao", variables=[1]), '"variables" must be an object'),
    "coordinates": (conversation("ciao", variables={"temporal_input_locations": [0.5]}), "text has 0 <TEMP-INPUT>"),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_sample_is_one_error_naming_file_and_sample(tmp_path, case, suffix):
    sample, message = MALFORMED[case]
    good = {"id": "good", "conversations": TEXT}
    content = [good, sample] if suffix == "json" else b"\n".join(json.dumps(s).encode() for s in (good, sample))
    path = write(tmp_path, content, f"data.{suffix}")
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path)
    assert f"data.{suffix}, {'sample' if suffix == 'json' else 'line'} 2" in str(caught.value)
    if isinstance(sample, dict) and sample.get("id") == "s7":
        assert "sample 's7'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "a.json: the file is empty"),
        ("a.json", b"[]", "a.json: no samples"),
        ("a.jsonl", b"", "a.jsonl: no samples"),
        ("a.jsonl", b"\n \n", "a.jsonl: no samples"),
        ("a.json", b"[{]", "a.json: not JSON"),
        ("a.jsonl", b"\n{'id': 1}", "a.jsonl, line 2: not JSON"),
        ("a.json", b'{"id": 1}', "a.json: expected a list of samples, found dict; use .jsonl"),
        ("a.json", b'[{"id": "caff\xe8"}]', "a.json: not UTF-8"),
        ("a.jsonl", b'\n\n{"id": "caff\xe8"}', "a.jsonl, line 3: not UTF-8"),
        ("a.json", b"[" * 100_000, "a.json: not a sample"),
        ("a.csv", b"id", "unknown kind of file '.csv'; known: .json, .jsonl"),
    ],
)
def test_file_that_is_no_data_file(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path, content, name))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"--data_path .*none.json: no such file"):
        read_records(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="is a folder without a corpus in it"):
        read_records(str(tmp_path))


def test_store_gives_back_what_was_stored(tmp_path):
    records = [
        Record(
            str(i),
            (Turn("user", "<video>\u2028è"), Turn("assistant", "ok")),
            (Media("video", "/a.mp4"),),
            f"line {i}",
            (i, i + 1) if i % 2 else None,
        )
        for i in range(5)
    ]
    store = RecordStore.write(records)
    assert list(store) == records == [store[i] for i in range(5)]
    assert store[-1] == records[-1]
    assert store[1:4] == records[1:4]
    with pytest.raises(IndexError):
        store[5]
    with pytest.raises(IndexError):
        store[-6]


def test_store_travels_to_a_worker_as_the_name_of_its_file(tmp_path):
    records = [Record(str(i), (Turn("user", "ciao " * 50),)) for i in range(2000)]
    store = RecordStore.write(records, tmp_path / "a.arrow")
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[1234] == records[1234] == pickle.loads(pickle.dumps(RecordStore.write(records)))[1234]


def test_real_files(shared_data):
    videos = read_records(str(shared_data / "real_video_it.json"))
    images = read_records(str(shared_data / "real_image_it.json"))
    assert (len(videos), len(images)) == (16, 80)
    assert {file.kind for record in videos for file in record.media} == {"video"}
    assert all(Path(file.path).is_file() for record in [*videos, *images] for file in record.media)


def documented(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("language", ["json", "jsonl"])
def test_examples_of_the_document_are_valid(tmp_path, language):
    blocks = documented(language)
    assert blocks
    for block in blocks:
        path = write(tmp_path, block.encode(), f"example.{language}")
        assert len(read_records(path)) == len(list(read_samples(path)))


def test_errors_of_the_document_are_the_real_ones():
    rows = re.findall(r"^\| `(\{.*\})` \| `(.*)` \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 4
    for sample, message in rows:
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_record(json.loads(sample), "captions.json, sample 1", "", "")


def test_a_sample_without_an_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("llava.data.raw_samples.LONGEST_SAMPLE", 200)
    monkeypatch.setattr("llava.data.raw_samples._BYTES_AT_ONCE", 50)
    good = json.dumps({"id": 1, "conversations": TEXT})
    long = json.dumps({"id": 2, "conversations": [{"from": "gpt", "value": "a" * 1000}]})
    lines = write(tmp_path, "\n".join([good, long, good.replace("1", "3", 1)]).encode(), "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: longer than 200 bytes; a sample is one line"):
        read_records(lines)
    found = read_records(lines, on_bad_sample="skip")
    assert [(record.id, bool(record.fault)) for record in found] == [("1", False), ("", True), ("3", False)]
    (tmp_path / "open.json").write_text('[{"id": "' + "a" * 100_000)
    read = _count_reads(monkeypatch)
    with pytest.raises(ValueError, match=r"open\.json: not JSON: line 1: Unterminated string"):
        read_records(str(tmp_path / "open.json"))
    assert sum(read) < 1000


def _count_reads(monkeypatch) -> list[int]:
    """The characters of each piece of a ``.json`` file that is read from now on."""
    sizes: list[int] = []
    decode = raw_samples._decode_chunks

    def watch(path):
        for chunk in decode(path):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(raw_samples, "_decode_chunks", watch)
    return sizes
