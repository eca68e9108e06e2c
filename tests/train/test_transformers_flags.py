"""Every flag of transformers works, is refused with a reason, or is known to have no effect."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from llava.train import engines
from llava.train.command_line import parse_arguments
from llava.train.engines import OPTIMIZERS, check_optimizer
from llava.train.evaluation import plan_evaluation
from llava.train.flag_tests import TESTS
from llava.train.train import TrainingArguments, build_trainer, main
from llava.train.transformers_flags import FLAGS, NO_EFFECT, REFUSED, TOPICS, WORKS
from tests.train.test_training import flags, losses, write_json

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]
REFUSALS = [(name, refusal) for name, flag in FLAGS.items() for refusal in flag.refusals if refusal.example]

TESTED = {
    "label_smoothing_factor": "test_a_smoothed_loss_is_a_mean_over_the_tokens_of_the_step",
    "neftune_noise_alpha": "test_noise_on_embeddings_is_for_training_alone",
    "optim": "test_every_optimizer_trains_or_is_refused",
    "optim_args": "test_arguments_that_an_optimizer_would_not_read_are_refused",
    "lr_scheduler_type": "test_every_schedule_trains",
    "lr_scheduler_kwargs": "test_settings_that_do_not_fit_the_schedule_are_found_before_the_model",
    "warmup_steps": "test_of_ratio_and_steps_the_steps_count",
    "include_num_input_tokens_seen": "test_tokens_seen_are_counted",
    "do_train": "test_a_checkpoint_is_evaluated_without_training",
    "do_eval": "test_data_to_evaluate_on_are_evaluated_at_the_end",
    "eval_on_start": "test_an_evaluation_without_data_is_refused",
    "eval_strategy": "test_an_evaluation_without_data_is_refused",
    "metric_for_best_model": "test_an_unknown_best_metric_is_found_before_the_model",
    "deepspeed": "test_sections_that_replace_our_optimizer_are_refused",
}
"""Flags that once did not do what they say, and the tests of this folder that hold them."""


# The table.


def test_the_table_has_every_field_of_the_installed_release() -> None:
    installed = {field.name for field in fields(transformers.TrainingArguments)}
    assert installed - set(FLAGS) == set()
    assert {name for name in set(FLAGS) - installed if not FLAGS[name].since} == set()


def test_the_table_has_every_optimizer_of_the_installed_release() -> None:
    assert {name.value for name in OptimizerNames} - set(OPTIMIZERS) == set()


def test_every_flag_that_works_names_a_test_that_has_it() -> None:
    assert set(TESTS) == {name for name, flag in FLAGS.items() if flag.effect == WORKS}
    for name, file in TESTS.items():
        text = (Path(__file__).parents[2] / file).read_text()
        assert re.search(rf"\b{name}\b", text), f"{file} does not have --{name}"


def test_every_entry_says_what_it_means() -> None:
    assert len(FLAGS) == sum(map(len, TOPICS.values())), "a flag stands below two topics"
    for name, flag in FLAGS.items():
        assert flag.effect in (WORKS, REFUSED, NO_EFFECT)
        assert flag.note
        assert bool(flag.refusals) or flag.effect != REFUSED, name


def test_what_was_wrong_once_has_a_test() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name, test in TESTED.items():
        assert FLAGS[name].effect == WORKS
        assert f"def {test}(" in text, test


@pytest.mark.parametrize(("name", "refusal"), REFUSALS, ids=[f"{name} {refusal.example}" for name, refusal in REFUSALS])
def test_what_is_refused_says_flag_and_reason(name: str, refusal: Any) -> None:
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"transformers {transformers.__version__} has no --{name}")
    with pytest.raises(ValueError, match=f"^--{name} ") as caught:
        parse_arguments([*REQUIRED, f"--{name}", *refusal.example.split(" ")])
    assert refusal.reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_no_command_line_can_say_is_refused_in_a_program() -> None:
    given = {"liger_kernel_config": {"rope": True}, "parallelism_config": object()}
    for name, value in given.items():
        with pytest.raises(ValueError, match=f"--{name} is "):
            TrainingArguments(output_dir="o", use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--gradient_checkpointing_kwargs", "{bad"],
            "--gradient_checkpointing_kwargs is '{bad', expected a JSON object",
        ),
        (["--lr_scheduler_kwargs", "min_lr=1"], "--lr_scheduler_kwargs is 'min_lr=1', expected a JSON object"),
        (["--accelerator_config", "none.json"], "--accelerator_config 'none.json' is no file"),
    ],
)
def test_values_that_cannot_be_read_name_the_flag(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*REQUIRED, *words])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr_scheduler_type", "cosin", "is 'cosin'; known: linear, cosine"),
        ("optim", "adam", "is 'adam'; known: adamw_torch"),
        ("eval_strategy", "step", "is 'step'; known: no, steps, epoch"),
        ("debug", "everything", "is 'everything'; known: underflow_overflow"),
    ],
)
def test_a_program_s_values_that_are_none_of_the_choices_name_the_flag(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} {message}"):
        TrainingArguments(output_dir="o", use_cpu=True, **{name: value})


def test_a_flag_without_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_arguments([*REQUIRED, "--length_column_name", "n", "--eval_use_gather_object", "true"])
    assert "--length_column_name has no effect: lengths are counted from the samples" in caplog.text
    assert "--eval_use_gather_object has no effect" in caplog.text
    caplog.clear()
    parse_arguments(REQUIRED)
    assert "has no effect" not in caplog.text


PASSED_ON = {
    "fp16_full_eval": "false", "torch_empty_cache_steps": 1, "log_on_each_node": "false", "log_level": "info",
    "log_level_replica": "error", "project": "p", "trackio_space_id": "s", "trackio_bucket_id": "b",
    "trackio_static_space_id": "t", "hub_private_repo": "true", "hub_strategy": "end", "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": "true", "ddp_timeout": 60, "ddp_find_unused_parameters": "false",
    "logging_nan_inf_filter": "false", "stop_on_bad_numbers": "false", "eval_do_concat_batches": "false",
    "eval_delay": 1, "restore_callback_states_from_checkpoint": "false", "skip_memory_metrics": "false",
    "bf16_full_eval": "true", "dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "local_rank": -1,
    "dataloader_multiprocessing_context": "fork", "use_cache": "true", "seed": 42,
}  # fmt: skip
"""Flags that transformers alone reads, or that say where and how a run computes, with values that change no weight."""


def test_flags_that_are_passed_on_are_taken_and_change_no_weight(llama_dir: Path, text_data: Path, tmp_path) -> None:
    installed = {name: value for name, value in PASSED_ON.items() if name in TrainingArguments.__dataclass_fields__}
    plain, other = tmp_path / "plain", tmp_path / "other"
    main(flags(llama_dir, None, text_data, plain, max_steps=2))
    trainer = main(flags(llama_dir, None, text_data, other, max_steps=2, **installed))
    assert (plain / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert losses(plain) == losses(other)
    for name in ("log_level_replica", "project", "ddp_bucket_cap_mb", "dataloader_prefetch_factor"):
        assert str(getattr(trainer.args, name)) == str(PASSED_ON[name])


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_take_settings(name: str) -> None:
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip(f"transformers {transformers.__version__} has no --{name}")
    settings = {"gradient_checkpointing": "gradient_checkpointing_kwargs",
                "activation_checkpointing": "activation_checkpointing_kwargs"}[name]  # fmt: skip
    words = [f"--{name}", "true", f"--{settings}", '{"use_reentrant": false}']
    arguments = parse_arguments([*REQUIRED, *words])[2]
    assert getattr(arguments, settings) == {"use_reentrant": False}
    assert arguments.gradient_checkpointing


@pytest.mark.parametrize(("name", "value"), [("torch_compile_mode", "reduce-overhead"), ("full_determinism", "true")])
def test_flags_that_are_only_taken(name: str, value: str) -> None:
    """What they do is torch's: here it is seen that they get there."""
    arguments = parse_arguments([*REQUIRED, f"--{name}", value])[2]
    assert str(getattr(arguments, name)).lower() == value
    assert arguments.torch_compile == (name == "torch_compile_mode")


