"""train_italian_video.sh: its checks, its choices and, on real clips, whole runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_tower

from llava.data.records import read_records
from llava.train.command_line import RECIPES, parse_arguments

SETTINGS = (
    "EXP_ID", "MODEL_PATH", "VISION_MODEL", "DATA_PATH", "VIDEO_FOLDER", "OUTPUT_DIR", "NUM_GPUS", "EXTRA_ARGS",
    "FEATURE_CACHE", "INSPECT",
    "OVERWRITE", "SLURM_RESTART_COUNT", "SLURM_SUBMIT_DIR", "SLURM_JOB_NUM_NODES", "VIRTUAL_ENV", "PYTHONPATH",
)  # fmt: skip


@pytest.fixture(autouse=True)
def python(warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", warm_python)


@pytest.fixture
def script() -> Path:
    return ROOT / "train_italian_video.sh"


def run(script: Path, *words: str, timeout: int = 300, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run the script as a user without a GPU would, in an environment of the given settings alone.

    ``INSPECT`` is 0 where it is not given: the inspection takes its time.
    """
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "INSPECT": "0"}
    environment |= {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        ["bash", str(script), *words], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a python that finds so many GPUs, such a precision and DeepSpeed or not, and prints how it is called."""

    def write(found: str) -> Path:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/bash\nif [[ $1 == - ]]; then echo "{found}"; else printf "%s\\n" "ran: $*"; fi\n')
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def places(gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "MODEL_PATH": gpt2_dir, "VISION_MODEL": tower_dir, "DATA_PATH": mixed_data, "OUTPUT_DIR": tmp_path / "out",
    }  # fmt: skip


def test_shellcheck(script: Path) -> None:
    template = ROOT / "llava" / "train" / "slurm" / "train.sbatch"
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([program, str(script), str(template)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_missing_path_has_its_line(script: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = run(
        script, MODEL_PATH=tmp_path / "gpt2", VISION_MODEL=tmp_path / "empty", DATA_PATH=tmp_path / "data.json",
        VIDEO_FOLDER=tmp_path / "clips", OUTPUT_DIR=tmp_path / "file" / "out",
    )  # fmt: skip
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    for name in ("MODEL_PATH", "VISION_MODEL", "DATA_PATH", "VIDEO_FOLDER", "OUTPUT_DIR"):
        assert sum(line.startswith(f"error: {name}={tmp_path}") for line in lines) == 1, result.stderr
    assert "expected the folder of a vision model" in result.stderr
    assert not result.stdout


def test_no_gpu_and_no_data_points_to_the_demo(script: Path, tmp_path: Path) -> None:
    result = run(script, DATA_PATH=tmp_path / "data.json", OUTPUT_DIR=tmp_path)
    assert result.returncode == 2
    assert "no GPU and no data here; 'make demo'" in result.stderr


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("EXP_ID", "3", "expected 1 (text alone) or 2 (videos and text)"),
        ("NUM_GPUS", "two", "NUM_GPUS is 'two', expected a number"),
        ("NUM_GPUS", "2", "NUM_GPUS is 2, but 0 can be seen"),
        ("INSPECT", "2", "INSPECT is '2', expected 1 (look at the run first) or 0 (do not)"),
        ("OVERWRITE", "yes", "OVERWRITE is 'yes', expected 1 (start anew) or 0 (go on)"),
        ("PYTHON", "/nowhere/python", "PYTHON=/nowhere/python: cannot import torch"),
        ("VISION_MODEL", "/nowhere/tower", "VISION_MODEL=/nowhere/tower: no such folder"),
    ],
)
def test_wrong_settings(script: Path, places: dict[str, Path], setting: str, value: str, message: str) -> None:
    result = run(script, **{**places, setting: value})
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1


def test_output_over_the_model_is_refused(script: Path, places: dict[str, Path]) -> None:
    result = run(script, **{**places, "OUTPUT_DIR": places["MODEL_PATH"]})
    assert result.returncode == 2
    assert "is MODEL_PATH too" in result.stderr


@pytest.mark.parametrize(
    ("found", "settings", "expected", "absent"),
    [
        (
            "1 bf16 1",
            {},
            ["ran: -m llava.train.train", "--resume_from_checkpoint auto", "--bf16 true"],
            ["launch", "--use_cpu"],
        ),
        ("1 fp16 0", {"EXP_ID": 1}, ["--config italian_text.yaml", "--fp16 true"], ["--vision_tower", "--bf16"]),
        ("4 bf16 1", {}, ["llava.train.launch --standalone --nproc_per_node 4", "zero2.json"], ["note: deepspeed"]),
        ("4 bf16 0", {"NUM_GPUS": 2}, ["--nproc_per_node 2", "plain DDP"], ["--deepspeed"]),
        ("4 bf16 1", {"NUM_GPUS": 1}, ["ran: -m llava.train.train"], ["launch"]),
        (
            "4 bf16 1",
            {"SLURM_JOB_NUM_NODES": 3},
            ["ran: -m llava.train.slurm --no_requeue --nproc_per_node 4 -m llava.train.train", "zero2.json"],
            ["launch"],
        ),
        ("4 bf16 1", {"SLURM_JOB_NUM_NODES": 2, "NUM_GPUS": 1}, ["slurm --no_requeue --nproc_per_node 1 -m"], []),
        ("0 fp32 0", {"SLURM_JOB_NUM_NODES": 2}, ["--nproc_per_node 1 -m", "--use_cpu true"], ["--deepspeed"]),
        ("4 bf16 1", {"NUM_GPUS": 0}, ["--use_cpu true", "NUM_GPUS is 0"], ["--bf16"]),
        ("0 fp32 1", {}, ["--config italian_video.yaml", "no GPU found"], ["--bf16", "--fp16"]),
        ("1 bf16 1", {"VISION_MODEL": "facebook/dinov2-large"}, ["it will be downloaded"], ["error"]),
        ("1 bf16 1", {"OVERWRITE": 1}, ["--overwrite_output_dir true"], ["--resume_from_checkpoint"]),
        (
            "1 bf16 1",
            {"OVERWRITE": 1, "SLURM_RESTART_COUNT": 2},
            ["--resume_from_checkpoint auto"],
            ["--overwrite_output"],
        ),
        ("1 bf16 1", {"FEATURE_CACHE": "f"}, ["--feature_cache f --feature_cache_fill true"], []),
        ("1 bf16 1", {"EXTRA_ARGS": "--max_steps 2\n--seed 7"}, ["--max_steps 2 --seed 7 --run_name a b"], []),
    ],
)
def test_choices(
    script: Path,
    places: dict[str, Path],
    fake_python: Callable[[str], Path],
    found: str,
    settings: dict[str, object],
    expected: list[str],
    absent: list[str],
) -> None:
    result = run(script, "--run_name", "a b", **{**places, "PYTHON": fake_python(found), **settings})
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert all(text in said for text in expected), said
    assert not any(text in said for text in absent), said


def test_the_trainers_exit_status_is_handed_on(script: Path, places: dict[str, Path], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[[ $1 == - ]] && echo "1 bf16 1" || exit 7\n')
    python.chmod(0o755)
    assert run(script, **{**places, "PYTHON": python}).returncode == 7


@pytest.mark.parametrize(
    ("settings", "status", "ran", "message"),
    [
        ({"INSPECT": ""}, 0, ["inspect --fast", "train.train"], ""),
        (
            {"INSPECT": 1, "LOOKS": 1},
            1,
            ["inspect --fast"],
            "the run would be ruined, see the findings above; INSPECT=0",
        ),
        ({"INSPECT": 1, "LOOKS": 2}, 2, ["inspect --fast"], ""),
        ({"INSPECT": 0, "LOOKS": 1}, 0, ["train.train"], ""),
        ({"INSPECT": 1, "LOOKS": 1, "SLURM_RESTART_COUNT": 1}, 0, ["train.train"], ""),
    ],
)
def test_a_run_is_looked_at_before_it_trains(
    script: Path, places: dict[str, Path], tmp_path: Path, settings: dict[str, object], status: int, ran, message: str
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\nif [[ $1 == - ]]; then echo "1 bf16 1"; exit; fi\nprintf "%s\\n" "ran: $*"\n'
        '[[ $2 != llava.inspect ]] || exit "${LOOKS:-0}"\n'
    )
    python.chmod(0o755)
    result = run(script, "--run_name", "a", **{**places, "PYTHON": python, **settings})
    assert result.returncode == status, result.stderr
    commands = [line for line in result.stdout.splitlines() if line.startswith("ran: ")]
    assert all(line.startswith(f"ran: -m llava.{name} ") for line, name in zip(commands, ran, strict=True))
    assert all("--bf16 true --run_name a" in line for line in commands)
    assert message in result.stderr


@pytest.mark.parametrize(
    ("sent", "status", "slurm", "finished", "requeued"),
    [
        (signal.SIGUSR1, 85, True, False, True),
        (signal.SIGUSR1, 85, True, True, True),  # A longer run goes on in a folder that a shorter one has finished.
        (signal.SIGUSR1, 85, False, False, False),
        (signal.SIGUSR1, 0, True, True, False),
        (signal.SIGUSR1, 2, True, False, False),
        (signal.SIGUSR1, 138, True, False, True),
        (signal.SIGUSR1, 138, True, True, False),
        (signal.SIGTERM, 85, True, False, False),
    ],
)
def test_a_signal_reaches_the_trainer_and_requeues_the_job(
    script: Path,
    places: dict[str, Path],
    tmp_path: Path,
    sent: signal.Signals,
    status: int,
    slurm: bool,
    finished: bool,
    requeued: bool,
) -> None:
    if finished:
        places["OUTPUT_DIR"].mkdir()
        (places["OUTPUT_DIR"] / "run_identity.json").touch()
    python, scontrol = tmp_path / "python", tmp_path / "scontrol"
    python.write_text(f"""#!/bin/bash
if [[ $1 == - ]]; then echo "1 bf16 1"; exit; fi
stop() {{ echo "the trainer saves"; exit {status}; }}
trap stop USR1
touch {tmp_path}/started
while true; do sleep 0.02; done
""")
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
    for stub in (python, scontrol):
        stub.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "SLURM_JOB_ID")}
    environment |= {name: str(place) for name, place in places.items()} | {"INSPECT": "0"}
    environment |= {"PYTHON": str(python), "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
    environment |= {"SLURM_JOB_ID": "17"} if slurm else {}
    process = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the trainer saves" in said
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_slurm_runs_a_copy_elsewhere(
    script: Path, places: dict[str, Path], fake_python: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(script, tmp_path / "spool" / "slurm_script")
    settings = {**places, "PYTHON": fake_python("1 bf16 1")}
    assert "ran: " in run(copy, SLURM_SUBMIT_DIR=ROOT, **settings).stdout
    lost = run(copy, SLURM_SUBMIT_DIR=tmp_path, **settings)
    assert lost.returncode == 2
    assert "submit from there" in lost.stderr


@pytest.mark.parametrize("name", ["italian_text.yaml", "italian_video.yaml"])
def test_recipes_are_complete(name: str, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    model, data, training = parse_arguments(["--config", name, *flags])
    assert training.num_train_epochs == 80
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert training.learning_rate == 5e-4
    assert training.get_warmup_steps(1000) == 100
    assert (training.save_steps, training.save_total_limit, training.weight_decay) == (230, 10, 0)
    assert "mm_language_model" in model.tunable_parts
    if name == "italian_text.yaml":
        assert model.vision_tower is None
        return
    assert model.vision_tower == "facebook/dinov2-large"
    assert (model.mm_perceiver_latents, model.mm_perceiver_latents_fast, data.num_frames) == (81, 9, 4)
    assert data.image_aspect_ratio == "pad"
    assert training.part_learning_rates()["mm_mlp_adapter"] == 5e-4


def test_recipes_differ_in_vision_only() -> None:
    text, video = (
        yaml.safe_load((RECIPES / f"italian_{name}.yaml").read_text(encoding="utf-8")) for name in ("text", "video")
    )
    vision = {"vision_tower", "image_aspect_ratio", "num_frames"}
    rest = {key: value for key, value in video.items() if not key.startswith("mm_") and key not in vision}
    assert rest == {key: value for key, value in text.items() if not key.startswith("mm_")}


def test_a_sweep_in_one_folder_returns_no_other_runs_model(
    script: Path, gpt2_dir: Path, tmp_path: Path, backbone_dirs
) -> None:
    """The first run, the same again, a second learning rate, another base model, and a new start in its place."""
    data, output = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps([{"id": "a", "conversations": [{"from": "gpt", "value": "Il gatto dorme."}]}]))
    settings = {"EXP_ID": 1, "MODEL_PATH": gpt2_dir, "DATA_PATH": data, "OUTPUT_DIR": output}
    flags = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0"]

    assert run(script, *flags, **settings).returncode == 0
    scores = (output / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[2] for row in scores] == ["task", "italian"]
    model = (output / "model.safetensors").read_bytes()
    again = run(script, *flags, **settings)
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"the run in {output} is finished: all of its 2 steps were trained before" in again.stdout
    swept = run(script, *flags, "--learning_rate", "1e-4", **settings)
    assert swept.returncode == 2
    assert "--learning_rate was 0.0005, is 0.0001" in swept.stderr
    other = run(script, *flags, **settings | {"MODEL_PATH": backbone_dirs["llava_llama"]})
    assert other.returncode == 2
    assert f"--model_name_or_path was {gpt2_dir} (hash" in other.stderr
    assert (output / "model.safetensors").read_bytes() == model
    anew = run(script, *flags, "--learning_rate", "1e-2", OVERWRITE=1, **settings)
    assert anew.returncode == 0, anew.stderr[-2000:]
    assert (output / "model.safetensors").read_bytes() != model
    assert "Traceback" not in swept.stderr + other.stderr


@pytest.mark.parametrize("phase", ["t_it", "vi_it"])
def test_runs_to_the_end_on_real_clips(
    script: Path, shared_data: Path, gpt2_dir: Path, tmp_path: Path, phase: str
) -> None:
    samples = json.loads((shared_data / "real_video_it.json").read_text(encoding="utf-8"))[:4]
    if phase == "t_it":
        samples = [{"id": s["id"], "conversations": s["conversations"][1:]} for s in samples]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples), encoding="utf-8")
    settings: dict[str, object] = {"EXP_ID": 1, "PYTHON": sys.executable}
    flags = ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--logging_steps", "1"]
    if phase == "vi_it":
        tower = make_tower(tmp_path / "tower", side=224)
        settings = {"EXP_ID": 2, "VISION_MODEL": tower, "VIDEO_FOLDER": shared_data}
        flags += ["--mm_resampler_width", "64"]
    result = run(
        script, *flags, MODEL_PATH=gpt2_dir, DATA_PATH=data, OUTPUT_DIR=tmp_path / "out",
        INSPECT=int(phase == "vi_it"),
        EXTRA_ARGS="--dataloader_num_workers 0", **settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "training on the CPU" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    if phase == "vi_it":
        assert "nothing that would ruin this run" in result.stdout
        assert "34 patches and 2 markers + 322 patches and 2 markers" in result.stdout
    assert len(read_records(str(data), video_folder=str(shared_data))) == 4
