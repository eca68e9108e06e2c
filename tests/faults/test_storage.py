"""Storage that fails under a run: reads that are tried again, writes that end it in one line, and nothing that is lost.

A small library in C stands before the C library's calls in the processes of these runs (``faulty_disk.c``), and fails
them as it is told to: in Python's own code, in decoders, and where torch and safetensors write.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ITALIAN, turns
from runs import ForkServer, losses, trained_on

from llava import storage
from llava.data import decoding
from llava.data.dataset import SupervisedDataset
from llava.data.decoding import FrameRequest
from llava.data.feature_cache.cache import FeatureCache
from llava.data.feature_cache.shards import DamagedShardError, Kept
from llava.data.feature_cache.storage import Storage
from llava.data.media_files import MediaError
from llava.data.records import read_records
from llava.train.arguments import DataArguments
from llava.train.bad_samples import BAD_SAMPLES_FILE
from llava.train.checkpoint import find_damage, list_checkpoints
from llava.train.command_line import answer_at_once
from llava.train.loader_workers import explaining_ends
from llava.train.run_lock import LOCK, check_lock, release_lock, take_lock
from llava.train.saving import CheckpointWriter
from llava.train.train import main
from llava.types import BadSample, Example, FeatureEntry

ALWAYS = "1|999|0"


def rule(call: str, path: str, number: int, when: str = ALWAYS) -> str:
    return f"{call}|{path}|{number}|{when}"


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler (gcc or cc)")
    library = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def server(faulty_disk: Path) -> Iterator[ForkServer]:
    server = ForkServer(LD_PRELOAD=str(faulty_disk))
    yield server
    server.close()


@pytest.fixture(scope="module")
def start(server: ForkServer, gpt2_dir: Path, tower_dir: Path, media_dir: Path, tmp_path_factory):
    """A function that runs with faults and tells its folder, its exit status and the lines that it said."""
    data = tmp_path_factory.mktemp("data") / "data.json"
    kinds = [("<video>", {"video": "a.mp4"}), ("<image>", {"image": "a.png"}), ("", {})]
    samples = [
        {"id": f"s{i}", "conversations": turns(kinds[i % 3][0], ITALIAN[i % 5]), **kinds[i % 3][1]} for i in range(6)
    ]
    data.write_text(json.dumps(samples))
    data.with_name("texts.json").write_text(json.dumps([samples[2], samples[5]]))

    def run(
        folder: Path,
        *rules: str,
        texts: bool = False,
        hook: str = "shorten_pauses",
        clock: bool = False,
        **changes: object,
    ) -> tuple[Path, int, list[str]]:
        seeing = {"vision_tower": tower_dir, "mm_resampler_type": "spatial_pool", "num_frames": 2}
        values = {
            "model_name_or_path": gpt2_dir, "data_path": data.with_name("texts.json") if texts else data,
            "image_folder": media_dir, "video_folder": media_dir, "output_dir": folder / "out",
            "data_cache_dir": folder / "cache", "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 2,
            "logging_steps": 1, "report_to": "none", "use_cpu": "true", "disable_tqdm": "true",
            **({} if texts else seeing), **changes,
        }  # fmt: skip
        line = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        environment = {"FAULTY_DISK": "\n".join(rules)} | ({"FAULTY_CLOCK": "1"} if clock else {})
        hooks = {"environment": environment, "call": ["storage_hooks", hook, {}]}
        status = server.run(line, folder, **hooks)
        return folder / "out", status, (folder / "said").read_text().splitlines()

    return run


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, status, said = start(tmp_path_factory.mktemp("undisturbed"))
    assert status == 0, said
    return output


def find_error(said: list[str]) -> str:
    """The one line of error; there is no traceback beside it."""
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert not any("Traceback" in line for line in said)
    return errors[0]


def test_reads_that_fail_for_a_while_change_nothing(start, undisturbed: Path, tmp_path: Path) -> None:
    """Data file, index, image and clip fail once or twice, and reads of the clip take their time."""
    output, status, said = start(
        tmp_path,
        rule("read", "/data.json", errno.EIO, "1|1|0"),
        rule("open", "/cache/data-", errno.EIO, "2|3|0"),
        rule("open", "/a.png", errno.ESTALE, "1|2|0"),
        rule("stat", "/a.png", errno.ESTALE, "1|1|0"),
        rule("read", "/a.mp4", errno.EIO, "1|1|0"),
        rule("read", "/a.mp4", 0, "2|4|100"),
        dataloader_num_workers=1,
    )
    assert status == 0, said
    for name in ("data.json: Input/output error", "a.png: Stale file handle", "a.mp4: Input/output error"):
        assert any(name in line and "tried again" in line for line in said), name
    assert trained_on(tmp_path) == trained_on(undisturbed.parent)
    assert losses(output) == losses(undisturbed)
    assert not (output / BAD_SAMPLES_FILE).exists()


@pytest.mark.parametrize(("call", "name", "number"), [("read", "a.png", errno.ESTALE), ("read", "a.mp4", errno.EIO)])
def test_reads_that_fail_for_good_are_no_bad_samples(start, tmp_path: Path, call: str, name: str, number: int) -> None:
    output, status, said = start(tmp_path, rule(call, f"/{name}", number), on_bad_sample="skip")
    assert status == 2
    error = find_error(said)
    assert f"/{name}: " in error
    assert "tried 5 times" in error
    assert "--resume_from_checkpoint auto" in error
    assert not (output / BAD_SAMPLES_FILE).exists()
    assert all(find_damage(folder) is None for folder in list_checkpoints(output))
    assert not (output / LOCK).exists()


WRITES = {
    "exposure": (rule("write", "/exposure.jsonl", errno.ENOSPC, "2|9|0"), "exposure.jsonl: No space left on device"),
    "optimizer": (rule("write", "/checkpoint-2/optimizer", errno.ESTALE), "or the disk may fail"),
    "sync": (rule("sync", "/checkpoint-2/config.json", errno.EIO), "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRITES)
def test_writes_that_fail_leave_the_last_checkpoint_whole(start, tmp_path: Path, fault: str) -> None:
    broken, said_of_it = WRITES[fault]
    output, status, said = start(tmp_path, broken, texts=True)
    assert status == 2
    error = find_error(said)
    assert said_of_it in error
    assert "checkpoint-1 is unharmed" in error
    assert "--resume_from_checkpoint auto" in error
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1"]
    assert find_damage(output / "checkpoint-1") is None
    assert not list(output.glob("tmp-*"))


@pytest.mark.parametrize(
    ("fault", "flag"),
    [
        (rule("create", "/cache/", errno.EROFS), "--data_cache_dir"),
        (rule("create", "/out/run.lock", errno.EROFS), "--output_dir"),
    ],
)
def test_read_only_folders(start, tmp_path: Path, fault: str, flag: str) -> None:
    _, status, said = start(tmp_path, fault, texts=True)
    assert status == 2
    error = find_error(said)
    assert "Read-only file system" in error
    assert flag in error
    assert "give another folder" in error


def test_a_report_that_cannot_be_written_ends_no_run(start, tmp_path: Path) -> None:
    _, status, said = start(tmp_path, rule("write", "/run_starts.jsonl", errno.ENOSPC), texts=True, max_steps=1)
    assert status == 0
    assert any("run_starts.jsonl: No space left on device" in line and "the run goes on" in line for line in said)


def test_no_folder_for_temporary_files_ends_the_run(start, tmp_path: Path) -> None:
    """Batches travel through a socket there: one that cannot was dropped, and waited for without an end."""
    _, status, said = start(
        tmp_path, texts=True, dataloader_num_workers=1, hang_timeout=60, hook="lose_temporary_folder"
    )
    assert status == 2
    assert "DataLoader worker" in find_error(said)
    assert any("TMPDIR" in line and "/no/such/folder" in line for line in said)


def test_no_folder_for_temporary_files_at_the_start(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def find_none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", find_none)
    assert answer_at_once(["--max_steps", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: No usable temporary directory found in ['/tmp']; give TMPDIR")


def test_a_user_without_a_home_has_a_folder_for_indexes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # As where nothing tells whose process this is.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = DataArguments(data_path=["data.json"])
    assert arguments.data_cache_dir == str(tmp_path / f"llava-user-{os.getuid()}" / "llava-babylm")


def test_a_folder_that_another_run_has_taken_is_left_to_it(gpt2_dir, mixed_data, tmp_path, monkeypatch) -> None:
    """Somebody has removed the lock, and another run has begun there: the first one writes no more checkpoints."""
    output, write = tmp_path / "out", CheckpointWriter.write_checkpoint
    (tmp_path / "texts.json").write_text(json.dumps([{"id": "a", "conversations": turns("", ITALIAN[0])}]))

    def robbed(self: CheckpointWriter) -> None:
        if self.trainer.state.global_step == 2:
            content = json.loads((output / LOCK).read_text())
            (output / LOCK).write_text(json.dumps(content | {"host": "another-node", "token": "theirs"}))
        write(self)

    monkeypatch.setattr(CheckpointWriter, "write_checkpoint", robbed)
    values = {
        "model_name_or_path": gpt2_dir, "data_path": tmp_path / "texts.json", "output_dir": output, "max_steps": 3,
        "save_steps": 1, "report_to": "none", "use_cpu": "true", "disable_tqdm": "true",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"was taken by another run \(process .* on another-node"):
        main([word for name, value in values.items() for word in (f"--{name}", str(value))])
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1"]
    assert json.loads((output / LOCK).read_text())["token"] == "theirs"


def test_a_lock_that_was_removed_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_lock(tmp_path)
    assert not (tmp_path / LOCK).exists()
    take_lock(tmp_path)
    content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).unlink()
    check_lock(tmp_path)
    assert (tmp_path / LOCK).read_text() == content
    assert "was removed while this run writes" in caplog.text
    release_lock(tmp_path)
    assert not list(tmp_path.iterdir())


class Sleeper:
    """Stands for a decoder process that gives no answer."""

    pid = 1

    def __init__(self) -> None:
        self.stdin, self.stdout = io.BytesIO(), os.fdopen(os.pipe()[0], "rb")
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def wait(self, patience: float) -> int:
        raise subprocess.TimeoutExpired("python", patience)  # No signal ends what waits for a disk.


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_disk_that_hangs_is_no_fault_of_the_clip(monkeypatch: pytest.MonkeyPatch, on_disk: bool) -> None:
    process = object.__new__(decoding.DecoderProcess)
    process._process = sleeper = Sleeper()
    process._requests, process._replies = sleeper.stdin, sleeper.stdout
    monkeypatch.setattr(decoding, "_waits_for_a_disk", lambda pid: on_disk)
    with pytest.raises(MediaError, match="longer than --decode_timeout") as caught:
        process.decode(FrameRequest("clip.mp4", 2), 0.05)
    assert sleeper.killed
    cause = storage.find_cause(caught.value)
    assert (cause is not None) == on_disk
    assert cause is None or (cause.errno, cause.filename) == (errno.ETIMEDOUT, "clip.mp4")


def test_a_folder_of_media_that_is_gone_is_no_bad_sample(
    load_tiny, media_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    folder = tmp_path / "media"
    folder.mkdir()
    shutil.copy(media_dir / "a.png", folder)
    samples = [{"id": str(i), "image": "a.png", "conversations": turns("<image>", ITALIAN[i])} for i in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    records = read_records(str(tmp_path / "data.json"), image_folder=str(folder), on_bad_sample="skip")
    loaded = load_tiny()
    dataset = SupervisedDataset(records, loaded.tokenizer, loaded.vision, 512, on_bad_sample="skip")
    assert isinstance(dataset[0], Example)
    (folder / "a.png").rename(folder / "b.png")
    assert isinstance(dataset[0], BadSample)  # The file alone.
    shutil.rmtree(folder)
    with pytest.raises(storage.StorageError, match="the folder of media is gone, or empty; is its disk mounted"):
        dataset[0]


def test_a_worker_sends_its_storage_error_whole() -> None:
    """torch makes the error of a worker anew, from its type and a text with a traceback."""
    text = "Caught StorageError in DataLoader worker process 0.\nTraceback\nllava.storage.StorageError: a.png: gone\n"
    assert str(storage.StorageError(text)) == "a.png: gone"


def test_features_on_a_disk_that_fails_are_not_called_damaged(tmp_path: Path, monkeypatch, caplog) -> None:
    entry = FeatureEntry("key", "context", "image", (4, 4), (0.0,), 0.0)
    cache = FeatureCache(tmp_path, Storage("fp32"))
    cache.add("one", [Kept.of(entry, torch.ones(1, 4, 8), cache.storage)], {"context": {}})
    cache = FeatureCache(tmp_path)
    stat, fail = Path.stat, [True]

    def stale(self: Path, **more: bool) -> os.stat_result:
        if self.suffix == ".safetensors" and fail:
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return stat(self, **more)

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(DamagedShardError, match="Stale file handle") as caught:
        cache.read("key")
    assert storage.find_cause(caught.value) is not None
    fail.clear()
    assert cache.read("key") is not None
    assert "damaged" not in caplog.text


def test_a_checkpoint_that_cannot_be_read_is_not_skipped(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Taken for damaged, it would send the run back to an older one, without a word that anybody reads."""
    from llava.train import checkpoint

    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    hash_file, broken = checkpoint.hash_file, [1, 2]

    def fail(path: Path) -> str:
        if broken and "checkpoint-3" in str(path) and path.name == "model.safetensors":
            broken.pop()
            raise OSError(errno.EIO, "Input/output error", str(path))
        return hash_file(path)

    monkeypatch.setattr(checkpoint, "hash_file", fail)
    with pytest.raises(storage.StorageError, match=r"checkpoint-3/model.safetensors: Input/output error \(tried 2"):
        checkpoint.choose_checkpoint("auto", undisturbed)
    broken.append(1)
    assert checkpoint.choose_checkpoint("auto", undisturbed) == str(undisturbed / "checkpoint-3")
    assert "skipping" not in caplog.text


