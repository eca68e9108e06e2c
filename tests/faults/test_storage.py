"""Storage that fails under a run: reads that are tried again, writes that end it in one line, and nothing that is lost.

A small library in C stands before the C library's calls in the processes of these runs (``faulty_disk.c``), and fails
them as it is told to: in Python's own code, in decoders, and where torch and safetensors write.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ITALIAN, turns
from runs import ForkServer, losses, trained_on

from llava.train.bad_samples import BAD_SAMPLES_FILE
from llava.train.checkpoint import find_damage, list_checkpoints
from llava.train.run_lock import LOCK

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
        folder: Path, *rules: str, texts: bool = False, hook: str = "shorten_pauses", **changes: object
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
        hooks = {"environment": {"FAULTY_DISK": "\n".join(rules)}, "call": ["storage_hooks", hook, {}]}
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
    "name": (rule("rename", "/out/checkpoint-2", errno.ESTALE), "The network disk has lost the folder"),
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
