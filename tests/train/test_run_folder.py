"""A folder that holds a run is not overwritten unasked, and nothing but a run is ever removed from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.train.checkpoint import write_checksums
from llava.train.run_folder import prepare_folder
from llava.train.train import build_trainer, cli, main

FOREIGN = ("notes.txt", "data.json", "checkpoint-plan.md", "figures/loss.png", "README.md", "runs/notes")


def leave_run(folder: Path) -> Path:
    """What a run leaves, and files that are somebody else's."""
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        write_checksums(checkpoint)
    (folder / "tmp-checkpoint-6" / "checkpoint-6").mkdir(parents=True)
    (folder / "bad_step-3").mkdir()
    (folder / "bad_step-3" / "run.json").write_text("{}")
    for name in (
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
        "run_identity.json", "bad_samples.jsonl", "training_args.bin", "runs/a/events.out.tfevents.1", *FOREIGN,
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "out")
    before = files(folder)
    for resume in (None, "", "false"):
        with pytest.raises(
            ValueError, match=rf"--output_dir {folder} holds a run \(checkpoint-2, checkpoint-4"
        ) as error:
            prepare_folder(str(folder), resume, False, {})
        for way in ("--resume_from_checkpoint auto", "another --output_dir", "--overwrite_output_dir true"):
            assert way in str(error.value)
    prepare_folder(str(folder), "auto", False, {})
    prepare_folder(str(folder), str(folder / "checkpoint-2"), False, {})
    assert files(folder) == before


@pytest.mark.parametrize(
    "left", ["model.safetensors", "trainer_state.json", "adapter_model.safetensors", "checkpoint-2"]
)
def test_any_part_of_a_run_counts(left: str, tmp_path: Path) -> None:
    (tmp_path / left).mkdir() if left.startswith("checkpoint") else (tmp_path / left).touch()
    with pytest.raises(ValueError, match=f"holds .*{left}.*would be overwritten"):
        prepare_folder(str(tmp_path), None, False, {})


