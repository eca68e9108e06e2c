"""The tower that the project ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.demo.common import TOWER_FOLDER
from llava.demo.patch_labeller import (
    NEW_TO_TOWER,
    PATCH_SIZE,
    TOWER_PAIRS,
    PatchLabeller,
    build_tower_config,
    known_pairs,
    measure_accuracy,
    read_labeller,
    render_labelled_frames,
    save_labeller,
    train_labeller,
)
from llava.demo.pretrain_tower import main
from llava.demo.scenes import FRAME_SIZE
from llava.demo.sentences import COLOURS, SHAPES


def test_tower_is_small() -> None:
    assert (TOWER_FOLDER / "model.safetensors").stat().st_size < 900_000


@pytest.mark.parametrize("pairs", [TOWER_PAIRS, NEW_TO_TOWER], ids=["training pairs", "pairs new to the tower"])
def test_shipped_tower_labels_fresh_frames(pairs: tuple[tuple[str, str], ...]) -> None:
    accuracy = measure_accuracy(read_labeller(TOWER_FOLDER), seed=7, num_frames=200, pairs=pairs)
    assert accuracy.shape >= 0.95
    assert accuracy.colour >= 0.95


def test_frames_and_labels_agree() -> None:
    frames = render_labelled_frames((1, 2), 4, TOWER_PAIRS)
    patches = (FRAME_SIZE // PATCH_SIZE) ** 2
    assert frames.pixels.shape == (4, 3, FRAME_SIZE, FRAME_SIZE)
    assert frames.coverage.shape == (4, patches, PATCH_SIZE**2)
    assert torch.equal(frames.shapes > 0, frames.colours > 0)
    assert torch.equal(frames.shapes > 0, frames.coverage.mean(-1) >= 0.25)
    assert frames.centres.abs().max() <= 1


def test_held_out_pairs_are_unknown() -> None:
    known = known_pairs()
    assert known.shape == (1 + len(SHAPES), 1 + len(COLOURS))
    assert int((~known).sum()) == len(NEW_TO_TOWER)
    assert known[0].all()
    assert known[:, 0].all()


def test_training_is_reproducible() -> None:
    first, again = (
        train_labeller(seed=3, num_steps=2, batch_size=4, learning_rate=1e-3).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_labeller_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labeller = PatchLabeller(build_tower_config())
    save_labeller(labeller, tmp_path)
    pixels = render_labelled_frames((1, 2), 2, TOWER_PAIRS).pixels
    saved, read = labeller.eval()(pixels), read_labeller(tmp_path)(pixels)
    assert torch.equal(saved.shapes, read.shapes)
    assert torch.equal(saved.colours, read.colours)
    assert torch.equal(saved.centres, read.centres)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "tower", "--num_steps", "0"], "--num_steps is 0; it must be at least 1"),
        (["--batch_size", "none"], "--batch_size is 'none'; expected a whole number"),
        (["--output_dir", str(TOWER_FOLDER / "config.json")], "is a file; give another folder"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
