"""A build makes the same files however it is stopped and shared, and a run finds in them all that it needs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llava.data.feature_cache.__main__ import main
from llava.data.media_files import MediaError
from llava.train import build_features, feature_plan
from llava.train.command_line import read_array_task
from llava.train.train import main as train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line of a build into a folder of the test's own, one image or clip a shard."""
    monkeypatch.setattr(feature_plan, "SHARD_BYTES", 1)

    def build(folder: str = "features", **changes) -> list[str]:
        values = {
            "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "data_path": mixed_data, "use_cpu": True,
            "num_frames": 3, "feature_cache": tmp_path / folder, "mm_vision_select_layer": 2, **changes,
        }  # fmt: skip
        return ["build", *(w for name, value in values.items() if value is not None for w in (f"--{name}", str(value)))]

    return build


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def test_a_run_needs_no_tower_behind_a_build(words, tmp_path: Path, capsys) -> None:
    build = words(storage="int8", pool=2)
    assert main(build) == 0
    printed = capsys.readouterr().out
    assert "4 images and clips in 4 shards; 4 are to be made, kept as int8, 2 x 2 patches pooled" in printed
    assert "GiB are free" in printed
    assert "int8, 2 x 2 patches pooled *" in printed
    assert "4 of 4 images and clips have features" in printed
    before = files(tmp_path / "features")
    assert len(before) == 5
    # The trainer's own flags: a recipe of the run serves both.
    recipe = tmp_path / "run.yaml"
    values = dict(zip((w[2:] for w in build[1::2]), build[2::2], strict=True))
    values = {name: value for name, value in values.items() if name not in ("storage", "pool")}
    run = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": "none", "feature_cache_strict": True}
    recipe.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in (values | run).items()))
    train(["--config", str(recipe)])
    assert "its weights were not read" in capsys.readouterr().out
    assert main(["build", "--config", str(recipe), "--storage", "int8", "--pool", "2"]) == 0
    assert "0 are to be made" in capsys.readouterr().out
    assert files(tmp_path / "features") == before
    assert main(["info", str(tmp_path / "features")]) == 0
    assert "2 videos:" in (printed := capsys.readouterr().out)
    assert '"num_frames": 3' in printed
    assert main(["verify", str(tmp_path / "features")]) == 0
    shard = next((tmp_path / "features").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(tmp_path / "features")]) == 1
    assert f"damaged: {shard}" in capsys.readouterr().out


def test_parts_stops_and_full_disks_give_the_same_files(words, tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(words("whole")) == 0
    expected = files(tmp_path / "whole")
    for part in ("1/2", "2/2"):
        assert main(words("parts", shard=part)) == 0
    assert files(tmp_path / "parts") == expected

    class Stopped(BaseException):
        pass

    real, left = build_features.Kept.of, [2]

    def stop(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(build_features.Kept, "of", stop)
        with pytest.raises(Stopped):
            main(words("stopped"))
    assert len(files(tmp_path / "stopped")) == 3
    assert main(words("stopped")) == 0
    assert files(tmp_path / "stopped") == expected

    def fill_disk(path: Path) -> None:
        if len(list(path.parent.glob("*.safetensors"))) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("llava.io.sync", fill_disk)
        assert main(words("full")) == 2
    error = capsys.readouterr().err
    assert "No space left on device; the 3 images and clips of 4 that are in it stay" in error
    assert main(words("full")) == 0
    assert files(tmp_path / "full") == expected
    cut = next((tmp_path / "full").glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-1])
    capsys.readouterr()
    assert main(words("full")) == 0
    assert "4 of 4 images and clips have features" in capsys.readouterr().out
    assert files(tmp_path / "full") == expected


def test_a_killed_build_goes_on_to_the_same_files(words, tmp_path: Path, warm_python: str) -> None:
    assert main(words("whole")) == 0
    program = """
import sys, time, llava.train.feature_plan as plan, llava.train.build_features as build
from llava.data.feature_cache.__main__ import main
plan.SHARD_BYTES, real = 1, build.Kept.of
build.Kept.of = lambda *args: (time.sleep(0.2), real(*args))[1]
sys.exit(main())
"""
    command = [warm_python, "-c", program, *words("killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for parts in (1, 3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while len(list((tmp_path / "killed").glob("*.safetensors*"))) < parts and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert files(tmp_path / "killed") != files(tmp_path / "whole")
    assert main(words("killed")) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_bad_clips_stop_a_build_or_are_left_out(words, tmp_path: Path, mixed_data: Path, capsys) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((mixed_data.parent / "a.mp4").read_bytes()[:900])
    data = tmp_path / "data.json"
    samples = json.loads(mixed_data.read_text())[:1]
    bad = {"id": "bad", "video": str(broken), "conversations": samples[0]["conversations"]}
    samples[0]["video"] = str(mixed_data.parent / "a.mp4")
    data.write_text(json.dumps([bad, *samples]))
    options = {"data_path": data, "allow_outside_paths": True}
    assert main(words(**options)) == 2
    assert "sample 'bad'" in capsys.readouterr().err
    assert main(words(**options, on_bad_sample="skip")) == 0
    assert "1 of 2 images and clips have features; 1 have none" in capsys.readouterr().out


def test_what_a_shard_lacks_is_made_by_the_next_build(
    words, tmp_path: Path, mixed_data: Path, monkeypatch, capsys
) -> None:
    data = shutil.copytree(mixed_data.parent, tmp_path / "media") / mixed_data.name
    build = words(data_path=data, on_bad_sample="skip")
    monkeypatch.setattr(feature_plan, "SHARD_BYTES", 1 << 20)
    real = feature_plan.load_media

    def time_out(media, *args):
        if media.path.endswith("b.mp4"):
            raise MediaError(f"{media.path}: takes too long", media.path)
        if media.path.endswith("b.jpg"):  # It was hashed before.
            Path(media.path).write_bytes((data.parent / "a.png").read_bytes() + b"0")
        return real(media, *args)

    with monkeypatch.context() as patched:
        patched.setattr(feature_plan, "load_media", time_out)
        assert main(build) == 0
    printed = capsys.readouterr().out
    assert "b.jpg: has changed since the build began; build again" in printed
    assert "b.mp4: takes too long" in printed
    assert "2 of 4 images and clips have features" in printed
    shutil.copy(mixed_data.parent / "b.jpg", data.parent / "b.jpg")
    assert main(build) == 0
    assert "2 are to be made" in (printed := capsys.readouterr().out)
    assert "4 of 4 images and clips have features" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_cache": None}, "--feature_cache is missing"),
        ({"shard": "3/2"}, "expected I/N"),
        ({"storage": "int4"}, "known: fp32, bf16, int8"),
        ({"vision_tower": None}, "does not see"),
        ({"mm_tunable_parts": "mm_vision_tower"}, "trains it"),
        ({"proceses": 2}, "did you mean --processes"),
    ],
)
def test_flags_that_are_wrong(words, changes: dict[str, object], message: str, capsys) -> None:
    assert main(words(**changes)) == 2
    assert message in capsys.readouterr().err


def test_tasks_of_a_slurm_array(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_array_task() is None
    for number, first, last, count, expected in ((4, 4, 7, 4, 0), (7, 4, 7, 4, 3), (20, 0, 20, 3, 2), (3, 3, 3, 1, 0)):
        for name, value in (("ID", number), ("MIN", first), ("MAX", last), ("COUNT", count)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert read_array_task() == (expected, count)
