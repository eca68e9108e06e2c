"""The index on disk: written once, read by everybody, made anew when it is stale or damaged."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ITALIAN, turns

from llava.data import cache as index_folder
from llava.data import dataset_stats, index, raw_samples, records
from llava.data.cache import DamagedFileError, read_footer
from llava.data.dataset import SupervisedDataset, check_samples, find_unsupervised
from llava.data.formats import build_format
from llava.data.index import Mixture, RecordStore
from llava.data.raw_samples import iterate_list
from llava.data.records import read_records
from llava.types import Record, Turn


def write(path: Path, texts=ITALIAN, **extra) -> str:
    path.write_text(json.dumps([{"id": i, "conversations": turns("", t), **extra} for i, t in enumerate(texts)]))
    return str(path)


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "data.json")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The places of the samples that were parsed, as it goes."""
    seen: list[str] = []
    parse = records.parse_record
    monkeypatch.setattr(records, "parse_record", lambda *args, **kw: (seen.append(args[1]), parse(*args, **kw))[1])
    return seen


def test_a_second_start_does_not_parse_again(data, cache, parsed):
    first = list(read_records(data, cache_dir=str(cache)))
    assert len(parsed) == 5
    assert list(read_records(data, cache_dir=str(cache))) == first == list(read_records(data))
    assert len(parsed) == 10  # The five of the reading without an index.


def test_the_index_depends_on_what_changes_records(data, cache, parsed):
    for options in ({}, {"video_folder": "/v"}, {"image_folder": "/v"}, {}):
        read_records(data, cache_dir=str(cache), **options)
    assert len(parsed) == 15
    assert len(list(cache.glob("data-*.arrow"))) == 3


@pytest.mark.parametrize("change", ["size", "same size and time"])
def test_a_stale_index_is_made_anew_with_a_message(tmp_path, data, cache, parsed, caplog, change):
    read_records(data, cache_dir=str(cache))
    before = os.stat(data)  # noqa: PTH116
    texts = ITALIAN[:2] if change == "size" else [ITALIAN[0].swapcase(), *ITALIAN[1:]]
    write(tmp_path / "data.json", texts)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(data).st_size == before.st_size) == (change != "size")  # noqa: PTH116
    with caplog.at_level(logging.WARNING):
        found = read_records(data, cache_dir=str(cache))
    assert [record.turns[-1].text for record in found] == texts
    assert "data.json has changed" in caplog.text
    assert len(parsed) == 5 + len(found)
    assert len(list(cache.glob("*.arrow"))) == 1


def test_a_file_that_was_only_touched_is_not_parsed_again(data, cache, parsed):
    read_records(data, cache_dir=str(cache))
    os.utime(data, ns=(1, 1))
    read_records(data, cache_dir=str(cache))
    assert len(parsed) == 5


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")
@pytest.mark.parametrize("whose", ["the folder", "the index"])
def test_nothing_is_taken_from_another_user(data, cache, parsed, caplog, monkeypatch, whose):
    read_records(data, cache_dir=str(cache))
    (path,) = cache.glob("*.arrow")
    theirs = cache if whose == "the folder" else path
    is_own, inode = index_folder._is_own, theirs.stat().st_ino
    owners = {theirs.stat().st_uid + 1}
    original = Path.lstat if whose == "the index" else Path.stat

    def look(self, *args, **kwargs):
        status = original(self, *args, **kwargs)
        return os.stat_result((*status[:4], *owners, *status[5:])) if status.st_ino == inode else status

    monkeypatch.setattr(Path, original.__name__, look)
    assert not is_own(*owners)
    if whose == "the folder":
        with pytest.raises(ValueError, match=r"cache: the folder of indexes belongs to another user .*data_cache_dir"):
            read_records(data, cache_dir=str(cache))
        assert len(parsed) == 5
    else:
        read_records(data, cache_dir=str(cache))
        assert "it belongs to another user" in caplog.text
        assert len(parsed) == 10