def test_a_warm_up_that_a_schedule_does_not_have_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_arguments([*REQUIRED, "--lr_scheduler_type", "constant", "--warmup_steps", "3"])
    assert "--warmup_steps has no effect" in caplog.text


def test_compiling_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="--torch_compile is True"):
        parse_arguments([*REQUIRED, "--torch_compile", "true"])


def test_several_gpus_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process sees 2 GPUs; start one for each with torchrun"):
        build_trainer(REQUIRED)


# Warm-up and schedules.


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--warmup_steps 3 --warmup_ratio 0", 3),
        ("--warmup_ratio 0 --warmup_steps 3", 3),
        ("--warmup_ratio=0.0 --warmup_steps=3", 3),
        ("--warmup_ratio 0.25 --warmup_steps 0", 0.25),
        ("--warmup_steps 0 --warmup_ratio 0.25", 0.25),
        ("--warmup_steps 3 --warmup_ratio 0.25", 3),
        ("--warmup_ratio 0.25", 0.25),
        ("--warmup_steps 3", 3),
        ("--warmup_steps 0 --warmup_ratio 0", 0),
    ],
)
def test_of_ratio_and_steps_the_steps_count(words: str, steps: float) -> None:
    assert parse_arguments([*REQUIRED, *words.split()])[2].warmup_steps == steps


