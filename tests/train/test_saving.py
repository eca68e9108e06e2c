"""What the end of a run needs is tried before its first step; what cannot be written says why."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from llava.train import saving
from llava.train.disk_errors import explain_failures
from llava.train.train import cli, main
from llava.train.trainer import LlavaTrainer


@pytest.fixture
def base(gpt2_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(gpt2_dir, tmp_path / "base")


@pytest.fixture
def argv(base: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "texts.json"
    data.write_text(json.dumps([{"id": 1, "conversations": [{"from": "gpt", "value": "Il gatto dorme."}]}]))
    values = {"model_name_or_path": base, "data_path": data, "max_steps": 1, "report_to": "none",
              "use_cpu": "true", "disable_tqdm": "true", "output_dir": tmp_path / "out"}  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_vicunas_generation_config_is_mended_with_a_note(argv, base: Path, tmp_path: Path, steps, caplog) -> None:
    written = {"temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0, "eos_token_id": 0, "max_length": 400}
    (base / "generation_config.json").write_text(json.dumps(written))
    main(argv)
    assert steps == [0]
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.temperature, saved.top_p) == (GenerationConfig().temperature, GenerationConfig().top_p)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "temperature 0.9, top_p 0.6" in caplog.text


def test_sampling_that_is_asked_for_stays(argv, base: Path, tmp_path: Path, caplog) -> None:
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.9, "top_p": 0.6}))
    main(argv)
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    assert "left out" not in caplog.text


@pytest.mark.parametrize("part", ["config", "generation_config", "processing_class"])
def test_what_cannot_be_saved_at_the_end_stops_the_start(
    part: str, argv, tmp_path: Path, steps, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    trial = saving.CheckpointWriter._try_small_files

    def with_a_fault(self) -> None:
        owner = self.trainer if part == "processing_class" else self.trainer.model

        def refuse(*_: object, **__: object) -> None:
            raise ValueError("these settings\ncontradict each other")

        monkeypatch.setattr(getattr(owner, part), "save_pretrained", refuse)
        trial(self)

    monkeypatch.setattr(saving.CheckpointWriter, "_try_small_files", with_a_fault)
    assert cli(lambda: main(argv)) == 2
    assert "could not be saved at its end: these settings contradict each other" in capfd.readouterr().err
    assert steps == []
    assert not list((tmp_path / "out").iterdir())


def test_too_little_room_is_said_before_the_first_step(argv, tmp_path: Path, steps, monkeypatch, capfd) -> None:
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 1000)
    assert cli(lambda: main(argv)) == 2
    assert "1,000 bytes are free on its disk, but a checkpoint takes about" in capfd.readouterr().err
    assert steps == []


def test_too_little_room_for_all_checkpoints_is_a_warning(argv, steps, monkeypatch, caplog) -> None:
    monkeypatch.setattr(saving, "free_bytes", lambda folder: 1_000_000)
    main([*argv, "--max_steps", "2", "--save_steps", "0.5"])
    assert "2 more checkpoints and the model take about" in caplog.text
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("number", "hint", "room"),
    [
        (errno.ENOSPC, "bytes are needed", True),
        (errno.EDQUOT, "a quota may allow less", True),
        (errno.EIO, "the disk fails to write", False),
        (errno.EROFS, "mounted read-only", False),
        (errno.EACCES, "writing there is not allowed", False),
        (errno.ENOENT, "no other run and no cleaning job uses this folder", False),
    ],
)
def test_each_failure_has_its_words(number: int, hint: str, room: bool, tmp_path: Path) -> None:
    for said in (str(OSError(number, "it failed", "file")), f"I/O error: it failed (os error {number})"):
        text = explain_failures(tmp_path / "a" / "b", [f"rank 1: {said}"], 123_456, "checkpoint-2 is unharmed")
        assert hint.lower() in text.lower()
        assert ("Make room" in text) == room
        assert "checkpoint-2 is unharmed" in text
        assert "\n" not in text


def test_a_save_whose_folder_vanishes_says_nothing_of_room(argv, steps, monkeypatch, capfd) -> None:
    def vanished(self, output_dir: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"{output_dir}/rng_state.pth")

    monkeypatch.setattr("transformers.Trainer._save_rng_state", vanished)
    assert cli(lambda: main(argv)) == 2
    said = capfd.readouterr().err
    assert "see that no other run and no cleaning job uses this folder" in said
    assert "bytes" not in said


def test_a_step_is_no_part_of_a_trial(argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(LlavaTrainer, "_run_epoch", lambda self, **_: seen.append(sorted((tmp_path / "out").iterdir())))
    main([*argv, "--save_strategy", "no"])
    assert seen == [[tmp_path / "out" / name for name in ("run.lock", "run_starts.jsonl")]]