@pytest.mark.parametrize("kind", ["lock", "index"])
def test_links_in_the_folder_are_not_followed(tmp_path, data, cache, caplog, kind):
    expected = list(read_records(data, cache_dir=str(cache)))
    (path,) = cache.glob("*.arrow")
    target = tmp_path / "precious"
    target.write_bytes(path.read_bytes() if kind == "index" else b"a thesis")
    before = target.read_bytes()
    path.unlink()
    link = path if kind == "index" else path.with_name(path.name + ".lock")
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    if kind == "lock":
        with pytest.raises(ValueError, match=r"the index cannot be written: its lock .*\.lock is a link; remove it"):
            read_records(data, cache_dir=str(cache))
    else:
        assert list(read_records(data, cache_dir=str(cache))) == expected
        assert "it is a link" in caplog.text
        assert not link.is_symlink()
    assert target.read_bytes() == before


def test_a_link_that_comes_at_the_last_moment_is_not_followed(tmp_path, data, cache, monkeypatch):
    read_records(data, cache_dir=str(cache))
    (path,) = cache.glob("*.arrow")
    (tmp_path / "precious").write_bytes(b"a thesis")
    path.unlink()
    lock = path.with_name(path.name + ".lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(ValueError, match="the index cannot be written"):
        read_records(data, cache_dir=str(cache))
    assert (tmp_path / "precious").read_bytes() == b"a thesis"


def test_a_pipe_in_the_place_of_the_lock_does_not_hang(data, cache):
    read_records(data, cache_dir=str(cache))
    (path,) = cache.glob("*.arrow")
    path.unlink()
    lock = path.with_name(path.name + ".lock")
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(ValueError, match="the index cannot be written"):
        read_records(data, cache_dir=str(cache))


def test_without_the_modules_of_unix(data, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert len(read_records(data, cache_dir=str(cache))) == 5
    assert len(list(cache.glob("*.arrow"))) == 1


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES = {
    "empty": (lambda b: b"", "cut off"),
    "short": (lambda b: b[:10], "cut off"),
    "half": (lambda b: b[: len(b) // 2], "cut off"),
    "no last byte": (lambda b: b[:-1], "cut off"),
    "something behind": (lambda b: b + b"x", "cut off"),
    "flipped bit": (lambda b: flip(b, len(b) // 3), "checksum"),
    "first bit": (lambda b: flip(b, 0), "checksum"),
    "hole": (lambda b: b[:100] + b[200:], "length is wrong"),
    "footer": (lambda b: b[:-30] + b"\xff" + b[-29:], "end is damaged"),
    "a number in the footer": (lambda b: b.replace(b'"repeated": {}', b'"repeated": []'), "end is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_anew_with_a_message(data, cache, parsed, caplog, damage):
    expected = list(read_records(data, cache_dir=str(cache)))
    (path,) = cache.glob("*.arrow")
    harm, message = DAMAGES[damage]
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=message):
        read_footer(path, index.VERSION, {})
    with caplog.at_level(logging.WARNING):
        assert list(read_records(data, cache_dir=str(cache))) == expected
    assert message in caplog.text
    assert len(parsed) == 10


def test_an_index_of_another_version_is_not_read(data, cache, monkeypatch):
    read_records(data, cache_dir=str(cache))
    (path,) = cache.glob("*.arrow")
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    with pytest.raises(DamagedFileError, match="another version of llava wrote it"):
        read_footer(path, index.VERSION, {})


def test_a_mistake_leaves_no_index(tmp_path, cache):
    path = write(tmp_path / "bad.json", image="a.png")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"sample '0' \(bad\.json, sample 1\)"):
            read_records(path, cache_dir=str(cache))
    assert {file.suffix for file in cache.iterdir()} == {".lock"}


def test_a_file_that_grows_while_it_is_read(data, cache, monkeypatch):
    parse = records.parse_record

    def meanwhile(*args, **kwargs):
        with open(data, "a") as file:  # noqa: PTH123
            file.write(" ")
        return parse(*args, **kwargs)

    monkeypatch.setattr(records, "parse_record", meanwhile)
    with pytest.raises(ValueError, match="changed while it was read"):
        read_records(data, cache_dir=str(cache))
    assert list(cache.glob("*.arrow*")) == list(cache.glob("*.lock"))


def test_a_folder_that_cannot_be_written(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the index cannot be written: .*--data_cache_dir"):
        read_records(data, cache_dir=str(tmp_path / "file" / "cache"))


def test_what_a_killed_process_left_is_taken_away(data, cache):
    read_records(data, cache_dir=str(cache))
    (path,) = cache.glob("*.arrow")
    path.unlink()
    path.with_name(path.name + ".0123.part").write_text("half an index")
    (cache / "another.arrow.0123.part").write_text("somebody else's, at work")
    read_records(data, cache_dir=str(cache))
    assert [file.name for file in cache.glob("*.part")] == ["another.arrow.0123.part"]


def read_slowly(data: str, cache: str, barrier, results, locks: bool) -> None:
    """In a process of its own: read when everybody is there, report what was parsed and read."""
    parsed = []
    parse = records.parse_record
    records.parse_record = lambda *args, **kwargs: (parsed.append(args[1]), parse(*args, **kwargs))[1]
    if not locks:
        index_folder.lock_file = no_locks
    barrier.wait(60)
    found = read_records(data, cache_dir=cache)
    results.put((len(parsed), [record.id for record in found]))


def no_locks(*args, **kwargs) -> bool:
    """As ``lock_file`` where a file system has no locks."""
    return False


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_start_at_once(tmp_path, cache, locks):
    data = write(tmp_path / "data.json", [f"testo {i}" for i in range(3000)])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=read_slowly, args=(data, str(cache), barrier, results, locks)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(names == [str(i) for i in range(3000)] for _, names in found)
    if locks:
        assert sorted(count for count, _ in found) == [0, 0, 3000]
    assert len(list(cache.glob("*.arrow"))) == 1
    assert list(cache.glob("*.part")) == []


def test_numbers_of_all_records(tmp_path, cache):
    path = tmp_path / "data.json"
    talk = turns("<image> <image> <video>", "è")
    path.write_text(json.dumps([
        {"id": 1, "conversations": turns("", "ciao")},
        {"id": 2, "image": ["a", "b"], "video": "c", "conversations": talk},
    ]))  # fmt: skip
    for options in ({}, {"cache_dir": str(cache)}):
        mixture = read_records([str(path), str(path)], **options)
        assert mixture.numbers("num_images").tolist() == [0, 2, 0, 2]
        assert mixture.numbers("num_videos").tolist() == [0, 1, 0, 1]
        assert mixture.numbers("num_turns").tolist() == [2, 2, 2, 2]
        assert mixture.numbers("text_bytes").tolist() == [4, 25, 4, 25]


def test_a_mixture_travels_to_a_worker_as_the_names_of_its_files(data, cache):
    mixture = read_records([data, data], cache_dir=str(cache))
    pickled = pickle.dumps(mixture)
    assert len(pickled) < 3000
    assert ITALIAN[0].encode() not in pickled
    assert list(pickle.loads(pickled)) == list(mixture)


def test_positions_of_a_mixture(tmp_path):
    paths = [write(tmp_path / f"{name}.json", ITALIAN[:n]) for name, n in (("a", 2), ("b", 1), ("c", 3))]
    mixture = read_records(paths)
    everything = list(mixture)
    assert len(mixture) == len(everything) == 6
    assert [mixture[i] for i in range(-6, 6)] == everything * 2
    assert mixture[1:4] == everything[1:4]
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            mixture[beyond]
    assert mixture[np.int64(3)] == everything[3]


def repeat_ids(path: Path) -> str:
    samples = [{"id": name, "conversations": turns("", "ciao")} for name in ("x", "y", "x", "z", "x")]
    path.write_text("\n\n".join(map(json.dumps, samples)))
    return str(path)


@pytest.mark.parametrize("indexed", [True, False])
def test_an_id_that_is_there_twice(tmp_path, cache, indexed):
    path = repeat_ids(tmp_path / "a.jsonl")
    options = {"cache_dir": str(cache)} if indexed else {}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^sample 'x' \(a\.jsonl, line 5\): a\.jsonl, line 1 has the same id"):
            read_records(path, **options)
    skipping = read_records(path, **options, on_bad_sample="skip")
    assert sorted(skipping.faults) == [2, 4]
    assert [record.fault is None for record in skipping] == [True, True, False, True, False]
    assert not any(r.fault for r in read_records(path, **options, allow_duplicate_ids=True))


def test_the_same_id_in_two_files_is_no_mistake(tmp_path):
    paths = [write(tmp_path / name) for name in ("a.json", "b.json")]
    assert len(read_records([*paths, paths[0]])) == 15


def test_equal_hashes_are_not_yet_equal_ids(monkeypatch):
    import builtins

    monkeypatch.setattr(index, "hash", lambda text: len(text), raising=False)
    assert builtins.hash("a") != 1
    store = RecordStore.write([Record(name, (Turn("user", "x"),)) for name in ("a", "b", "cc", "a", "b", "dd")])
    assert store.footer.repeated == {3: 0, 4: 1}


@pytest.mark.parametrize("indexed", [True, False])
def test_bad_samples_keep_their_places_when_they_are_skipped(tmp_path, cache, indexed, visual_tokenizer):
    good = {"id": "good", "conversations": turns("", "ciao")}
    lines = [json.dumps(good), "{", json.dumps({"id": "mute"}), "[]", json.dumps(good | {"id": "last"}), '"\xff']
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    options = {"cache_dir": str(cache)} if indexed else {}
    for _ in range(2):
        mixture = read_records(str(path), **options, on_bad_sample="skip")
        assert [record.id for record in mixture] == ["good", "", "mute", "", "last", ""]
        assert sorted(mixture.faults) == [1, 2, 3, 5]
        for row, message in ((1, "not JSON"), (2, 'needs "conversations"'), (3, "found list"), (5, "not UTF-8")):
            assert message in str(mixture[row].fault)
            assert mixture[row].source == f"a.jsonl, line {row + 1}"
        dataset = SupervisedDataset(mixture, visual_tokenizer, None, 64, on_bad_sample="skip")
        check_samples(dataset)
        assert [type(dataset[i]).__name__ == "Example" for i in range(6)] == [True, False, False, False, True, False]
        assert (dataset.lengths > 0).tolist() == [True, False, False, False, True, False]
        assert (dataset[2].id, dataset[2].source) == ("mute", "a.jsonl, line 3")
        assert dataset[2].reason.startswith('needs "conversations"')
        with pytest.raises(ValueError, match="line 2: not JSON"):
            read_records(str(path), **options)


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, text, *args, **kwargs):
        self.texts += len(text) if isinstance(text, list) else 1
        return self.tokenizer(text, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_lengths_are_counted_once_and_then_mapped(data, cache, visual_tokenizer, monkeypatch):
    monkeypatch.setattr(dataset_stats, "_RECORDS_AT_ONCE", 2)
    counted = []
    for limit in (64, 64, 32):
        tokenizer = Counting(visual_tokenizer)
        dataset = SupervisedDataset(read_records(data, cache_dir=str(cache)), tokenizer, None, limit)
        counted.append((dataset.lengths.tolist(), tokenizer.texts))
        assert isinstance(dataset.lengths, np.memmap)
    expected = [len(dataset.tokenize(record)[0]) for record in dataset.records]
    assert [lengths for lengths, _ in counted] == [expected] * 3
    assert [texts for _, texts in counted] == [1 + 5, 1, 1]  # Each format asks once what begins a text.
    (path,) = cache.glob("lengths-*.npy")
    content = path.read_bytes()
    for damaged in (content[:100], flip(content, 130), b""):
        path.write_bytes(damaged)
        again = SupervisedDataset(read_records(data, cache_dir=str(cache)), visual_tokenizer, None, 64)
        assert again.lengths.tolist() == expected


def test_lengths_of_other_data_formats_and_tokenizers_are_others(data, cache, visual_tokenizer, tokenizer, tmp_path):
    other = write(tmp_path / "other.json", ITALIAN[:2])
    for path, words, version in (
        (data, visual_tokenizer, "plain_lm"), (data, tokenizer, "plain_lm"), (data, visual_tokenizer, "v1"),
        (data, visual_tokenizer, "llama_2"), (other, visual_tokenizer, "plain_lm"),
    ):  # fmt: skip
        mixture = read_records(path, cache_dir=str(cache))
        dataset = SupervisedDataset(mixture, words, None, 512, text_format=build_format(version, words))
        assert dataset.lengths.tolist() == [len(dataset.tokenize(record)[0]) for record in mixture]
    assert len(list(cache.glob("lengths-*.npy"))) == 5


def test_checking_supervision_tokenises_only_what_may_be_too_long(tmp_path, cache, visual_tokenizer):
    samples = [{"id": i, "conversations": turns("ciao " * n, "sì")} for i, n in enumerate((1, 1, 200, 1, 10))]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    fmt = build_format("v1", visual_tokenizer)
    tokenised: list[str] = []

    def build(limit: int) -> SupervisedDataset:
        mixture = read_records(str(tmp_path / "a.json"), cache_dir=str(cache))
        dataset = SupervisedDataset(mixture, visual_tokenizer, None, limit, text_format=fmt)
        count = dataset.count_tokens
        dataset.count_tokens = lambda some: (tokenised.extend(record.id for record in some), count(some))[1]
        return dataset

    longest = int(build(5000).lengths.max())
    tokenised.clear()
    assert (dataset_stats.count_cut_tokens(build(5000)) > 0).tolist() == [False] * 5
    assert tokenised == []
    for limit, too_long in ((longest, False), (longest - 1, True)):
        assert (dataset_stats.count_cut_tokens(build(limit)) > 0).tolist() == [False, False, too_long, False, False]
        assert tokenised == ["2"]
        tokenised.clear()
    with pytest.raises(ValueError, match=r"sample '2' \(a\.json, sample 3\): it needs"):
        check_samples(build(longest - 4))
    tokenised.clear()
    assert (dataset_stats.count_cut_tokens(build(longest - 4)) > 0).tolist() == [False, False, True, False, False]
    assert tokenised == []


def test_targets_are_looked_for_once(tmp_path, cache, visual_tokenizer, monkeypatch):
    path = write(tmp_path / "a.json", ["ciao", "", "ciao"])
    for _ in range(2):
        dataset = SupervisedDataset(read_records(path, cache_dir=str(cache)), visual_tokenizer, None, 64)
        assert [record.id for record in find_unsupervised(dataset)] == ["1"]
        monkeypatch.setattr(dataset.text_format.__class__, "has_target", lambda *args: pytest.fail("asked again"))


def test_fingerprints_tell_mixtures_apart(tmp_path, data, cache):
    options = {"cache_dir": str(cache)}
    once, twice = read_records(data, **options), read_records([data, data], **options)
    assert once.fingerprint == read_records(data, **options).fingerprint
    parts = {once.fingerprint, twice.fingerprint}
    for strategy in ("first:2", "end:2", "random:2"):
        (tmp_path / "m.yaml").write_text(f"datasets: [{{json_path: data.json, sampling_strategy: '{strategy}'}}]")
        parts.add(read_records(str(tmp_path / "m.yaml"), **options).fingerprint)
    assert len(parts) == 5
    assert isinstance(once, Mixture)


LISTS = [
    "[]", " [ ] ", "[1]", "[1, 22, 333]", '[{"a": "]["}, null,\n true, "x\\"y", -1.5e3 , [[]] ]', '["è€\U0001f600"]',
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("text", LISTS)
def test_lists_in_windows_of_any_size(tmp_path, monkeypatch, size, text):
    monkeypatch.setattr(raw_samples, "_BYTES_AT_ONCE", size)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(iterate_list(tmp_path / "a.json")) == json.loads(text)


BROKEN_LISTS = {
    "[1,\n2": r"line 2: expected '\]' or ','",
    "[1\n2]": r"line 2: expected '\]' or ','",
    "[1,\n\n]": "line 3: Expecting value",
    "[1,": "the file ends where a sample should stand",
    '["a': "line 1: Unterminated string",
    '[{"a": 1},\n{"b" 2}]': "line 2: Expecting ':' delimiter",
    "[1]\n[2]": "line 2: something stands behind the end",
    "{": "line 1: Expecting property name",
    "  \n": "the file is empty",
    "3": "expected a list of samples, found int",
}


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
@pytest.mark.parametrize("text", BROKEN_LISTS)
def test_broken_lists_name_the_line(tmp_path, monkeypatch, size, text):
    monkeypatch.setattr(raw_samples, "_BYTES_AT_ONCE", size)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=BROKEN_LISTS[text]):
        list(iterate_list(tmp_path / "a.json"))


@pytest.mark.parametrize("size", [1, 2, 1 << 20])
@pytest.mark.parametrize(("content", "position"), [(b'["ab\xe8"]', 4), (b'["\xc3\xa8\xe8"]', 4), (b'["\xc3', 2)])
def test_the_byte_that_is_no_utf8(tmp_path, monkeypatch, size, content, position):
    monkeypatch.setattr(raw_samples, "_BYTES_AT_ONCE", size)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"not UTF-8 \(byte {position}\)"):
        list(iterate_list(tmp_path / "a.json"))