@pytest.mark.parametrize("left", ["notes.txt", "bad_samples.jsonl", "tmp-checkpoint-2/x", "config.yaml", "run.lock"])
def test_other_files_are_no_run(left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    for resume in (None, "auto"):
        prepare_folder(str(tmp_path), resume, False, {})
    prepare_folder(str(tmp_path), None, True, {})
    assert (tmp_path / left).exists()


@pytest.mark.parametrize(("resume", "overwrite"), [(None, False), ("auto", False), (None, True)])
def test_what_the_run_starts_from_is_no_output_folder(resume: str | None, overwrite: bool, tmp_path: Path) -> None:
    """Whatever lies there: a tokenizer or a configuration alone would be overwritten as well."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"--output_dir .*link is --vision_tower too, which would be overwritten"):
        prepare_folder(str(tmp_path / "link"), resume, overwrite, {"--vision_tower": str(tmp_path)})
    assert (tmp_path / "config.json").exists()


def test_a_checkpoint_of_another_folder_is_no_leave_to_overwrite(tmp_path: Path) -> None:
    folder, other = leave_run(tmp_path / "out"), leave_run(tmp_path / "other")
    with pytest.raises(ValueError, match="is another's"):
        prepare_folder(str(folder), str(other / "checkpoint-2"), False, {})


def test_overwriting_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "out")
    (folder / "checkpoint-9").mkdir()  # Called so by somebody else.
    (folder / "checkpoint-9" / "mine").touch()
    prepare_folder(str(folder), None, True, {"model_name_or_path": str(tmp_path)})
    assert files(folder) == {*FOREIGN, "checkpoint-9/mine"}


def test_overwriting_and_resuming_contradict_each_other(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "out")
    before = files(folder)
    with pytest.raises(ValueError, match="starts anew and --resume_from_checkpoint auto goes on"):
        prepare_folder(str(folder), "auto", True, {})
    assert files(folder) == before


@pytest.mark.parametrize("source", ["", "checkpoint-4", "checkpoint-4/model.safetensors", "model.safetensors"])
def test_what_the_run_starts_from_is_never_removed(source: str, tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "out")
    before = files(folder)
    (tmp_path / "link").symlink_to(folder)
    for base in (folder / source, tmp_path / "link" / source):
        with pytest.raises(ValueError, match="would remove model_name_or_path"):
            prepare_folder(str(folder), None, True, {"model_name_or_path": str(base)})
    assert files(folder) == before


@pytest.mark.parametrize(("resume", "overwrite"), [(None, True), (None, False), ("auto", False)])
def test_a_model_that_no_run_left_stays(gpt2_dir: Path, tmp_path: Path, resume: str | None, overwrite: bool) -> None:
    folder = shutil.copytree(gpt2_dir, tmp_path / "gpt2")
    before = files(folder)
    for sources in ({}, {"model_name_or_path": str(folder)}):
        with pytest.raises(ValueError, match="give another"):
            prepare_folder(str(folder), resume, overwrite, sources)
    assert files(folder) == before


# --- whole runs --------------------------------------------------------------------------------------


@pytest.fixture
def argv(gpt2_dir: Path, tmp_path: Path) -> list[str]:
    """A run of text of two steps; its output folder comes last."""
    data = tmp_path / "texts.json"
    data.write_text(json.dumps([{"id": 1, "conversations": [{"from": "gpt", "value": "Il gatto dorme."}]}]))
    values = {"model_name_or_path": gpt2_dir, "data_path": data, "max_steps": 2, "save_steps": 1, "report_to": "none",
              "use_cpu": "true", "disable_tqdm": "true", "output_dir": tmp_path / "out"}  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_the_second_run(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    output = Path(argv[-1])
    assert cli(lambda: main(argv) and None) == 0
    before = {name: (output / name).read_bytes() for name in files(output)}
    assert "run.lock" not in before
    assert cli(lambda: main(argv)) == 2
    said = capfd.readouterr().err
    assert f"error: --output_dir {output} holds a run (checkpoint-1, checkpoint-2, model.safetensors" in said
    assert {name: (output / name).read_bytes() for name in files(output)} == before
    (output / "notes.txt").touch()
    trainer = main([*argv, "--overwrite_output_dir", "true", "--max_steps", "1"])
    assert trainer.state.global_step == 1
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (output / "notes.txt").exists()


def test_the_second_run_while_the_first_one_is_there(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    output = Path(argv[-1])
    output.mkdir()
    lock = {"host": "node-7", "pid": 12, "process_started": 1.0, "boot": "b", "namespace": "n", "job": "", "restart": 0,
            "since": "2026-01-01T10:00:00+01:00", "token": "t"}  # fmt: skip
    (output / "run.lock").write_text(json.dumps(lock))
    for more in ([], ["--resume_from_checkpoint", "auto"], ["--overwrite_output_dir", "true"]):
        assert cli(lambda: main([*argv, *more])) == 2  # noqa: B023
        said = capfd.readouterr().err
        assert "is in use by another run (process 12 on node-7, since 2026-01-01T10:00:00+01:00)" in said
        assert "bytes" not in said
    assert files(output) == {"run.lock"}


def test_an_output_folder_that_is_a_file(argv: list[str]) -> None:
    Path(argv[-1]).write_text("")
    with pytest.raises(ValueError, match="is a file; give a"):
        main(argv)


def test_a_start_that_fails_gives_the_folder_back(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="--stage 3 starts from a checkpoint of stage 2"):
        main([*argv, "--stage", "3"])
    assert not list(Path(argv[-1]).iterdir())


def test_one_process_may_build_several_trainers(argv: list[str]) -> None:
    build_trainer(argv)
    trainer = build_trainer(argv)
    trainer.train()
    assert trainer.state.global_step == 2