def test_the_warm_up_of_a_command_line_overrides_that_of_its_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("warmup_steps: 100\nwarmup_ratio: 0\n")
    argv = [*REQUIRED, "--config", str(recipe)]
    assert parse_arguments(argv)[2].warmup_steps == 100
    assert parse_arguments([*argv, "--warmup_ratio", "0.25"])[2].warmup_steps == 0.25


@pytest.mark.parametrize("ratio", ["1", "1.5", "-0.1"])
def test_a_ratio_that_would_be_steps_is_refused(ratio: str) -> None:
    with pytest.raises(ValueError, match=f"--warmup_ratio is {ratio}"):
        parse_arguments([*REQUIRED, "--warmup_ratio", ratio])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr_scheduler_kwargs", '{"min_lr": 1}'], "linear cannot be made with .*unexpected keyword argument"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "cosine_with_min_lr cannot be made with"),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": "two"}'],
            "cosine cannot be made with",
        ),
        (
            ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 5}'],
            "polynomial cannot be made with",
        ),
    ],
)
def test_settings_that_do_not_fit_the_schedule_are_found_before_the_model(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"--lr_scheduler_type {message}"):
        parse_arguments([*REQUIRED, *words])


_SETTINGS = {
    "cosine_with_min_lr": {"min_lr": 1e-5}, "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_trains(name: str, llama_dir: Path, text_data: Path, tmp_path: Path) -> None:
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "eval_data_path": text_data}
    argv = flags(llama_dir, None, text_data, tmp_path / "out", max_steps=3, lr_scheduler_type=name, warmup_steps=1,
                 lr_scheduler_kwargs=json.dumps(_SETTINGS.get(name, {})),
                 **(evaluates if name in ("reduce_lr_on_plateau", "greedy") else {}))  # fmt: skip
    main(argv)
    assert len(losses(tmp_path / "out")) == 3


# Optimizers.


@pytest.fixture(scope="module")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = [{"id": i, "conversations": [{"from": "gpt", "value": "Il gatto dorme sul divano."}]} for i in range(4)]
    return write_json(tmp_path_factory.mktemp("text") / "text.json", text)


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optimizer_trains_or_is_refused(name: str, llama_dir: Path, text_data: Path, tmp_path: Path) -> None:
    rule = OPTIMIZERS[name]
    argv = flags(llama_dir, None, text_data, tmp_path / "out", max_steps=3, optim=name)
    missing = rule.package is not None and importlib.util.find_spec(rule.package[1]) is None
    if rule.refused or missing:
        with pytest.raises(ValueError, match=f"--optim {name} (is not available: .*; known: |needs the package )"):
            parse_arguments(argv)
        return
    trainer = main(argv)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert {group["part"] for group in trainer.optimizer.param_groups} == {"mm_language_model"}


def test_a_missing_package_is_named_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="--optim stable_adamw needs the package torch-optimi: pip install torch-optimi"
    ):
        check_optimizer("stable_adamw", None)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sgd", "momentun=0.9", "'momentun': sgd takes momentum, dampening, nesterov"),
        ("sgd", "momentum", "expected key=value"),
        ("sgd", "momentum=much", "it is a number"),
        ("sgd", "nesterov=perhaps", "it is true or false"),
        ("adamw_torch", "eps=1", "adamw_torch takes none"),
    ],
)
def test_arguments_that_an_optimizer_would_not_read_are_refused(name: str, arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*REQUIRED, "--optim", name, "--optim_args", arguments])
    assert parse_arguments([*REQUIRED, "--optim", "sgd", "--optim_args", "momentum=0.9, nesterov=true"])


def test_8_bit_optimizers_hold_embeddings_in_32(load_tiny, mixed_data: Path, gpt2_dir, tower_dir, tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    argv = flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", max_steps=1, optim="adamw_bnb_8bit", stage="2",
                 image_aspect_ratio="pad", num_temporal_tokens=200, num_spatial_tokens=200)  # fmt: skip
    trainer = main(argv)
    state = trainer.optimizer.optimizer.state
    precision = {name: state[parameter]["state1"].dtype for name, parameter in trainer.model.named_parameters()
                 if parameter in state and parameter.numel() >= 4096}  # fmt: skip
    whole = {name for name, dtype in precision.items() if dtype == torch.float32}
    embeddings = {name for name, module in trainer.model.named_modules() if isinstance(module, nn.Embedding)}
    assert {name for name in precision if name.removesuffix(".weight") in embeddings} <= whole
    assert any("coordinates" in name for name in whole)
    assert torch.uint8 in precision.values()


# What single flags do.


