"""Copies of media on a local disk: made once, believed while their files are as they were, and never in the way."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

from llava.config import VisionConfig
from llava.data import staging
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.data.staging import StagedMedia, list_files, stage_files
from llava.io import lock_file
from llava.types import BadSampleError, Media


@pytest.fixture
def data(mixed_data: Path, tmp_path: Path) -> Path:
    """A data file of its own, beside its media."""
    folder = tmp_path / "far"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "a.png", "b.jpg", "mixed.json"):
        shutil.copy(mixed_data.parent / name, folder)
    return folder / "mixed.json"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are copied, in any order."""
    paths: list[str] = []
    copy = staging._Copier._copy

    def note(self: staging._Copier, path: str, stamp: staging.Stamp) -> dict[str, object] | None:
        paths.append(path)
        return copy(self, path, stamp)

    monkeypatch.setattr(staging._Copier, "_copy", note)
    staging._said.clear()
    return paths


def stage(data: Path, local: Path, timeout: float = 5, run: str = "") -> StagedMedia:
    return stage_files(list_files([read_records(str(data))]), str(local), timeout, run or uuid.uuid4().hex)


def dataset_of(data: Path, tokenizer, staged: StagedMedia | None, **settings) -> SupervisedDataset:
    vision = VisionConfig("tower", {"model_type": "dinov2"}, 8, image_size=56, patches_per_side=4, num_frames=2)
    return SupervisedDataset(read_records(str(data)), tokenizer, vision, 512, staged=staged, **settings)


def test_samples_come_from_the_copies_and_are_the_same(data: Path, local: Path, visual_tokenizer, copied) -> None:
    before = [dataset_of(data, visual_tokenizer, None)[i] for i in range(7)]
    staged = stage(data, local)
    assert sorted(Path(path).name for path in copied) == ["a.mp4", "a.png", "b.jpg", "b.mp4"], "each file once"
    for name in ("a.mp4", "b.mp4", "a.png", "b.jpg"):
        (data.parent / name).unlink()
    after = [dataset_of(data, visual_tokenizer, staged)[i] for i in range(7)]
    for one, other in zip(before, after, strict=True):
        assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(one.media, other.media, strict=True))
    assert local.stat().st_mode & 0o777 == 0o700


def test_the_next_run_takes_what_is_unchanged_and_copies_the_rest(data: Path, local: Path, copied) -> None:
    staged = stage(data, local)
    copied.clear()
    stage(data, local)
    assert copied == []
    # Another file of the same size and time, which only the time of its last change of status tells.
    changed = data.parent / "a.png"
    status = changed.stat()
    changed.write_bytes(bytes(status.st_size))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    stage(data, local)
    assert copied == [str(changed)]
    assert Path(staged.place(str(changed))).read_bytes() == bytes(status.st_size)


def test_a_damaged_copy_is_made_anew(data: Path, local: Path, copied) -> None:
    staged = stage(data, local)
    first, second = (Path(staged.place(str(data.parent / name))) for name in ("a.mp4", "a.png"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(bytes(second.stat().st_size))  # As a crash leaves it: right in length, and all zeros.
    copied.clear()
    stage(data, local)
    assert sorted(Path(path).name for path in copied) == ["a.mp4", "a.png"]
    # A line of the index that was half written, and copies of which nothing is said.
    (local / "staged.jsonl").write_bytes(b'{"name": "x", "sta')
    copied.clear()
    stage(data, local)
    assert len(copied) == 4
    assert all(json.loads(line) for line in (local / "staged.jsonl").read_text().splitlines())


def test_what_no_checksum_sees_whole_is_on_the_disk_before_it_has_its_name(
    data: Path, local: Path, copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (data.parent / "a.mp4").open("ab") as clip:
        clip.write(bytes(200 << 10))
    synced, fsync = list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), fsync(file)))
    stage(data, local)
    assert synced == [(data.parent / "a.mp4").stat().st_size]


def test_a_copy_that_breaks_during_a_run_is_no_bad_sample(
    data: Path, local: Path, visual_tokenizer, copied, caplog: pytest.LogCaptureFixture
) -> None:
    staged = stage(data, local)
    dataset = dataset_of(data, visual_tokenizer, staged)
    expected = dataset[2].media[0].frames
    copy = Path(staged.place(str(data.parent / "a.png")))
    copy.write_bytes(b"no picture")
    assert torch.equal(dataset[2].media[0].frames, expected)
    assert "the copy of" in caplog.text
    assert not copy.exists(), "it is not read again"
    assert torch.equal(dataset[2].media[0].frames, expected)
    assert f"a.png has no copy in {local}, and is read where it lies" in caplog.text


def test_a_bad_file_is_bad_under_its_own_name(data: Path, local: Path, visual_tokenizer, copied) -> None:
    (data.parent / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadSampleError) as without:
        dataset_of(data, visual_tokenizer, None)[2]
    with pytest.raises(BadSampleError) as with_copies:
        dataset_of(data, visual_tokenizer, stage(data, local))[2]
    assert str(with_copies.value) == str(without.value)


