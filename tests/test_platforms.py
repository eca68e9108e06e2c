"""Other systems than Linux on x86-64: what they lack is not needed to load the library, nor to train on one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava import io as system
from llava.train.throughput import peak_memory

ROOT = Path(__file__).parents[1]


def test_every_module_loads_and_trains_without_the_names_of_linux(
    gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path, warm_python: str
) -> None:
    samples = [sample for sample in json.loads(mixed_data.read_text()) if "video" in sample][:2]
    data = mixed_data.parent / "two_clips_elsewhere.json"
    data.write_text(json.dumps(samples))
    words = (
        f"--model_name_or_path {gpt2_dir} --vision_tower {tower_dir} --data_path {data} "
        f"--output_dir {tmp_path / 'out'} "
        "--mm_perceiver_latents 9 --mm_resampler_type spatial_pool --num_frames 3 --max_steps 2 --use_cpu true "
        "--per_device_train_batch_size 1 --report_to none --disable_tqdm true --decode_timeout 60 --save_steps 1"
    ).split()
    done = subprocess.run(
        [warm_python, str(ROOT / "tests" / "platforms.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert int(lines[0]) > 100, "the program no longer finds the library's modules"
    assert lines[-1] == "2"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_decoder_that_hangs_is_ended_where_pipes_cannot_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    import select

    from llava.data import decoding as decoder_process
    from llava.data import worker_pool
    from llava.data.decoding import FrameRequest
    from llava.data.media_files import MediaError

    monkeypatch.delattr(select, "poll")
    monkeypatch.setattr(
        worker_pool, "_PROGRAM", "import sys, time; print('ready', flush=True); sys.stdin.readline(); time.sleep(60)"
    )
    process = decoder_process.DecoderProcess()
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"longer than --decode_timeout 0\.2 s"):
        process.decode(_request(FrameRequest), 0.2)
    assert time.monotonic() - start < 30
    assert not process.alive


def _request(kind: type) -> object:
    from dataclasses import MISSING, fields

    from llava.data.media_files import DEFAULT_LIMITS

    values = {"path": "clip.mp4", "limits": DEFAULT_LIMITS}
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    return kind(**{name: values.get(name) for name in missing} | values)


@pytest.mark.parametrize("windows", [False, True])
def test_a_lock_is_held_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool) -> None:
    if windows:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", FakeWindows())
    elif not hasattr(os, "fork"):
        pytest.skip("this system has no fcntl")
    with (tmp_path / "lock").open("a") as first:
        first.write("contents")
        assert system.lock_file(first, wait=False)
        with (tmp_path / "lock").open("a") as second, pytest.raises(BlockingIOError):
            system.lock_file(second, wait=False)
        first.write(" that go on")
    assert (tmp_path / "lock").read_text() == "contents that go on"


class FakeWindows:
    """The one function of msvcrt that is called; like the real one it locks at the place the file stands at."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.places: set[int] = set()

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if place in self.places:
            raise PermissionError(13, "Permission denied")
        self.places.add(place)


def test_no_locks_at_all_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with (tmp_path / "lock").open("a") as file:
        assert not system.lock_file(file, wait=True)


def test_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.num_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert system.num_cores() == os.cpu_count()


@pytest.mark.parametrize(
    ("platform", "machine", "wanted"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", False),
        ("win32", "AMD64", True),
        ("win32", "ARM64", False),
        ("darwin", "arm64", False),
        ("darwin", "x86_64", False),
    ],
)
def test_decord_is_asked_for_only_where_it_has_a_wheel(platform: str, machine: str, wanted: bool) -> None:
    from packaging.requirements import Requirement

    line = re.search(r'^    "(decord.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line is not None
    marker = Requirement(line[1]).marker
    assert marker is not None
    assert marker.evaluate({"sys_platform": platform, "platform_machine": machine}) is wanted


@pytest.mark.parametrize(("platform", "peak"), [("linux", 3 * 2**20), ("darwin", 3 * 2**30), ("win32", 3 * 2**30)])
def test_the_peak_of_memory_is_in_gib(monkeypatch: pytest.MonkeyPatch, platform: str, peak: int) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=peak))
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=peak))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setitem(sys.modules, "resource", None if platform == "win32" else usage)
    monkeypatch.setattr("psutil.Process", lambda: process)
    assert peak_memory() == 3 * 2**30
