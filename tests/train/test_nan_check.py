"""A loss or a gradient that is no number stops the run before the weights are none, and can be replayed."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.train.nan_check import (
    MOST_OVERFLOWS,
    BadNumbersError,
    NanCheck,
    RankBatch,
    RunSettings,
    read_batch,
    write_batch,
)
from llava.train.replay import main as replay
from llava.train.train import build_trainer, main

ROOT = Path(__file__).parents[2]


def flags(model: Path, tower: Path | None, data: Path, output: Path, **changes) -> list[str]:
    values = {
        "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": output, "num_frames": 2,
        "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "use_cpu": "true",
        "train_sampling_strategy": "sequential", "save_strategy": "no", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def two_kinds(media_dir: Path) -> Path:
    """Two images and two texts, in this order."""
    caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "una stella gialla"}]
    text = [{"from": "gpt", "value": "Il gatto dorme sul divano."}]
    samples = [
        {"id": "text-a", "conversations": text},
        {"id": "text-b", "conversations": text},
        {"id": "image-a", "image": "a.png", "conversations": caption},
        {"id": "image-b", "image": "b.jpg", "conversations": caption},
    ]
    path = media_dir / "two-kinds.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture(scope="session")
def overflowing_dir(dropout_dir: Path, tower_dir: Path, two_kinds: Path, tmp_path_factory) -> Path:
    """A multimodal checkpoint with dropout whose projector overflows: images give NaN, texts do not."""
    folder = tmp_path_factory.mktemp("overflowing")
    main(flags(dropout_dir, tower_dir, two_kinds, folder, max_steps=1))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mm_projector" in name and name.endswith("weight"))
    weights[name][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_bad_loss_stops_the_run_before_the_step(
    overflowing_dir, tower_dir, two_kinds, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    trainer = build_trainer(flags(overflowing_dir, tower_dir, two_kinds, output))
    with pytest.raises(BadNumbersError) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "step 2: the loss of rank 0, micro-batch 0 is nan" in message
    assert "rank 0: 'image-a', 'image-b'." in message
    assert f"python -m llava.train.replay {output / 'bad_step-2'}" in message
    # The text of step 1 was learned, the images of step 2 were not.
    assert trainer.state.global_step == 1
    stored = load_file(output / "bad_step-2" / "model" / "model.safetensors")
    bad = {name for name, tensor in stored.items() if not tensor.isfinite().all()}
    assert bad == set()
    now = trainer.model.state_dict()
    assert all(torch.equal(stored[name], now[name]) for name in stored)

    capsys.readouterr()
    assert replay([str(output / "bad_step-2")]) == 0
    printed = capsys.readouterr().out
    assert "step 2, rank 0: 'image-a', 'image-b'" in printed
    assert "micro-batch 0: loss nan (in the run nan)" in printed
    assert "weights that are not finite" not in printed
    first = printed.split("in the order they ran:\n")[1].splitlines()[0]
    assert "mm_projector.0 (Linear)" in first
    assert "as its input is" not in first
    assert "gradients that are not finite" in printed
    assert "first operation with a NaN gradient" in printed


def test_a_bad_gradient_stops_it_too_and_a_replay_is_exact(
    dropout_dir, tower_dir, two_kinds, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    argv = flags(
        dropout_dir, tower_dir, two_kinds, output, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    trainer = build_trainer(argv)
    head = trainer.model.get_output_embeddings().weight
    # Of the images' step alone; no loss shows it.
    head.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 1 else gradient)
    with pytest.raises(BadNumbersError, match=r"step 2: the gradient norm is nan\. .*rank 0: 'image-a' \| 'image-b'"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in trainer.model.parameters())
    capsys.readouterr()
    assert replay([str(output / "bad_step-2")]) == 1  # The hook is no part of the model.
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in json.loads((output / "bad_step-2" / "rank-0.json").read_text())["losses"]]
    assert len(losses) == 2
    assert all(f"micro-batch {i}: loss {loss} (in the run {loss})" in printed for i, loss in enumerate(losses))
    assert "all numbers are finite here: not reproduced" in printed


def test_without_the_check_the_weights_are_lost(overflowing_dir, tower_dir, two_kinds, tmp_path: Path) -> None:
    trainer = main(flags(overflowing_dir, tower_dir, two_kinds, tmp_path / "out", stop_on_bad_numbers="false"))
    assert trainer.model.get_output_embeddings().weight.isnan().any()
    assert not list((tmp_path / "out").glob("bad_step-*"))


def test_one_bad_rank_stops_both(overflowing_dir, tower_dir, two_kinds, tmp_path: Path, capsys, warm_python) -> None:
    samples = json.loads(two_kinds.read_text())
    data = two_kinds.with_name("rank-1-is-bad.json")
    data.write_text(json.dumps([samples[0], samples[2], samples[1], samples[3]]))
    output = tmp_path / "out"
    argv = flags(overflowing_dir, tower_dir, data, output, per_device_train_batch_size=1)
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
               "--log-dir", str(tmp_path / "logs"), "--redirects", "2", "-m", "llava.train.train", *argv]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert ended.returncode == 1, ended.stderr[-3000:]  # torchrun's own
    logs = {path.parent.name: path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")}
    everything, own = "rank 0: 'text-a'; rank 1: 'image-a'.", "on this rank: rank 1: 'image-a'."
    for rank, samples_of in (("0", everything), ("1", own)):
        assert "error: step 1: the loss of rank 1, micro-batch 0 is nan" in logs[rank]
        assert samples_of in logs[rank]
        assert "Traceback" not in logs[rank]
    stored = {path.name for path in (output / "bad_step-1").iterdir()}
    assert stored == {"run.json", "model", *(f"rank-{r}.{end}" for r in "01" for end in ("json", "safetensors"))}
    capsys.readouterr()
    assert replay([str(output / "bad_step-1"), "--rank", "0"]) == 1
    (loss,) = json.loads((output / "bad_step-1" / "rank-0.json").read_text())["losses"]
    assert f"micro-batch 0: loss {loss} (in the run {loss})" in capsys.readouterr().out
    assert replay([str(output / "bad_step-1"), "--rank", "1"]) == 0


SETTINGS = RunSettings(1, 1, "fp32", False, None, False, 16, "nf4", True, ["weight"])


def make_check(folder: Path, scales_loss: bool = False, save_model=lambda path: None) -> NanCheck:
    return NanCheck(str(folder), 0, torch.device("cpu"), SETTINGS, scales_loss, save_model)


def take_step(check: NanCheck, step: int, loss: float = 1.0, grad_norm: float | None = 1.0) -> None:
    check.begin({"input_ids": torch.tensor([[1]]), "sample_ids": ["a"]}, 3)
    check.add_loss(torch.tensor(loss))
    check.check(grad_norm, step)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "message"),
    [
        (float("nan"), 1.0, "micro-batch 0 is nan\\."),
        (float("inf"), 1.0, "micro-batch 0 is inf\\."),
        (float("-inf"), None, "micro-batch 0 is -inf\\."),
        (1.0, float("inf"), "step 4: the gradient norm is inf\\."),
        (1.0, -1.0, "step 4: the gradient norm is -1.0\\."),
        (float("nan"), float("nan"), "micro-batch 0 is nan, the gradient norm is nan\\."),
    ],
)
def test_what_is_no_finite_number(tmp_path: Path, loss: float, grad_norm: float | None, message: str) -> None:
    check = make_check(tmp_path)
    take_step(check, 3)
    take_step(check, 3, grad_norm=None)
    with pytest.raises(BadNumbersError, match=message):
        take_step(check, 4, loss, grad_norm)


def test_every_rank_stops_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(bad: torch.Tensor) -> torch.Tensor:
        return bad.index_fill(0, torch.tensor([0]), 1)

    def gather(own: tuple) -> list[tuple]:
        return [own, ([1.0, float("inf")], [["b"], ["c", "d"]])]

    monkeypatch.setattr("llava.train.nan_check.max_over_ranks", reduce)
    monkeypatch.setattr("llava.train.nan_check.gather_from_ranks", gather)
    check = make_check(tmp_path)
    check.settings = replace(SETTINGS, world_size=2)
    # Of an infinite loss the gradient may well be finite: this rank sees nothing wrong in its own numbers.
    with pytest.raises(
        BadNumbersError, match=r"of rank 1, micro-batch 1 is inf\. .*: rank 0: 'a'; rank 1: 'b' \| 'c', 'd'\."
    ):
        take_step(check, 1)


def test_a_loss_scale_may_overflow_but_not_for_ever(tmp_path: Path) -> None:
    check = make_check(tmp_path, scales_loss=True)
    for step in range(1, MOST_OVERFLOWS + 1):
        take_step(check, step, grad_norm=float("inf"))
    take_step(check, 60)
    assert check.overflows == MOST_OVERFLOWS
    for step in range(61, 61 + MOST_OVERFLOWS):
        take_step(check, step, grad_norm=float("nan"))
    with pytest.raises(BadNumbersError, match="the gradient norm is inf"):
        take_step(check, 200, grad_norm=float("inf"))
    with pytest.raises(BadNumbersError, match="micro-batch 0 is nan"):
        take_step(make_check(tmp_path, scales_loss=True), 1, loss=float("nan"))


def test_a_full_disk_does_not_hide_what_was_found(tmp_path: Path) -> None:
    def fail(path: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BadNumbersError, match=r"step 2: .* is nan.*could not be written to .*No space left on device"):
        take_step(make_check(tmp_path, save_model=fail), 2, loss=float("nan"))


def test_a_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    micro_batches = [
        {"input_ids": torch.tensor([[1, 2]]), "images": [image, image[:, :1]] * 6, "modalities": ["image"],
         "image_sizes": [[4, 5]], "sample_ids": ["è"]},
        {"input_ids": torch.tensor([[3]]).expand(2, 1), "sample_ids": []},
    ]  # fmt: skip
    states = {"cpu": torch.get_rng_state()}
    write_batch(tmp_path, RankBatch(7, 1, micro_batches, [1.5, float("inf")], float("inf"), 40.0, states))
    again = read_batch(tmp_path, 1)
    assert (again.step, again.rank, again.losses, again.grad_norm) == (7, 1, [1.5, float("inf")], float("inf"))
    assert again.sample_ids == [["è"], []]
    assert torch.equal(again.random_states["cpu"], states["cpu"])
    assert [batch.keys() for batch in again.micro_batches] == [set(batch) for batch in micro_batches]
    pairs = zip(again.micro_batches[0]["images"], micro_batches[0]["images"], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert again.micro_batches[0]["image_sizes"] == [[4, 5]]
    assert torch.equal(again.micro_batches[1]["input_ids"], torch.tensor([[3], [3]]))


def test_a_folder_without_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder bad_step-N of a stopped run: .*run\.json"):
        replay([str(tmp_path)])
