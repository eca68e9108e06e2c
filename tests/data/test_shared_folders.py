"""Folders that others can write to: what they put there is not believed, not followed and not waited for."""

from __future__ import annotations

import json
import logging
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ITALIAN, turns

from llava.data.cache import append_footer, open_array, own_folder
from llava.data.feature_cache.cache import FeatureCache
from llava.data.feature_cache.digests import Digests
from llava.data.feature_cache.shards import Kept, write_shard
from llava.data.feature_cache.storage import Storage
from llava.data.records import read_records
from llava.io import hash_json
from llava.types import FeatureEntry

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")

STRANGER = 65534


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Let a file, a folder or a link belong to another user, as far as a look at it tells."""
    owners: dict[int, int] = {}

    def looking(original: Callable[..., os.stat_result]) -> Callable[..., SimpleNamespace]:
        def look(path: Path, **options: bool) -> SimpleNamespace:
            status = original(path, **options)
            known = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
            return SimpleNamespace(**known | {"st_uid": owners.get(status.st_ino, status.st_uid)})

        return look

    for name in ("stat", "lstat"):
        monkeypatch.setattr(Path, name, looking(getattr(Path, name)))
    return lambda path, owner: owners.update({path.lstat().st_ino: owner})


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.json"
    samples = [{"id": i, "conversations": turns("", text)} for i, text in enumerate(ITALIAN)]
    path.write_text(json.dumps(samples))
    return str(path)


def read(data: str, folder: Path) -> list[str]:
    return [record.turns[-1].text for record in read_records(data, cache_dir=str(folder))]


# The folder of indexes.


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_folder_that_others_can_write_to_has_one_of_this_user_s(data: str, tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    assert read(data, shared) == ITALIAN
    (own,) = shared.iterdir()
    assert own.name == f"of-user-{os.geteuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert list(own.glob("data-*.arrow"))


def test_a_folder_of_the_system_s_is_shared_and_one_of_a_stranger_s_is_not(tmp_path: Path, give, monkeypatch) -> None:
    user = os.geteuid() or 1000
    monkeypatch.setattr(os, "geteuid", lambda: user)
    folders = {}
    for name, owner, mode in (("system", 0, 0o1777), ("stranger", STRANGER, 0o1777), ("open", 0, 0o777)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        folders[name].chmod(mode)
        give(folders[name], owner)
    (folders["system"] / f"of-user-{os.geteuid()}").mkdir()
    give(folders["system"] / f"of-user-{os.geteuid()}", os.geteuid())
    assert own_folder(folders["system"]).parent == folders["system"]
    for name in ("stranger", "open"):
        with pytest.raises(ValueError, match=r"belongs to another user .*--data_cache_dir"):
            own_folder(folders[name])


@pytest.mark.parametrize("kind", ["a folder", "a link", "a link to nothing"])
def test_what_a_stranger_put_in_its_place_is_not_taken(data: str, tmp_path: Path, give, kind: str) -> None:
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    for folder in (shared, mine):
        folder.mkdir()
    shared.chmod(0o1777)
    trap = shared / f"of-user-{os.geteuid()}"
    if kind == "a folder":
        trap.mkdir()
    else:
        trap.symlink_to(mine if kind == "a link" else tmp_path / "nothing")
    give(trap, STRANGER)
    for place in (shared, trap):
        with pytest.raises(ValueError, match=f"belongs to another user .number {STRANGER}"):
            read(data, place)
    assert not list(mine.iterdir())


def rewrite(path: Path, change: Callable[[bytes, dict[str, Any]], object]) -> None:
    """Write an index anew, with a footer whose checksums are right."""
    content = path.read_bytes()
    length = int.from_bytes(content[-16:-8], "little")
    body, footer = content[: -20 - length], json.loads(content[-20 - length : -20])
    changed = change(body, footer)
    if isinstance(changed, bytes):  # Another stream.
        path.write_bytes(changed)
        append_footer(path, {name: value for name, value in footer.items() if name not in ("size", "checksum")})
        return
    text = changed.encode() if isinstance(changed, str) else json.dumps(changed).encode()
    end = zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(8, "little") + content[-8:]
    path.write_bytes(body + text + end)


def other_table(body: bytes, footer: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"record": ["x"]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


FORGED = {
    "a list": lambda body, footer: [],
    "nothing": lambda body, footer: {},
    "no JSON": lambda body, footer: "\u3042{",
    "brackets": lambda body, footer: "[" * 100_000,
    "a list of faults": lambda body, footer: footer | {"faults": [1]},
    "a fault of no row": lambda body, footer: footer | {"faults": {"x": "bad"}},
    "more keys": lambda body, footer: footer | {"more": 1},
    "a row beyond the last": lambda body, footer: footer | {"repeated": {"0": 77}},
    "another's origin": lambda body, footer: footer | {"origin": {"path": footer["origin"]["path"], "hash": "0"}},
    "no origin": lambda body, footer: {name: value for name, value in footer.items() if name != "origin"},
    "no table": lambda body, footer: b"no Arrow at all" * 10,
    "another table": other_table,
}


@pytest.mark.parametrize("forged", FORGED)
def test_an_index_with_right_checksums_and_wrong_content_is_made_anew(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, forged: str
) -> None:
    folder = tmp_path / "cache"
    assert read(data, folder) == ITALIAN
    (path,) = folder.glob("*.arrow")
    rewrite(path, FORGED[forged])
    with caplog.at_level(logging.WARNING):
        assert read(data, folder) == ITALIAN
    assert "is made anew: " in caplog.text
    caplog.clear()
    assert read(data, folder) == ITALIAN
    assert not caplog.text


def test_a_row_that_is_no_record_is_one_line_with_the_file(data: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    read(data, folder)
    (path,) = folder.glob("*.arrow")

    def spoil(body: bytes, footer: dict[str, Any]) -> bytes:
        table = pa.ipc.open_stream(pa.BufferReader(body)).read_all()
        column = pa.array(['{"x": 1}'] * len(table), pa.large_string())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.set_column(0, table.schema.field(0), column))
        return sink.getvalue().to_pybytes()

    rewrite(path, spoil)
    with pytest.raises(ValueError, match=r"\.arrow: row 1 is no record .*; remove the file, and it is made anew"):
        read(data, folder)


def test_numbers_of_another_name_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = tmp_path / "cache" / "lengths-1.npy", tmp_path / "cache" / "lengths-2.npy"
    open_array(first, 3, np.int32, lambda: np.array([1, 2, 3]))
    first.rename(second)
    assert open_array(second, 3, np.int32, lambda: np.array([7, 8, 9])).tolist() == [7, 8, 9]
    assert "is made anew: it is damaged" in caplog.text


# The folder of a feature cache, whose owner is trusted: whoever gives it means it.


def fill(folder: Path, name: str = "fill", key: str = "key") -> Path:
    cache = FeatureCache(folder, Storage("fp32"))
    entry = FeatureEntry(key, "c0", "video", (48, 64), (0.0, 1.0), 2.0)
    cache.add(name, [Kept.of(entry, torch.ones(2, 16, 8), Storage("fp32"))], {"c0": {"kind": "video"}})
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("kind", ["a file", "a link", "a pipe", "the settings"])
def test_features_of_a_third_user_are_not_read(tmp_path: Path, give, caplog, kind: str) -> None:
    folder = tmp_path / "features"
    path = fill(folder)
    if kind == "a file":
        give(path, STRANGER)
    elif kind == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        give(path, STRANGER)
    elif kind == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        give(folder / "cache.json", STRANGER)
        with pytest.raises(
            ValueError, match=r"--feature_cache .*cache\.json belongs to a user .*; give another folder"
        ):
            FeatureCache(folder)
        return
    assert "key" not in FeatureCache(folder)
    assert ("is no file" if kind == "a pipe" else "neither you nor the owner of its folder") in caplog.text
    # Of the folder's owner they are.
    if kind == "a file":
        give(folder, STRANGER)
        assert "key" in FeatureCache(folder)


def test_hashes_that_a_third_user_gives_files_are_not_believed(tmp_path: Path, give) -> None:
    folder, clip = tmp_path / "features" / "digests", tmp_path / "clip"
    folder.mkdir(parents=True)
    clip.write_bytes(b"a clip")
    os.utime(clip, (1, 1))
    status = clip.stat()
    signature = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    row = {"file": signature, "sha256": "f" * 64, "crc32": zlib.crc32(f"{signature} {'f' * 64}".encode())}
    (folder / "theirs.jsonl").write_text(json.dumps(row) + "\n")
    assert Digests(folder).of_file(str(clip)) == "f" * 64
    give(folder / "theirs.jsonl", STRANGER)
    assert Digests(folder).of_file(str(clip)) != "f" * 64


@pytest.mark.parametrize("what", ["entries", "context", "place", "dtype", "shape", "brackets"])
def test_a_shard_with_right_checksums_and_wrong_content_is_damaged(tmp_path: Path, caplog, what: str) -> None:
    path = fill(tmp_path / "features")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    about = json.loads(metadata["about"])
    if what == "entries":
        about["entries"] = ["key"]
    elif what == "context":
        about["entries"]["key"]["context"] = ["c0"]
    else:
        changes = {"place": {"data_offsets": [3, 1024]}, "dtype": {"dtype": "F99"}, "shape": {"shape": [10**9, 8]}}
        header["key"] |= changes.get(what, {})
    metadata = {"format": metadata["format"], "about": json.dumps(about)}
    text = json.dumps({"__metadata__": metadata | {"checksum": hash_json([metadata, header])}, **header}).encode()
    text = b"[" * 100_000 if what == "brackets" else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert FeatureCache(tmp_path / "features").read("key") is None
    assert "damaged; its features are computed anew" in caplog.text


def test_the_writer_of_a_shard_follows_no_link(tmp_path: Path) -> None:
    path = fill(tmp_path / "features")
    precious = tmp_path / "precious"
    precious.write_text("a thesis")
    path.unlink()
    path.symlink_to(precious)
    entry = FeatureEntry("key", "c0", "video", (48, 64), (0.0, 1.0), 2.0)
    write_shard(path, [Kept.of(entry, torch.ones(2, 16, 8), Storage("fp32"))], {"c0": {}})
    assert precious.read_text() == "a thesis"
    assert not path.is_symlink()