@pytest.mark.parametrize(("signal", "why"), [("Bus error", "mapped"), ("Killed", "memory"), ("", "stands before this")])
def test_what_ended_a_loading_process_is_said(signal: str, why: str) -> None:
    def load() -> Iterator[int]:
        yield 1
        said = f"is killed by signal: {signal}. It is possible that" if signal else "exited unexpectedly"
        raise RuntimeError(f"DataLoader worker (pid 7) {said}")

    batches = explaining_ends(load())
    assert next(batches) == 1
    with pytest.raises(ValueError, match=rf"^DataLoader worker \(pid 7\) .*{why}.*--resume_from_checkpoint auto$"):
        next(batches)
    with pytest.raises(RuntimeError, match="something else"):
        next(explaining_ends(iter_error()))


def iter_error() -> Iterator[int]:
    raise RuntimeError("something else")
    yield 1


def test_a_clock_that_jumps_changes_nothing(start, undisturbed: Path, tmp_path: Path) -> None:
    """By days, to and fro, each time that anybody asks."""
    output, status, said = start(tmp_path, clock=True, save_total_limit=2)
    assert status == 0, said
    assert trained_on(tmp_path) == trained_on(undisturbed.parent)
    assert losses(output) == losses(undisturbed)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2", "checkpoint-3"]
    assert not (output / LOCK).exists()
