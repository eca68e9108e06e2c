"""Runs with ``--packing`` and ``--max_tokens_per_batch``: the steps of other batches, clear words where not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ITALIAN, turns
from test_training import assert_same_step, flags, losses

from llava.data.collator import SupervisedCollator
from llava.train import exposure
from llava.train.train import build_trainer, main

ONE_STEP = {
    "max_steps": 1, "optim": "sgd", "learning_rate": 1000, "lr_scheduler_type": "constant", "max_grad_norm": 0,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
BOX = "[<WIDTH-{0}><HEIGHT-{0}><WIDTH-{0}><HEIGHT-{0}>]"


@pytest.fixture(scope="module")
def grounded_data(media_dir: Path) -> Path:
    """Boxes that are asked about and boxes that are answered, other ones in every sample."""
    samples = []
    for i in range(5):
        x, y = 0.1 + 0.1 * i, 0.5 - 0.1 * i
        samples.append({
            "id": f"box-{i}", "image": "a.png" if i % 2 else "b.jpg",
            "conversations": turns(f"<image> cosa c'è {BOX.format('INPUT')}?", f"{ITALIAN[i]} {BOX.format('OUTPUT')}"),
            "variables": {
                f"spatial_{axis}_{way}_locations": [place, place + 0.3]
                for axis, place in (("width", x), ("height", y)) for way in ("input", "output")
            },
        })  # fmt: skip
    path = media_dir / "boxes.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.mark.parametrize("kind", ["mixed", "grounded", "alternating"])
def test_a_step_of_packs_equals_one_of_padded_samples(
    kind: str, gpt2_dir, tower_dir, mixed_data: Path, grounded_data: Path, tmp_path: Path
) -> None:
    data = grounded_data if kind == "grounded" else mixed_data
    more = {"stage": 2} if kind == "grounded" else {}
    variant = {"variant": "alternating"} if kind == "alternating" else {}

    def run(output: str, **changes) -> None:
        trainer = build_trainer(
            flags(gpt2_dir, tower_dir, data, tmp_path / output, **ONE_STEP, **more, **changes), **variant
        )
        trainer.train()
        trainer.save_state()
        trainer.save_model()

    run("padded", per_device_train_batch_size=7)
    run("packed", per_device_train_batch_size=5, packing="true", model_max_length=120)
    run("in two", per_device_train_batch_size=2, gradient_accumulation_steps=3, packing="true", model_max_length=120)
    assert_same_step(gpt2_dir, tmp_path / "padded", tmp_path / "packed")
    assert_same_step(gpt2_dir, tmp_path / "padded", tmp_path / "in two")


def test_a_step_of_token_batches_equals_one_of_counted_samples(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "counted", **ONE_STEP, per_device_train_batch_size=7))
    changes = {"max_tokens_per_batch": 130, "gradient_accumulation_steps": 7, "train_sampling_strategy": "random"}
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "tokens", **ONE_STEP | changes))
    assert_same_step(gpt2_dir, tmp_path / "counted", tmp_path / "tokens")


def test_packs_are_told_of_and_evaluation_has_a_sample_a_row(
    gpt2_dir, tower_dir, mixed_data, tmp_path: Path, capsys, monkeypatch
) -> None:
    rows: list[int] = []
    collate = SupervisedCollator.__call__

    def record(self, samples):
        batch = collate(self, samples)
        rows.append(len(batch.get("pack_lengths", ())))
        return batch

    monkeypatch.setattr(SupervisedCollator, "__call__", record)
    output = tmp_path / "out"
    main(flags(gpt2_dir, tower_dir, mixed_data, output, max_steps=-1, num_train_epochs=2, packing="true",
               model_max_length=120, per_device_train_batch_size=2, eval_data_path=mixed_data, word_limit="100",
               milestones="20,40"))  # fmt: skip
    printed = capsys.readouterr().out
    assert "7 samples in 3 packs of 120 tokens, " in printed
    assert rows[:3] + rows[-1:] == [2, 1, 2, 0]
    assert "pack" not in (output / "config.json").read_text()
    # Words are counted by sample, in the order that packs put them into.
    assert exposure.main([str(output)]) == 0


def test_samples_of_no_use_leave_their_place_in_a_pack(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    samples = json.loads(mixed_data.read_text())
    samples[1]["video"] = "gone.mp4"
    data = mixed_data.parent / "gone.json"
    data.write_text(json.dumps(samples))
    output = tmp_path / "out"
    trainer = main(flags(gpt2_dir, tower_dir, data, output, packing="true", on_bad_sample="skip", max_bad_share=0.5,
                         check_data="none", max_steps=-1, num_train_epochs=2, model_max_length=120))  # fmt: skip
    assert trainer.state.epoch == 2
    assert json.loads((output / "bad_samples.jsonl").read_text().splitlines()[0])["id"] == "video-b"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": "true", "max_tokens_per_batch": 100}, "--packing fills rows of --model_max_length tokens"),
        ({"packing": "true", "train_sampling_strategy": "group_by_length"}, "puts long and short samples together"),
        ({"max_tokens_per_batch": 0}, "--max_tokens_per_batch is 0; it must be at least 1"),
        ({"max_tokens_per_batch": 40}, "--max_tokens_per_batch is 40, but the longest sample alone has "),
    ],
)
def test_flags_that_cannot_be(changes: dict, words: str, gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes))


def test_another_way_of_making_batches_is_another_order(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "model_max_length": 120}
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes))
    with pytest.raises(ValueError, match=r"tokens of a pack \(0: none\) was 0, is 120"):
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes | {"max_steps": 4}, packing="true",
                   resume_from_checkpoint="auto"))  # fmt: skip
    assert len(losses(tmp_path)) == 2
