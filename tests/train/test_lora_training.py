"""Runs with --lora_enable through main(): they learn, resume exactly, go on, and mistakes end them clearly."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="LoRA needs peft: pip install 'llava-babylm[lora]'")

from llava.model.loading import load_model
from llava.model.merge_lora import main as merge
from llava.serve.cli import main as serve
from llava.train.train import build_trainer, main

FILES = ("adapter_model.safetensors", "non_lora_trainables.safetensors")


def flags(model: Path, tower: Path | None, data: Path, output: Path, **changes) -> list[str]:
    """A command line for a tiny run with adapters, with some flags changed (None takes one out)."""
    values = {
        "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": output,
        "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4,
        "mm_resampler_width": 32, "num_frames": 3, "lora_enable": "true", "lora_r": 8, "lora_alpha": 16,
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_files(one: Path, other: Path) -> None:
    for file in FILES:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file


@pytest.fixture
def two_clips(mixed_data: Path) -> Path:
    path = mixed_data.parent / "lora_two.json"
    path.write_text(json.dumps(json.loads(mixed_data.read_text())[:2], ensure_ascii=False))
    return path


@pytest.fixture
def strong_dir(gpt2_dir: Path, tmp_path: Path) -> Path:
    """The tiny GPT-2 with embeddings as large as trained ones: a head frozen at 0.02 cannot be sure of any token."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(gpt2_dir, tmp_path / "strong"))
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    with torch.no_grad():
        for table in (model.transformer.wte, model.transformer.wpe):
            table.weight *= 20
    model.save_pretrained(folder)
    return folder


def test_overfits_two_clips_captions_them_and_merges(
    strong_dir: Path, tower_dir: Path, two_clips: Path, tmp_path: Path, capsys
) -> None:
    output, merged = tmp_path / "out", tmp_path / "merged"
    before = load_file(strong_dir / "model.safetensors")
    trainer = main(flags(strong_dir, tower_dir, two_clips, output, max_steps=110, learning_rate=5e-3, lora_r=32,
                         lora_alpha=64, lora_dropout=0, mm_vision_select_layer=1))  # fmt: skip
    assert losses(output)[-1] < 0.1
    assert "LoRA: of the language model only adapters train, of rank 32 (alpha 64)" in capsys.readouterr().out
    state = {key.replace(".base_layer", ""): value for key, value in trainer.model.state_dict().items()}
    for name, weight in before.items():
        assert torch.equal(state[name][: len(weight)], weight), name
    assert not (output / "model.safetensors").exists()
    assert merge(["--model_path", str(output), "--output_dir", str(merged)]) == 0
    for sample in json.loads(two_clips.read_text()):
        for folder in (output, merged):
            capsys.readouterr()
            assert serve(["--model_path", str(folder), "--video", str(two_clips.parent / sample["video"])]) == 0
            assert capsys.readouterr().out.strip() == sample["conversations"][1]["value"]


def test_resumed_run_equals_an_uninterrupted_one(gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    steps = {"save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.1}
    main(flags(gpt2_dir, tower_dir, mixed_data, whole, **steps))
    shutil.copytree(whole / "checkpoint-3", parted / "checkpoint-3")
    main(flags(gpt2_dir, tower_dir, mixed_data, parted, **steps, resume_from_checkpoint="auto"))
    assert losses(parted) == losses(whole)
    assert_same_files(parted, whole)


def test_the_best_checkpoint_comes_back_in_the_end(gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    # A rate that ruins the model: the first evaluation is the best.
    best = {"eval_data_path": mixed_data, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
            "save_steps": 1, "load_best_model_at_end": "true", "max_steps": 2, "learning_rate": 5}  # fmt: skip
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **best))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_same_files(tmp_path, tmp_path / "checkpoint-1")


def test_adapters_train_on_in_another_run(gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path) -> None:
    first, moved = tmp_path / "first", tmp_path / "moved"
    main(flags(gpt2_dir, tower_dir, mixed_data, first, max_steps=2))
    shutil.copytree(gpt2_dir, moved)
    again = {"mm_resampler_type": None, "max_steps": 1, "lora_r": None, "lora_alpha": None}
    ways = (flags(first, None, mixed_data, tmp_path / "one", **again),
            flags(moved, None, mixed_data, tmp_path / "two", lora_weight_path=first, **again))  # fmt: skip
    for words in ways:
        main(words)
    assert_same_files(tmp_path / "one", tmp_path / "two")
    bases = [json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
             for name in ("first", "one", "two")]  # fmt: skip
    assert bases == [str(gpt2_dir), str(gpt2_dir), str(moved)]
    with pytest.raises(ValueError, match=r"--lora_r is 2, but the adapters in .* have 8; leave the flag out"):
        build_trainer(flags(first, None, mixed_data, tmp_path / "x", **again | {"lora_r": 2}))
    with pytest.raises(ValueError, match=r"holds LoRA adapters; train them on .* or merge them first"):
        build_trainer(flags(first, None, mixed_data, tmp_path / "x", **again, lora_enable=None))
    with pytest.raises(ValueError, match=r"--output_dir .* holds a run \(adapter_model"):
        build_trainer(flags(gpt2_dir, None, mixed_data, first, **again, lora_enable=None))


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'llava-babylm[kbit]'"
)
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_learn_on_quantised_weights(gpt2_dir, tower_dir, two_clips: Path, tmp_path: Path, bits: int) -> None:
    main(flags(gpt2_dir, tower_dir, two_clips, tmp_path, bits=bits, max_steps=6, gradient_checkpointing="true"))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert load_model(str(tmp_path)).model.config.model_type == "llava_gpt2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_tunable_parts": "mm_mlp_adapter"}, "--lora_enable adapts the language model, but --mm_tunable_parts is"),
        ({"lora_enable": None, "bits": 4}, "--bits 4 needs --lora_enable true: quantised weights cannot be trained"),
        ({"bits": 5}, "--bits is 5; known: 16"),
        ({"lora_r": 0}, "--lora_r is 0; it must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora_dropout is 1.0; it must be at least 0 and below 1"),
        ({"lora_weight_path": "."}, "--lora_weight_path '.' holds no adapters"),
        ({"lora_enable": None, "lora_weight_path": "."}, "--lora_weight_path was given without --lora_enable"),
        ({"lora_bias": "all"}, "--lora_bias all: not available"),
    ],
)
def test_mistakes_end_the_run_before_training(
    gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_trainer(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes))


def test_a_base_that_lies_nowhere_is_an_error(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    words = flags(gpt2_dir, tower_dir, mixed_data, tmp_path)
    with pytest.raises(ValueError, match="with --init_from_backbone that model lies nowhere"):
        build_trainer(words, weights_from=str(gpt2_dir))
    with pytest.raises(ValueError, match="cannot be copied under adapters or into k bits"):
        build_trainer([*words, "--bits", "4"], weights_from=str(gpt2_dir))


def test_without_peft_the_error_names_the_extra(gpt2_dir, tower_dir, mixed_data, tmp_path, monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(ValueError, match=r"pip install 'llava-babylm\[lora\]'"):
        build_trainer(flags(gpt2_dir, tower_dir, mixed_data, tmp_path))
