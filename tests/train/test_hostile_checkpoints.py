"""A checkpoint whose checksums are right and whose files say something else is one line, before the first step.

What the files hold of Python's is never run.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.messages import explain_error
from llava.train.checkpoint import choose_checkpoint, find_damage, write_checksums
from llava.train.train import main
from tests.train.test_resuming import WITHOUT_BEST, text_flags
from tests.train.test_training import write_json

NAN = float("nan")
BRACKETS = b"[" * 200_000


class Evil:
    """What unpickles to a command of the shell."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


@pytest.fixture(scope="module")
def command(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run that has stopped after two steps."""
    folder = tmp_path_factory.mktemp("run")
    samples = [{"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(4)]
    texts = write_json(folder / "texts.json", samples)
    main(text_flags(gpt2_dir, texts, folder / "out", max_steps=2, **WITHOUT_BEST))
    resume = {"resume_from_checkpoint": folder / "out" / "checkpoint-2"}
    return text_flags(gpt2_dir, texts, folder / "out", max_steps=3, **WITHOUT_BEST, **resume)


@pytest.fixture
def checkpoint(command: list[str], tmp_path: Path) -> Iterator[Path]:
    """Its checkpoint, which is put back when the test has changed it."""
    folder = Path(command[command.index("--resume_from_checkpoint") + 1])
    kept = shutil.copytree(folder, tmp_path / "kept")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


def sign(folder: Path) -> None:
    (folder / "checksums.json").unlink(missing_ok=True)
    write_checksums(folder)


SAID: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("trainer_state.json", b"[]", "expected an object"),
    ("trainer_state.json", b"{}", "global_step is None"),
    ("trainer_state.json", BRACKETS, "recursion"),
    ("trainer_state.json", {"global_step": -3}, "global_step is -3, expected a whole number that is not negative"),
    ("trainer_state.json", {"global_step": 10**12}, "global_step is 1000000000000, and the folder is checkpoint-2"),
    ("trainer_state.json", {"epoch": NAN}, "epoch is nan, expected a finite number"),
    ("trainer_state.json", {"total_flos": "x"}, "total_flos is 'x'"),
    ("trainer_state.json", {"log_history": [7]}, "expected lines of log"),
    ("trainer_state.json", {"best_model_checkpoint": 7}, "expected a name as best_model_checkpoint"),
    ("trainer_state.json", {"stateful_callbacks": {"TrainerControl": 7}}, "expected states of callbacks"),
    ("trainer_state.json", {"more": 1}, "it has 'more', which the installed transformers does not know"),
    ("data_state.json", b"7", "expected an object with an order"),
    ("data_state.json", {"step": -3}, "step is -3"),
    ("data_state.json", {"epoch": "x"}, "epoch is 'x'"),
    ("data_state.json", {"order": {}}, "step_size is None"),
    ("exposure.json", {"sources": 7}, "expected an object with sources"),
    ("exposure.json", {"sources": {"a": {"words": -5}}}, "words of 'a' is -5"),
    ("loss_since_log_0.json", {"sum": NAN}, "sum is nan"),
    ("loss_since_log_0.json", {"last_logged_step": "x"}, "last_logged_step is 'x'"),
]


@pytest.mark.parametrize(("file", "change", "message"), SAID)
def test_what_a_file_cannot_say_is_damage(
    checkpoint: Path, file: str, change: bytes | dict[str, Any], message: str
) -> None:
    path = checkpoint / file
    path.write_bytes(
        change if isinstance(change, bytes) else json.dumps(json.loads(path.read_text()) | change).encode()
    )
    sign(checkpoint)
    assert f"its {file} is damaged: " in (damage := str(find_damage(checkpoint)))
    assert message in damage
    # The newest one that is whole is taken in its place.
    assert choose_checkpoint("auto", checkpoint.parent) == str(checkpoint.with_name("checkpoint-1"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "it has no checksum of model.safetensors, optimizer.pt, "),
        (b"[]", "its checksums.json is damaged"),
        (BRACKETS, "its checksums.json is damaged"),
        (b'{"../../../etc/passwd": {"bytes": 1, "sha256": "x"}}', "it has no checksum of"),
    ],
)
def test_checksums_that_list_nothing_are_none(checkpoint: Path, content: bytes, message: str) -> None:
    (checkpoint / "checksums.json").write_bytes(content)
    assert str(find_damage(checkpoint)).startswith(message)


def with_state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = copy.deepcopy(torch.load(path, weights_only=True))
        change(state)
        torch.save(state, path)

    return write


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def nan_moments(state: dict[str, Any]) -> None:
    next(iter(state["state"].values()))["exp_avg"].fill_(NAN)


STATES: list[tuple[str, Callable[[Path], object], str]] = [
    ("optimizer.pt", lambda path: path.write_bytes(b""), "its optimizer.pt cannot be read"),
    ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:3000]), "its optimizer.pt cannot be read"),
    ("optimizer.pt", lambda path: path.write_bytes(pickle.dumps(Evil())), "holds more than plain tensors"),
    ("optimizer.pt", saved(Evil()), "holds more than plain tensors"),
    ("optimizer.pt", saved([1]), "its optimizer.pt cannot be read"),
    ("optimizer.pt", with_state(lambda state: state.update(param_groups=7)), "its optimizer.pt cannot be read"),
    ("optimizer.pt", with_state(nan_moments), "exp_avg of a parameter of shape .* holds NaN or infinity"),
    ("scheduler.pt", saved(None), "its scheduler.pt cannot be read"),
    ("scheduler.pt", saved({}), "scheduler.pt cannot be read"),
    ("scheduler.pt", with_state(lambda state: state.update(last_epoch=-3)), "last_epoch is -3"),
    ("scheduler.pt", with_state(lambda state: state.update(base_lrs=[NAN] * 2)), "base_lrs is nan"),
    ("scheduler.pt", with_state(lambda state: state.update(optimizer="x")), "it has 'optimizer', which no schedule"),
    ("rng_state.pth", lambda path: path.write_bytes(b""), r"its rng_state\*\.pth cannot be read"),
    ("rng_state.pth", saved({}), r"its rng_state\*\.pth cannot be read"),
    ("rng_state.pth", saved(Evil()), "holds more than plain tensors"),
]


@pytest.mark.parametrize(("file", "change", "message"), STATES)
def test_states_of_tensors_are_read_as_such(
    command: list[str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    change(checkpoint / file)
    sign(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        main(command)
    assert "--resume_from_checkpoint" in explain_error(caught.value)
    assert not (tmp_path / "was_run").exists()


def test_the_checkpoint_as_it_was_is_gone_on_from(command: list[str], checkpoint: Path) -> None:
    main(command)
    assert (checkpoint.parent / "checkpoint-3").is_dir()
