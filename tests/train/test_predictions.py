"""Predictions of a program of one's own, and the smoothed loss that training alone has."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.data.collator import SupervisedCollator, model_inputs
from llava.model.loss import RowCounts, counting_rows, load_balancing_loss, supervised_loss
from llava.train.train import build_trainer, main
from tests.train.test_training import ROOT, flags, losses, write_json

IDS = ["video-a", "video-b", "image-a", "image-b", "both", "text-1", "text-2"]


@pytest.fixture
def argv(gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path) -> list[str]:
    return flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", eval_data_path=mixed_data, max_steps=1,
                 per_device_eval_batch_size=3)  # fmt: skip


def accuracy(predictions: Any) -> dict[str, float]:
    guesses, labels = predictions.predictions[:, :-1].argmax(-1), predictions.label_ids[:, 1:]
    learned = labels != IGNORE_INDEX
    return {"accuracy": float((guesses == labels)[learned].mean()), "tokens": int(learned.sum())}


def one_by_one(trainer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and labels of each sample of the evaluation data, from the model alone."""
    model, collate = trainer.model.eval(), SupervisedCollator(0)
    batches = [model_inputs(collate([trainer.eval_dataset[i]])) for i in range(len(trainer.eval_dataset))]
    with torch.no_grad():
        return [(model(**batch).logits[0], batch["labels"][0]) for batch in batches]


def assert_rows(predictions: np.ndarray, label_ids: np.ndarray, expected: list) -> None:
    assert len(predictions) == len(label_ids) == len(expected)
    for row, labels, (logits, own) in zip(predictions, label_ids, expected, strict=True):
        assert labels[: len(own)].tolist() == own.tolist()
        assert set(labels[len(own) :].tolist()) <= {IGNORE_INDEX}
        np.testing.assert_allclose(row[: len(own)], logits.numpy(), atol=1e-4)


def assert_parts(metrics: dict[str, float], expected: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The loss of each modality is a mean over its own tokens: the sample with an image and a clip is a video's."""
    kinds = ["video", "video", "image", "image", "video", "text", "text"]
    summed, counted = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0)
    for kind, (logits, labels) in zip(kinds, expected, strict=True):
        learned = labels[1:] != IGNORE_INDEX
        summed[kind] += float(
            torch.nn.functional.cross_entropy(logits[:-1][learned], labels[1:][learned]) * learned.sum()
        )
        counted[kind] += int(learned.sum())
    assert {kind: metrics[f"eval_{kind}_loss"] for kind in summed} == pytest.approx(
        {kind: summed[kind] / counted[kind] for kind in summed}, rel=1e-5
    )
    assert metrics["eval_exact_match"] == 0.0


