"""A checkpoint that DeepSpeed would unpickle is resumed only if it is this user's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava.train.ownership import check_pickles_are_ours


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


def test_a_checkpoint_without_such_files_may_be_anybodys(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "global_step5").rename(checkpoint / "elsewhere")
    monkeypatch.setattr(os, "getuid", lambda: -1)
    check_pickles_are_ours(str(checkpoint))
