"""Checkpoint folders: finalized, found, judged, rotated, and left alone by what fails beside them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from llava.train.checkpoint import (
    CHECKSUMS,
    choose_checkpoint,
    clear_leftovers,
    finalize,
    find_best,
    find_damage,
    list_checkpoints,
    replace_files,
    rotate,
    staging_of,
    store_best,
    write_checksums,
)


def write_checkpoint(output: Path, step: int, finalized: bool = True) -> Path:
    """A checkpoint's files, with contents that stand for real ones."""
    folder = output / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    for name in ("model.safetensors", "rng_state.pth", "global_step/shard.pt"):
        (folder / name).write_bytes(f"{name} {step}".encode() * 100)
    state = {"global_step": step, "max_steps": step, "num_train_epochs": 1, "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if finalized:
        write_checksums(folder)
    return folder


def steps(output: Path) -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in list_checkpoints(output)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors has 1999 bytes, expected 2000"),
    "flipped": (lambda folder: flip(folder / "global_step/shard.pt"), "shard.pt changed since it was written"),
    "missing": (lambda folder: (folder / "global_step/shard.pt").unlink(), "shard.pt is missing"),
    "unfinalized": (lambda folder: (folder / "trainer_state.json").unlink(), "incomplete"),
    "list cut": (lambda folder: cut(folder / CHECKSUMS) or cut(folder / CHECKSUMS), "checksums.json is damaged"),
    "list of nothing": (lambda folder: (folder / CHECKSUMS).write_text("[1]"), "checksums.json is damaged"),
    "model only": (lambda folder: (folder / "rng_state.pth").unlink(), "--save_only_model"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_said(spoil, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, damaged = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 10)
    assert choose_checkpoint("auto", tmp_path) == str(damaged)
    spoil(damaged)
    assert choose_checkpoint("auto", tmp_path) == str(good)
    assert message in caplog.text
    assert str(damaged) in caplog.text
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {damaged}") as error:
        choose_checkpoint(str(damaged), tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "global_step/shard.pt", CHECKSUMS])
def test_any_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    assert find_damage(folder) is None
    flip(folder / name)
    assert find_damage(folder) is not None


def test_what_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for nothing in (None, "", "false", "False"):
        assert choose_checkpoint(nothing, tmp_path) is None
    assert choose_checkpoint("auto", tmp_path / "nowhere") is None
    assert choose_checkpoint("true", tmp_path) is None
    assert "starting anew" in caplog.text
    with pytest.raises(ValueError, match="--resume_from_checkpoint nowhere: no such folder"):
        choose_checkpoint("nowhere", tmp_path)


@pytest.mark.parametrize("asked", ["auto", "by name"])
def test_without_checksums_a_checkpoint_is_taken_on_request_only(asked: str, tmp_path: Path, caplog) -> None:
    folder = write_checkpoint(tmp_path, 2, finalized=False)
    asked = asked if asked == "auto" else str(folder)
    with pytest.raises(ValueError, match=r"no checksums\.json, so nothing tells whether it is whole.*--resume_changed"):
        choose_checkpoint(asked, tmp_path)
    assert choose_checkpoint(asked, tmp_path, take_unverified=True) == str(folder)
    assert "taken as it is" in caplog.text
    shutil.rmtree(folder / "global_step")
    with pytest.raises(ValueError, match="optimizer's state is missing"):
        choose_checkpoint(asked, tmp_path, take_unverified=True)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt"])
def test_without_its_optimizer_a_checkpoint_is_not_whole(lost: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2, finalized=False)
    shutil.rmtree(folder / "global_step")
    for name in {"optimizer.pt", "scheduler.pt"} - {lost}:
        (folder / name).write_text("state")
    write_checksums(folder)
    assert "optimizer's state is missing" in str(find_damage(folder))
    (folder / lost).write_text("state")
    write_checksums(folder)
    assert find_damage(folder) is None


def test_auto_does_not_start_over_checkpoints_that_it_cannot_use(tmp_path: Path) -> None:
    for step in (2, 4):
        (write_checkpoint(tmp_path, step) / "rng_state.pth").unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints.*checkpoint-4: it holds a model only.*checkpoint-2"):
        choose_checkpoint("auto", tmp_path)


def test_the_best_one_is_found_where_the_folder_lies_now(tmp_path: Path) -> None:
    output = tmp_path / "before"
    best = write_checkpoint(output, 2)
    newest = write_checkpoint(output, 4)
    stored = store_best(str(best), output)
    assert stored == "checkpoint-2"
    moved = output.rename(tmp_path / "after")

    def find(name: str | None) -> tuple[str | None, str | None]:
        (moved / newest.name / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": name}))
        return find_best(moved / newest.name)

    for name in (stored, str(best)):  # An earlier version wrote the whole path.
        assert find(name) == (name, str(moved / "checkpoint-2"))
    shutil.rmtree(moved / "checkpoint-2")
    assert find(stored) == (stored, None)
    assert store_best(None, moved) is None
    assert find(None) == (None, None)
    # One of another folder keeps its path.
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 8)
    assert find(store_best(str(elsewhere), moved)) == (str(elsewhere), str(elsewhere))


def test_rotation_knows_the_best_one_by_another_path(tmp_path: Path) -> None:
    output = tmp_path / "output"
    folders = [write_checkpoint(output, step) for step in (2, 4, 6)]
    (tmp_path / "link").symlink_to(output)
    rotate(folders[-1], 1, [str(tmp_path / "link" / "checkpoint-2")])
    assert steps(output) == [2, 6]


def test_leftovers_go_and_what_lacked_only_its_name_gets_it(tmp_path: Path) -> None:
    kept = write_checkpoint(tmp_path, 2)
    (tmp_path / "tmp-trial").mkdir()
    for step, finalized in ((4, False), (6, True)):
        staging = staging_of(tmp_path / f"checkpoint-{step}")
        write_checkpoint(staging, step, finalized)
    (staging_of(tmp_path / "checkpoint-8") / "checkpoint-8").mkdir(parents=True)
    (tmp_path / "tmp-model").mkdir()
    assert choose_checkpoint("auto", tmp_path) == str(kept)
    clear_leftovers(tmp_path)
    assert steps(tmp_path) == [2, 6]
    assert not list(tmp_path.glob("tmp-*"))


@pytest.mark.parametrize("spoil", [halve, flip, Path.unlink], ids=["halved", "flipped", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "global_step/shard.pt", "trainer_state.json", CHECKSUMS])
def test_a_damaged_leftover_never_gets_its_name(spoil, name: str, tmp_path: Path) -> None:
    """It looks finished, its list of files included: a disk that lost power may have kept less than it said."""
    staging = staging_of(tmp_path / "checkpoint-6")
    spoil(write_checkpoint(staging, 6) / name)
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_does_not_replace_a_checkpoint_of_its_name(tmp_path: Path) -> None:
    kept = write_checkpoint(tmp_path, 6)
    (write_checkpoint(staging_of(kept), 6) / "other").touch()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert not (kept / "other").exists()


def test_a_checkpoint_has_its_checksums_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-2"
    staged = write_checkpoint(staging_of(folder), 2, finalized=False)
    rename = Path.rename

    def rename_whole(path: Path, target: Path) -> Path:
        assert find_damage(path) is None
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_whole)
    finalize(staged, folder)
    assert find_damage(folder) is None


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    old, new = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path / "beside", 2)
    (old / "old").touch()
    finalize(new, old)
    assert not (old / "old").exists()
    assert find_damage(old) is None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp-")] == []