def test_a_program_of_ten_lines_gets_its_metrics(argv: list[str]) -> None:
    trainer = build_trainer(argv, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    expected = one_by_one(trainer)
    hits = [(logits[:-1].argmax(-1) == labels[1:])[labels[1:] != IGNORE_INDEX] for logits, labels in expected]
    assert metrics["eval_tokens"] == len(torch.cat(hits))
    assert metrics["eval_accuracy"] == pytest.approx(float(torch.cat(hits).float().mean()))
    assert_parts(metrics, expected)
    trainer.train()
    assert trainer.evaluate()["eval_tokens"] == metrics["eval_tokens"]


@pytest.mark.parametrize("strategy", ["random", "group_by_modality_length"])
def test_predictions_are_rows_in_the_order_of_the_data(strategy: str, argv: list[str]) -> None:
    trainer = build_trainer([*argv, "--train_sampling_strategy", strategy, "--eval_accumulation_steps", "1"])
    made = trainer.predict(trainer.eval_dataset)
    assert trainer.predicted_ids == IDS
    assert_rows(made.predictions, made.label_ids, one_by_one(trainer))
    assert made.metrics["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_metrics_batch_by_batch_know_the_last_batch(argv: list[str]) -> None:
    seen: list[tuple[int, int, int, bool]] = []

    def collect(batch: Any, compute_result: bool) -> dict[str, float]:
        seen.append((len(batch.predictions), len(batch.label_ids), len(batch.losses), compute_result))
        return {"rows": float(sum(rows for rows, *_ in seen))} if compute_result else {}

    words = ["--batch_eval_metrics", "true", "--include_for_metrics", "loss", "inputs"]
    assert build_trainer([*argv, *words], compute_metrics=collect).evaluate()["eval_rows"] == 7
    assert seen == [(3, 3, 3, False), (3, 3, 3, False), (1, 1, 1, True)]


def test_losses_and_inputs_are_rows_too(argv: list[str]) -> None:
    seen: list[Any] = []

    def keep(predictions: Any) -> dict[str, float]:
        seen.append(predictions)
        return {}

    build_trainer([*argv, "--include_for_metrics", "loss", "inputs"], compute_metrics=keep).evaluate()
    assert len(seen[0].losses) == len(seen[0].inputs) == len(seen[0].predictions) == 7
    learned = seen[0].label_ids != IGNORE_INDEX
    assert (seen[0].inputs[learned] == seen[0].label_ids[learned]).all()


def test_logits_may_be_made_smaller_before_they_are_kept(argv: list[str]) -> None:
    trainer = build_trainer(
        argv,
        compute_metrics=lambda made: {"width": made.predictions.ndim, "rows": len(made.predictions)},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_width"], metrics["eval_rows"]) == (2, 7)


def test_the_loss_alone_keeps_no_logits(argv: list[str]) -> None:
    trainer = build_trainer([*argv, "--prediction_loss_only", "true"])
    made = trainer.predict(trainer.eval_dataset)
    assert made.predictions is None
    assert made.metrics["test_loss"] > 0


def test_bad_samples_have_no_row(argv: list[str], mixed_data: Path, tmp_path: Path) -> None:
    samples = json.loads(mixed_data.read_text())
    samples[1]["video"] = "missing.mp4"
    data = write_json(mixed_data.parent / "one-bad.json", samples)
    trainer = build_trainer([*argv, "--eval_data_path", str(data), "--on_bad_sample", "skip"])
    made = trainer.predict(trainer.eval_dataset)
    assert trainer.predicted_ids == [name for name in IDS if name != "video-b"]
    assert len(made.predictions) == len(made.label_ids) == 6


def test_the_label_of_a_coordinate_is_its_nearest_bin(load_tiny, media_dir: Path) -> None:
    from tests.model.test_coordinates import HOUT, SAMPLES, WOUT, load_grounded, make_batch

    data = write_json(media_dir / "grounded-labels.json", SAMPLES)
    loaded = load_grounded(load_tiny)
    batch = make_batch(loaded, data, [0])
    targets = loaded.model.target_ids(batch["input_ids"], batch["labels"], batch["variables"])
    changed = targets != batch["labels"]
    grounding = loaded.model.grounding
    bins = [
        grounding.first_bin_of(axis) + round(at * 99)
        for axis, name in (("WIDTH", WOUT), ("HEIGHT", HOUT))
        for at in batch["variables"][0][name]
    ]
    assert len(bins) == 4
    assert sorted(targets[changed].tolist()) == sorted(bins)


def test_a_loss_function_of_one_s_own_sees_logits_and_labels(argv: list[str]) -> None:
    trainer = build_trainer(argv)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        predicted = labels[:, 1:] != IGNORE_INDEX
        return supervised_loss_of(outputs.logits[:, :-1][predicted], labels[:, 1:][predicted], num_items_in_batch)

    expected = main([*argv, "--do_eval", "false"]).state.log_history[0]["loss"]
    trainer.compute_loss_func = loss
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def supervised_loss_of(logits: torch.Tensor, labels: torch.Tensor, num_items: Any) -> torch.Tensor:
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items is None else num_items)


def test_a_best_metric_of_a_program_is_known_before_the_first_step(argv: list[str]) -> None:
    words = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1",
             "--load_best_model_at_end", "true", "--metric_for_best_model"]  # fmt: skip
    trainer = build_trainer([*argv, *words, "accurcy"], compute_metrics=accuracy)
    with pytest.raises(ValueError, match=r"--metric_for_best_model is 'accurcy'; evaluations give .*accuracy, tokens"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.args.metric_for_best_model = "accuracy"
    trainer.train()
    assert trainer.state.best_metric is not None


# Label smoothing.


def by_hand(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The sum over tokens of -(1 - e) log p(target) - e mean(log p), targets being distributions."""
    log_probabilities = logits.double().log_softmax(-1)
    mixed = (1 - smoothing) * targets.double() + smoothing / logits.shape[-1]
    return -(mixed * log_probabilities).sum()


def test_a_smoothed_loss_equals_the_hand_computation() -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 5, 7), torch.tensor([[0, -100, 3, 6, 1], [2, 2, -100, -100, 5]])
    predicted = labels[:, 1:] != IGNORE_INDEX
    targets = torch.nn.functional.one_hot(labels[:, 1:][predicted], 7)
    expected = by_hand(hidden[:, :-1][predicted], targets, 0.3)
    for num_items, count in ((None, 5), (11, 11)):
        found = supervised_loss(hidden, labels, torch.nn.Identity(), num_items, 0.3)
        torch.testing.assert_close(found.double(), expected / count, rtol=1e-6, atol=0)


def test_two_hot_targets_are_smoothed_and_kept(load_tiny, media_dir: Path) -> None:
    from llava.model.coordinates import find_coordinate_tokens, two_hot_targets
    from tests.model.test_coordinates import SAMPLES, load_grounded, make_batch

    data = write_json(media_dir / "grounded-smooth.json", SAMPLES)
    loaded = load_grounded(load_tiny)
    model, batch = loaded.model.eval(), make_batch(loaded, data)
    output = model(**batch, smoothing=0.2)
    placed = find_coordinate_tokens(batch["input_ids"], model.grounding, batch["variables"])
    two_hot = two_hot_targets(batch["labels"], model.grounding, placed)
    predicted = batch["labels"][:, 1:] != IGNORE_INDEX
    logits = output.logits[:, :-1][predicted]
    rows = torch.arange(len(logits))
    targets = torch.zeros_like(logits, dtype=torch.float64)
    lower, upper, fraction = (target[:, 1:][predicted] for target in two_hot)
    targets[rows, lower] += 1 - fraction.double()
    targets[rows, upper] += fraction.double()
    assert (fraction > 0).any()
    counted: list[RowCounts] = []
    with counting_rows(counted):
        plain = model(**batch)
    assert float(counted[0].losses.sum()) == pytest.approx(float(plain.loss.detach()) * len(logits), rel=1e-5)
    nearest = logits.argmax(1) == torch.where(fraction > 0.5, upper, lower)
    assert (int(counted[0].targets.sum()), int(counted[0].hits.sum())) == (len(logits), int(nearest.sum()))
    expected = by_hand(logits, targets, 0.2) / len(logits)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)


def test_smoothing_keeps_the_balance_of_experts(load_tiny, mixed_data: Path) -> None:
    from tests.model.test_coordinates import make_batch

    loaded = load_tiny("llava_mixtral")
    model, batch = loaded.model.eval(), make_batch(loaded, mixed_data, [0, 5])
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    output = model(**batch, smoothing=0.2)
    predicted = batch["labels"][:, 1:] != IGNORE_INDEX
    logits = output.logits[:, :-1][predicted]
    targets = torch.nn.functional.one_hot(batch["labels"][:, 1:][predicted], logits.shape[-1])
    balance = load_balancing_loss(output.router_logits, model.config, batch["attention_mask"])
    expected = by_hand(logits, targets, 0.2) / len(logits) + 0.5 * balance
    torch.testing.assert_close(output.loss.double(), expected.double(), rtol=1e-5, atol=0)


def test_a_smoothed_loss_is_a_mean_over_the_tokens_of_the_step(gpt2_dir, tower_dir, mixed_data, tmp_path) -> None:
    step = {"max_steps": 1, "label_smoothing_factor": 0.1, "train_sampling_strategy": "sequential",
            "eval_data_path": mixed_data, "learning_rate": 0}  # fmt: skip
    whole = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "whole", **step, per_device_train_batch_size=6))
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "parts", **step, per_device_train_batch_size=2,
               gradient_accumulation_steps=3))  # fmt: skip
    plain = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "plain", **{**step, "label_smoothing_factor": 0},
                       per_device_train_batch_size=6))  # fmt: skip
    batch = model_inputs(SupervisedCollator(0)([whole.train_dataset[i] for i in range(6)]))
    with torch.no_grad():
        logits = plain.model(**batch).logits
    predicted = batch["labels"][:, 1:] != IGNORE_INDEX
    targets = torch.nn.functional.one_hot(batch["labels"][:, 1:][predicted], logits.shape[-1])
    expected = float(by_hand(logits[:, :-1][predicted], targets, 0.1) / predicted.sum())
    for name in ("whole", "parts"):
        assert losses(tmp_path / name) == pytest.approx([expected], rel=1e-5)
    assert losses(tmp_path / "plain")[0] != losses(tmp_path / "whole")[0]
    # Evaluations of both are of the same loss.
    assert whole.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_smoothed_training_learns_the_shifted_labels(gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    data = write_json(mixed_data.parent / "two-smooth.json", json.loads(mixed_data.read_text())[:2])
    trainer = main(flags(gpt2_dir, tower_dir, data, tmp_path / "out", max_steps=120, per_device_train_batch_size=2,
                         learning_rate=5e-3, label_smoothing_factor=0.1, eval_data_path=data))  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_video_loss"])
    assert metrics["eval_loss"] < 0.3
    assert "eval_text_loss" not in metrics
    # It would write each of the two as it stands, which is what an exact match says.
    assert metrics["eval_exact_match"] == 1.0


# Several ranks.

RANKS = """
import json, sys
from llava.train.train import build_trainer
argv = json.loads(sys.argv[1])
seen = []
def keep(made):
    seen.append((made.predictions.tolist(), made.label_ids.tolist()))
    return {"rows": len(made.predictions)}
trainer = build_trainer(argv, compute_metrics=keep)
metrics = trainer.evaluate()
made = trainer.predict(trainer.eval_dataset)
assert made.predictions.tolist() == seen[0][0]
if trainer.args.process_index == 0:
    with open(sys.argv[2], "w") as file:
        json.dump({"ids": trainer.predicted_ids, "predictions": seen[0][0], "labels": seen[0][1],
                   "metrics": metrics, "rows": metrics["eval_rows"]}, file)
"""


def test_two_ranks_give_every_sample_once(argv: list[str], tmp_path: Path, warm_python: str) -> None:
    program, result = tmp_path / "program.py", tmp_path / "result.json"
    program.write_text(RANKS)
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(program),
               json.dumps(argv), str(result)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(result.read_text())
    trainer = build_trainer(argv)
    assert (found["ids"], found["rows"]) == (IDS, 7)
    assert_rows(np.array(found["predictions"]), np.array(found["labels"]), one_by_one(trainer))
    assert found["metrics"]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert_parts(found["metrics"], one_by_one(trainer))