def test_what_cannot_be_copied_is_read_where_it_lies(
    data: Path, local: Path, copied, caplog: pytest.LogCaptureFixture
) -> None:
    staged = stage(data, local)
    (data.parent / "b.jpg").unlink()
    (data.parent / "a.png").unlink()
    (data.parent / "a.png").symlink_to(shutil.copy(data.parent / "b.mp4", local.parent))  # Out of its folder.
    stage(data, local)
    assert "2 files are read where they lie" in caplog.text
    for name in ("b.jpg", "a.png"):  # What it was before must not be read in its place.
        assert not Path(staged.place(str(data.parent / name))).exists()


def test_what_is_the_name_of_no_file_is_a_bad_sample_as_ever(data: Path, local: Path, visual_tokenizer, copied) -> None:
    samples = json.loads(data.read_text())
    for sample, name in zip([one for one in samples if "image" in one], ("\ud800.png", "a\0.png"), strict=False):
        sample["image"] = name
    data.write_text(json.dumps(samples))
    staged = stage(data, local)
    datasets = [dataset_of(data, visual_tokenizer, one, on_bad_sample="skip") for one in (None, staged)]
    bad = [[reason for i in range(7) if (reason := getattr(one[i], "reason", ""))] for one in datasets]
    assert bad[0] == bad[1]
    assert len(bad[0]) == 2


def test_a_clip_that_is_tried_twice_is_waited_for_twice(
    data: Path, local: Path, visual_tokenizer, copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[float] = []
    monkeypatch.setattr(
        "llava.progress.note", lambda phase, samples=None, *, patience=0.0, event=False: said.append(patience)
    )
    for staged in (None, stage(data, local)):
        samples = dataset_of(data, visual_tokenizer, staged, decode_timeout=60.0)
        for kind in ("video", "image"):  # An image has no limit of its own, and so no longer one.
            samples[next(i for i in range(7) if [media.kind for media in samples.records[i].media] == [kind])]
    assert said == [70, 0, 140, 0]


def test_a_file_that_changes_while_it_is_copied_is_left(
    data: Path, local: Path, copied, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = staging._Copier._copy_bytes

    def change(self: staging._Copier, source, target) -> None:
        copy(self, source, target)
        if source.name.endswith("a.png"):
            with (data.parent / "a.png").open("ab") as file:
                file.write(b"more")

    monkeypatch.setattr(staging._Copier, "_copy_bytes", change)
    staged = stage(data, local)
    assert "1 files are read where they lie" in caplog.text
    assert not Path(staged.place(str(data.parent / "a.png"))).exists()


def test_frames_of_a_clip_are_copied_one_by_one(data: Path, local: Path, copied) -> None:
    frames = tuple(str(data.parent / name) for name in ("a.png", "b.jpg"))
    clip = Media("video", frames[0], len(str(data.parent)), frames, 2.0)

    class Record:
        media = (clip,)

    staged = stage_files(list_files([[Record()]]), str(local), 5, "r")  # type: ignore[list-item]
    found = staged.locate(clip)
    assert sorted(copied) == sorted(frames)
    assert found.frames == tuple(map(staged.place, frames))
    assert (found.path, found.root, found.fps) == (found.frames[0], 0, 2.0)


@pytest.mark.parametrize("mistake", ["space", "full", "file", "other"])
def test_a_disk_that_cannot_take_them_is_one_line(
    data: Path, local: Path, copied, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    expected = f"--stage_media {local}: "
    if mistake == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 8e9, 1e6))
        expected += "0.00 GB are to be copied, and its disk has 0.00 GB free"
    elif mistake == "full":

        def fail(self: staging._Copier, source, target) -> None:
            target.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(staging._Copier, "_copy_bytes", fail)
        expected += "[Errno 28] No space left on device; give another folder, or leave the flag out"
    elif mistake == "file":
        local.write_text("")
        expected += "cannot be used: "
    else:
        local.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        expected += "belongs to another user; give a folder of your own"
    with pytest.raises(ValueError, match="--stage_media") as error:
        stage(data, local)
    assert str(error.value).startswith(expected)
    assert [path for path in local.rglob("*.*") if path.suffix != ".jsonl" and path.suffix != ".json"] == []


def test_one_process_copies_and_the_others_wait(data: Path, local: Path, copied) -> None:
    threads = [threading.Thread(target=stage, args=(data, local, 5, "r")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copied) == 4
    # One that comes later does not look again at what the same run has copied; the next run does.
    (data.parent / "a.png").write_bytes(b"another")
    stage(data, local, run="r")
    assert len(copied) == 4
    stage(data, local, run="s")
    assert len(copied) == 5


def test_who_waits_for_one_that_gets_no_further_says_so(
    data: Path, local: Path, copied, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(staging, "_PAUSE", 0.02)
    monkeypatch.setattr(staging, "_SECONDS_BETWEEN_LINES", 0.05)
    local.mkdir(mode=0o700)
    with (local / "lock").open("ab") as lock:
        lock_file(lock, wait=False)
        staging._write_progress(local, "w", said="copying: 3 of 9 files, 0.10 GB copied")
        with pytest.raises(ValueError, match=r"has its lock and has copied nothing for 0.3 s \(copying: 3 of 9 files"):
            stage(data, local, timeout=0.3)
        assert "waiting for process" in caplog.text

        def move() -> None:
            for number in range(8):
                time.sleep(0.1)
                staging._write_progress(local, "w", said=f"copying: {number} of 9 files")
            lock.close()

        mover = threading.Thread(target=move)
        mover.start()
        stage(data, local, timeout=0.5)  # It moves, and so it is waited for.
        mover.join()
    assert len(copied) == 4