@pytest.mark.parametrize(
    ("found", "newest", "limit", "keep", "left"),
    [
        ([2, 4, 6], 6, 2, [], [4, 6]),
        ([2, 4, 6], 6, 1, [], [6]),
        ([2, 4, 6], 6, 1, [2], [2, 6]),
        ([2, 4, 6], 6, 2, [2], [2, 6]),
        ([2, 4, 10], 10, 3, [], [2, 4, 10]),
        ([2, 4, 10], 10, None, [], [2, 4, 10]),
        # A run that went back to step 2 writes step 4: 6 and 8 are of the run before.
        ([2, 4, 6, 8], 4, 2, [], [2, 4]),
        ([4, 6, 8], 4, 1, [], [4]),
    ],
)
def test_rotation(
    found: list[int], newest: int, limit: int | None, keep: list[int], left: list[int], tmp_path: Path
) -> None:
    folders = {step: write_checkpoint(tmp_path, step) for step in found}
    rotate(folders[newest], limit, [None, *(str(folders[step]) for step in keep)])
    assert steps(tmp_path) == left
    assert not list(tmp_path.glob("tmp-*"))


def test_a_model_in_several_files_replaces_another(tmp_path: Path) -> None:
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text("old")
    staged = tmp_path / "tmp-model"
    staged.mkdir()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json"):
        (staged / name).write_text("new")
    (tmp_path / "trainer_state.json").touch()
    replace_files(staged, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model-00001-of-00001.safetensors": "new", "model.safetensors.index.json": "new", "config.json": "new",
        "trainer_state.json": "",
    }  # fmt: skip


def test_a_kill_between_two_files_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("old")
    staged = tmp_path / "tmp-model"
    staged.mkdir()
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (staged / name).write_text("new")
    move = Path.replace

    def killed_at_the_second(self: Path, target: Path) -> Path:
        if "00002-of" in self.name:
            raise KeyboardInterrupt
        return move(self, target)

    monkeypatch.setattr(Path, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        replace_files(staged, tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_the_list_names_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    listed = json.loads((folder / CHECKSUMS).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == files - {CHECKSUMS}
    shutil.copytree(folder, tmp_path / "copy")
    assert find_damage(tmp_path / "copy") is None
