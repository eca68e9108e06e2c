"""A run goes on as itself or not at all: what may change, what may not, and what is said of each."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ITALIAN, make_tower, turns
from safetensors.torch import load_file, save_file

from llava.train.checkpoint import RUN_IDENTITY, write_checksums
from llava.train.train import cli, main

STEPS = 4
Flags = Callable[..., list[str]]


def words(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def base(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of its own, which tests may copy and change."""
    return shutil.copytree(gpt2_dir, tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.json"
    samples = [{"id": f"s{i}", "conversations": turns("Dimmi.", f"{ITALIAN[i % 5]} {i}")} for i in range(8)]
    path.write_text(json.dumps(samples))
    return path


def line(base: Path, texts: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "model_name_or_path": base, "data_path": texts, "output_dir": output, "max_steps": STEPS, "save_steps": 2,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
        "use_cpu": "true", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return words({name: value for name, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def finished(base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of text that is complete."""
    output = tmp_path_factory.mktemp("finished") / "out"
    main(line(base, texts, output))
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- what makes another run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 5e-4}, "--learning_rate was 0.001, is 0.0005"),
        ({"weight_decay": 0.1}, "--weight_decay was 0, is 0.1"),
        ({"optim": "adafactor"}, "--optim was adamw_torch_fused, is adafactor"),
        ({"adam_beta2": 0.95}, "--adam_beta2 was 0.999, is 0.95"),
        ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type was linear, is cosine"),
        ({"warmup_steps": 2}, "--warmup_steps was"),
        ({"seed": 7}, "--seed was 42, is 7"),
        ({"version": "v1"}, "--version was plain_lm, is v1"),
        ({"model_max_length": 100}, "--model_max_length was 512, is 100"),
        ({"freeze_embeddings": "true"}, "--freeze_embeddings was False, is True"),
        ({"bf16": "true"}, "--bf16 was False, is True"),
        ({"max_steps": 3}, "steps in all (--max_steps): 4 before, 3 now"),
        ({"per_device_train_batch_size": 4}, "samples of a step was 2, is 4"),
        ({"max_grad_norm": 0.5, "seed": 3}, "--max_grad_norm was 1, is 0.5; --seed was 42, is 3"),
    ],
)  # fmt: skip
def test_another_run_is_not_gone_on_with(
    base: Path, texts: Path, output: Path, finished: Path, changes: dict, said: str, capfd
) -> None:
    assert cli(lambda: main(line(base, texts, output, resume_from_checkpoint="auto", **changes))) == 2
    error = capfd.readouterr().err
    assert said in error
    assert "another --output_dir" in error or "--ignore_data_skip" in error
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert same(output, finished)
    assert not list(output.glob("run.lock*"))


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.ln_1.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def smaller(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.n_layer = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-5]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_weights, "--model_name_or_path was {base} (hash "),
        (smaller, "trainable parameters"),
        (other_tokenizer, "the tokenizer was {base} (hash "),
    ],
)
def test_another_base_model_is_named(base: Path, texts: Path, output: Path, tmp_path: Path, spoil, said: str) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    spoil(other)
    with pytest.raises(ValueError, match="was written by another run") as error:
        main(line(other, texts, output, resume_from_checkpoint="auto"))
    assert said.format(base=base) in str(error.value)
    assert "\n" not in str(error.value)


def test_edited_answers_are_noticed(base: Path, texts: Path, output: Path, tmp_path: Path) -> None:
    samples = json.loads(texts.read_text())
    samples[3]["conversations"][1]["value"] += "!"
    edited = tmp_path / "texts.json"
    edited.write_text(json.dumps(samples))
    with pytest.raises(ValueError, match=r"the content of --data_path was .*texts\.json \(hash"):
        main(line(base, edited, output, resume_from_checkpoint="auto"))


def test_vision_settings_and_tower(base: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path) -> None:
    vision = {"vision_tower": tower_dir, "num_frames": 3, "max_steps": 1, "save_steps": 1}
    output = tmp_path / "out"
    main(line(base, mixed_data, output, **vision))
    other = tmp_path / "tower"
    shutil.copytree(tower_dir, other)
    # The same settings said in full, and the tower elsewhere, are the same run.
    explicit = vision | {"vision_tower": other, "mm_projector_type": "mlp2x_gelu", "num_frames": 3, "max_steps": 2}
    main(line(base, mixed_data, output, **explicit, resume_from_checkpoint="auto"))
    # The same weights, and another arithmetic.
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    for changes, said in (
        ({"num_frames": 2}, "--num_frames was 3, is 2"),
        ({"mm_projector_type": "linear"}, "--mm_projector_type was mlp2x_gelu, is linear"),
        ({"image_aspect_ratio": "pad"}, "--image_aspect_ratio was square, is pad"),
        ({"mm_tunable_parts": "mm_mlp_adapter"}, "--mm_tunable_parts was mm_language_model,mm_mlp_adapter, is mm_mlp"),
        ({"mm_projector_lr": 1e-4}, "--mm_projector_lr was 0.001, is 0.0001"),
        ({"vision_tower": make_tower(tmp_path / "deeper", layers=4)}, "--vision_tower was"),
        ({"vision_tower": other}, "--vision_tower was"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="was written by another run") as error:
            main(line(base, mixed_data, output, **vision | changes, resume_from_checkpoint="auto"))
        assert said in str(error.value)


def test_other_adapters(llama_dir: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"lora_enable": "true", "lora_r": 4, "max_steps": 1, "save_steps": 1}
    output = tmp_path / "out"
    main(line(llama_dir, texts, output, **lora))
    with pytest.raises(ValueError, match="--lora_alpha was 16, is 32"):
        main(line(llama_dir, texts, output, **lora, lora_alpha=32, resume_from_checkpoint="auto"))
    # The default, said in full, and more steps.
    main(line(llama_dir, texts, output, **lora | {"max_steps": 2}, lora_alpha=16, resume_from_checkpoint="auto"))


# --- what may change ---------------------------------------------------------------------------------


def test_what_may_change_is_listed(
    base: Path, texts: Path, finished: Path, output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    moved_model, moved_texts = shutil.copytree(base, tmp_path / "moved"), shutil.copy(texts, tmp_path / "moved.json")
    (output / "checkpoint-4").rename(tmp_path / "checkpoint-4")
    (output / RUN_IDENTITY).unlink()
    changes = {
        "logging_steps": 2, "dataloader_num_workers": 1, "attn_implementation": "eager", "save_steps": 1,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    trainer = main(line(moved_model, moved_texts, output, **changes))
    listed = next(record.getMessage() for record in caplog.records if "with changes" in record.getMessage())
    for said in (
        "--logging_steps was 1, is 2", "--dataloader_num_workers was 0, is 1",
        "--attn_implementation was None, is eager",
        f"--model_name_or_path was {base}, is {moved_model} (its content is the same)",
        f"the content of --data_path was {texts}, is {moved_texts} (its content is the same)",
    ):  # fmt: skip
        assert said in listed
    # What may change counts from now on.
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps[-1] == 4
    assert (output / "checkpoint-3").is_dir()
    one, other = weights(output), weights(finished)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_more_steps_go_on_along_the_longer_schedule(base: Path, texts: Path, output: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    trainer = main(line(base, texts, output, max_steps=8, resume_from_checkpoint="auto"))
    assert "steps in all (--max_steps): 4 before, 8 now, along whose schedule" in caplog.text
    assert "learning rates that the run goes on with: mm_language_model 0.0005" in caplog.text
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    # Linear to zero in 8 steps from step 4 on; the first 4 are those of the shorter run.
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4])
    assert trainer.state.global_step == 8


# --- on request --------------------------------------------------------------------------------------


def test_changed_settings_are_in_force_on_request(base: Path, texts: Path, output: Path, caplog) -> None:
    shutil.rmtree(output / "checkpoint-4")
    changes = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.5, "resume_changed": "true"}
    trainer = main(line(base, texts, output, resume_from_checkpoint="auto", **changes))
    assert "as another run (--resume_changed): --adam_beta1 was 0.9, is 0.5; --learning_rate was" in caplog.text
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    assert rates[3] == pytest.approx(1e-2 * 2 / 4)
    assert rates[4] == pytest.approx(1e-2 * 1 / 4)
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert {group["betas"][0] for group in groups} == {0.5}
    # The run is another one from now on.
    assert json.loads((output / "checkpoint-4" / RUN_IDENTITY).read_text())["fixed"]["learning_rate"] == 1e-2


@pytest.mark.parametrize("changes", [{"optim": "adafactor"}, {"freeze_embeddings": "true"}])
def test_another_optimizer_begins_anew_on_request(base: Path, texts: Path, output: Path, changes: dict, caplog) -> None:
    shutil.rmtree(output / "checkpoint-4")
    argv = line(base, texts, output, resume_from_checkpoint="auto", resume_changed="true", **changes)
    trainer = main(argv)
    assert "begins anew" in caplog.text
    assert trainer.state.global_step == STEPS
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}
    assert rates[4] == pytest.approx(1e-3 / 4)


def test_edited_data_begin_an_epoch_on_request(base: Path, texts: Path, output: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads(texts.read_text())[:6]))
    trainer = main(line(base, fewer, output, max_steps=6, resume_from_checkpoint="auto", resume_changed="true"))
    assert trainer.data.position(trainer.state.global_step) == (1, 2)


def test_a_checkpoint_that_does_not_say_whose_it_is(base: Path, texts: Path, output: Path, caplog) -> None:
    for step in (2, 4):
        (output / f"checkpoint-{step}" / RUN_IDENTITY).unlink()
        write_checksums(output / f"checkpoint-{step}")
    (output / RUN_IDENTITY).unlink()
    with pytest.raises(ValueError, match=r"has no run_identity\.json \(an earlier version wrote it\)"):
        main(line(base, texts, output, resume_from_checkpoint="auto"))
    main(line(base, texts, output, resume_from_checkpoint="auto", resume_changed="true"))
    assert "nothing tells whether it is of this run" in caplog.text


def test_what_a_longer_run_says_is_of_its_own_steps(base: Path, texts: Path, tmp_path: Path, caplog) -> None:
    output, few = tmp_path / "out", {"logging_steps": 10, "save_steps": 100}
    main(line(base, texts, output, max_steps=12, **few))
    with caplog.at_level(logging.INFO):
        longer = main(line(base, texts, output, max_steps=14, **few, resume_from_checkpoint="auto"))
    assert longer.state.global_step == 14
    train_loss = longer.state.log_history[-1]["train_loss"]
    if hasattr(longer, "_initial_global_step"):  # Earlier releases divide by all steps there ever were.
        assert 1 < train_loss < 8, "the losses of steps 11 and 12 are not those of steps 13 and 14"
    told = [record.getMessage() for record in caplog.records if "learning rates that" in record.getMessage()]
    assert len(told) == 1
    assert told[0].count("mm_language_model") == 1


def test_a_run_that_is_refused_is_not_said_to_go_on(base: Path, texts: Path, output: Path, caplog) -> None:
    argv = line(base, texts, output, max_steps=8, learning_rate=0.01, resume_from_checkpoint="auto")
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match=r"--learning_rate was 0\.001, is 0\.01"):
        main(argv)
    assert "going on from" not in caplog.text


# --- finished runs -----------------------------------------------------------------------------------


def test_a_finished_run_says_so(base: Path, texts: Path, output: Path, finished: Path, capfd) -> None:
    assert cli(lambda: main(line(base, texts, output, resume_from_checkpoint="auto")) and None) == 0
    assert f"the run in {output} is finished: all of its 4 steps were trained before" in capfd.readouterr().out
    assert same(output, finished)


def test_a_finished_run_without_checkpoints(base: Path, texts: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "out"
    argv = line(base, texts, output, save_strategy="no", resume_from_checkpoint="auto")
    trained = main(argv)
    before = (output / "model.safetensors").read_bytes()
    again = main(argv)
    assert "is finished" in capfd.readouterr().out
    assert (output / "model.safetensors").read_bytes() == before
    assert again.state.global_step == STEPS
    one, other = trained.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"--learning_rate was 0\.001, is 0\.01"):
        main(line(base, texts, output, save_strategy="no", resume_from_checkpoint="auto", learning_rate=0.01))
    with pytest.raises(ValueError, match="samples of a step was 2, is 1"):
        main(line(base, texts, output, save_strategy="no", resume_from_checkpoint="auto",
                  per_device_train_batch_size=1))  # fmt: skip
    with pytest.raises(ValueError, match="left no checkpoint to go on from"):
        main(line(base, texts, output, save_strategy="no", resume_from_checkpoint="auto", max_steps=8))
    assert (output / "model.safetensors").read_bytes() == before


def test_model_only_checkpoints_are_not_started_over(base: Path, texts: Path, tmp_path: Path) -> None:
    argv = line(base, texts, tmp_path / "out", save_only_model="true")
    main(argv)
    (tmp_path / "out" / RUN_IDENTITY).unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints.*holds a model only, as --save_only_model"):
        main([*argv, "--resume_from_checkpoint", "auto"])


def test_the_best_checkpoint_survives_a_move(base: Path, texts: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    best: dict[str, Any] = {
        "eval_data_path": texts, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": "true",
        "save_total_limit": 1, "metric_for_best_model": "eval_loss", "greater_is_better": "true",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main(line(base, texts, Path("out"), **best, max_steps=6))
    state = json.loads(Path("out/checkpoint-6/trainer_state.json").read_text())
    name = state["best_model_checkpoint"]
    assert name == f"checkpoint-{state['best_global_step']}"
    assert name == "checkpoint-2", "the largest loss, so that the best one is not the last"
    Path("elsewhere").mkdir()
    Path("out").rename("elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = main(line(base, texts, Path("moved"), **best, max_steps=8, resume_from_checkpoint="auto"))
    assert "gone" not in caplog.text
    assert Path(str(resumed.state.best_model_checkpoint)).resolve() == (tmp_path / "elsewhere/moved" / name).resolve()
    assert same(Path("moved"), Path("moved") / name)
    assert sorted(path.name for path in Path("moved").glob("checkpoint-*")) == sorted({name, "checkpoint-8"})


def test_without_a_hash_the_source_is_compared() -> None:
    from llava.train.identity import RunIdentity

    def tower(source: str, content: str | None) -> RunIdentity:
        length = {"steps": 1, "max_steps": 1, "num_train_epochs": 3, "order": {}}
        return RunIdentity({"vision_tower": {"source": source, "sha256": content}}, {}, length)

    assert tower("b", None).compare(tower("a", None)).wrong
    assert not tower("a", None).compare(tower("a", None)).wrong
    assert not tower("b", "0").compare(tower("a", "0")).wrong