def test_noise_on_embeddings_is_for_training_alone(gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    same = {"max_steps": 1, "learning_rate": 0, "eval_data_path": mixed_data}
    plain = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "plain", **same))
    noisy = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "noisy", **same, neftune_noise_alpha=50))
    assert losses(tmp_path / "noisy")[0] != losses(tmp_path / "plain")[0]
    evaluated = [[entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
                 for trainer in (plain, noisy)]  # fmt: skip
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize(("given", "kind"), [("all", "all"), ("true", "all"), ("non_padding", "non_padding")])
def test_tokens_seen_are_counted(given: str, kind: str, gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", max_steps=1, per_device_train_batch_size=2,
                         train_sampling_strategy="sequential", include_num_input_tokens_seen=given))  # fmt: skip
    lengths = [len(trainer.train_dataset[i].input_ids) for i in range(2)]
    assert trainer.state.num_input_tokens_seen == (2 * max(lengths) if kind == "all" else sum(lengths))


def test_the_switch_for_tokens_seen_needs_no_value() -> None:
    assert parse_arguments([*REQUIRED, "--include_num_input_tokens_seen"])[2].include_num_input_tokens_seen == "all"
    assert parse_arguments(REQUIRED)[2].include_num_input_tokens_seen == "no"
    assert TrainingArguments(output_dir="o", use_cpu=True, include_num_input_tokens_seen=True)
    arguments = TrainingArguments(output_dir="o", use_cpu=True, include_num_input_tokens_seen=False)
    assert arguments.include_num_input_tokens_seen == "no"


# Evaluations.


def test_data_to_evaluate_on_are_evaluated_at_the_end(gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, output, max_steps=2, eval_data_path=mixed_data))
    written = json.loads((output / "eval_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2]
    assert written["eval_loss"] == evaluations[0]["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_a_checkpoint_is_evaluated_without_training(gpt2_dir, tower_dir, mixed_data, tmp_path: Path, capsys) -> None:
    trained, output = tmp_path / "trained", tmp_path / "out"
    main(flags(gpt2_dir, tower_dir, mixed_data, trained, max_steps=2, eval_data_path=mixed_data))
    expected = json.loads((trained / "eval_results.json").read_text())["eval_loss"]
    capsys.readouterr()
    main(flags(trained, None, tmp_path / "not there.json", output, eval_data_path=mixed_data, do_train="false"))
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert "eval_loss" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["all_results.json", "eval_results.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_strategy", "epoch"], "--eval_strategy epoch asks for an evaluation, but .* give --eval_data_path"),
        (["--eval_on_start", "true"], "--eval_on_start asks for an evaluation, but .* give --eval_data_path"),
        (["--do_eval", "true"], "--do_eval asks for an evaluation, but .* give --eval_data_path"),
        (["--do_eval"], "--do_eval asks for an evaluation, but .* give --eval_data_path"),
        (["--do_train", "false"], "--do_train false leaves nothing to do"),
    ],
)
def test_an_evaluation_without_data_is_refused(words: list[str], message: str) -> None:
    # The model does not exist: no weight is looked for.
    with pytest.raises(ValueError, match=message):
        build_trainer([*REQUIRED, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--do_eval", "false"], "--do_train false leaves nothing to do"),
        (["--resume_from_checkpoint", "auto"], "is for training, but --do_train is false"),
        (["--deepspeed", "zero3"], "--deepspeed is for training"),
    ],
)
def test_what_an_evaluation_alone_cannot_have_is_refused(words: list[str], message: str) -> None:
    arguments = TrainingArguments(output_dir="o", use_cpu=True, do_train=False)
    for name, value in zip(words[::2], words[1::2], strict=True):
        setattr(arguments, name[2:], False if value == "false" else value)
    with pytest.raises(ValueError, match=message):
        plan_evaluation(arguments, has_data=True, computes_metrics=False)


def test_an_unknown_best_metric_is_found_before_the_model() -> None:
    words = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end", "true",
             "--eval_data_path", "e.json", "--metric_for_best_model"]  # fmt: skip
    with pytest.raises(
        ValueError, match="--metric_for_best_model is 'accuracy'; evaluations give loss, exact_match, runtime"
    ):
        build_trainer([*REQUIRED, *words, "accuracy"])
    for name in ("loss", "eval_loss"):
        plan_evaluation(parse_arguments([*REQUIRED, *words, name])[2], has_data=True, computes_metrics=False)


def test_the_best_of_two_evaluations_is_evaluated_once_more(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", max_steps=2, eval_data_path=mixed_data,
                         eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, do_eval="true",
                         load_best_model_at_end="true", metric_for_best_model="eval_loss", learning_rate=30,
                         max_grad_norm=0, optim="sgd"))  # fmt: skip
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3
    written = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"]
    assert written == pytest.approx(min(evaluations), abs=1e-6)
