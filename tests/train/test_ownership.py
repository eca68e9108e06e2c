"""Of a resumed checkpoint nothing but tensors is unpickled, unless DeepSpeed does and it is this user's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from llava.train.checkpoint import check_pickles_are_ours, write_checksums
from llava.train.train import main


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    states = tmp_path / "checkpoint-5" / "global_step5"
    states.mkdir(parents=True)
    (states / "mp_rank_00_model_states.pt").write_bytes(b"pickled")
    return tmp_path / "checkpoint-5"


def test_own_files_are_read(checkpoint: Path) -> None:
    check_pickles_are_ours(str(checkpoint))


def test_anothers_files_are_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=rf"global_step5 belongs to user {owner}, not to you.*copy the checkpoint"):
        check_pickles_are_ours(str(checkpoint))


def test_files_that_everybody_may_write_are_not(checkpoint: Path) -> None:
    (checkpoint / "global_step5" / "mp_rank_00_model_states.pt").chmod(0o666)
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt can be written by everybody"):
        check_pickles_are_ours(str(checkpoint))


def test_a_link_counts_as_what_it_leads_to(checkpoint: Path, tmp_path: Path) -> None:
    states = checkpoint / "global_step5" / "mp_rank_00_model_states.pt"
    states.rename(tmp_path / "elsewhere.pt")
    states.symlink_to(tmp_path / "elsewhere.pt")
    check_pickles_are_ours(str(checkpoint))
    (tmp_path / "elsewhere.pt").chmod(0o666)
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt can be written by everybody"):
        check_pickles_are_ours(str(checkpoint))


def test_a_checkpoint_without_such_files_may_be_anybodys(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "global_step5").rename(checkpoint / "elsewhere")
    monkeypatch.setattr(os, "getuid", lambda: -1)
    check_pickles_are_ours(str(checkpoint))


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def trained(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run of text whose first step is saved; its output folder comes last."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data.json"
    data.write_text(json.dumps([{"id": 1, "conversations": [{"from": "gpt", "value": "Il gatto dorme."}]}]))
    values = {"model_name_or_path": gpt2_dir, "data_path": data, "max_steps": 1, "save_steps": 1, "report_to": "none",
              "save_strategy": "steps", "use_cpu": "true", "output_dir": folder / "out"}  # fmt: skip
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    main(argv)
    return argv


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_is_more_than_tensors_is_not_unpickled(trained: list[str], name: str, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(Path(trained[-1]) / "checkpoint-1", tmp_path / "checkpoint-1")
    torch.save({"state": Payload(tmp_path / "ran")}, checkpoint / name)
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)  # Whoever writes such a file writes its checksum too.
    argv = [*trained[:-1], str(tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint), "--max_steps", "2"]
    with pytest.raises(ValueError, match=r"checkpoint-1: one of its files .* holds more than plain tensors"):
        main(argv)
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload is harmless, and this test with it"


def test_training_arguments_are_not_read(trained: list[str], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(Path(trained[-1]) / "checkpoint-1", tmp_path / "checkpoint-1")
    torch.save(Payload(tmp_path / "ran"), checkpoint / "training_args.bin")
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)
    main([*trained[:-1], str(tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint), "--max_steps", "2"])
    assert not (tmp_path / "ran").exists()
