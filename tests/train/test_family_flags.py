"""Command lines of the LLaVA family: translated, accepted where they ask for nothing, or refused with what to use."""

from __future__ import annotations

import logging

import pytest

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.command_line import MAY_BE_EMPTY, answer_at_once, read_flags
from llava.train.engines import find_deepspeed_config
from llava.train.family_flags import FAMILY_FLAGS, RENAMED, UNKNOWN, VERSIONS, translate

PARTS = {
    "--tune_mm_mlp_adapter True": "mm_mlp_adapter",
    "--tune_mm_mlp_adapter True --tune_mm_vision_resampler True": "mm_mlp_adapter,mm_vision_resampler",
    "--tune_mm_mlp_adapter False": "mm_mlp_adapter,mm_vision_resampler,mm_language_model",
    "--freeze_backbone True": "mm_mlp_adapter,mm_vision_resampler",
    "--freeze_backbone": "mm_mlp_adapter,mm_vision_resampler",
    "--freeze_mm_mlp_adapter True": "mm_vision_resampler,mm_language_model",
    "--unfreeze_mm_vision_tower True": "mm_vision_tower,mm_mlp_adapter,mm_vision_resampler,mm_language_model",
    "--tune_mm_mlp_adapter=True --unfreeze_language_model True": "mm_mlp_adapter,mm_language_model",
}


def run(text: str) -> list[str]:
    return translate(text.split(), MAY_BE_EMPTY)


@pytest.mark.parametrize("text", PARTS)
def test_switches_of_parts_become_mm_tunable_parts(text):
    assert run(text) == ["--mm_tunable_parts", PARTS[text]]


def test_parts_that_are_named_overrule_the_switches(caplog):
    words = ["--mm_tunable_parts", "mm_mlp_adapter", "--freeze_backbone", "True", "--seed", "3"]
    assert translate(words) == ["--mm_tunable_parts", "mm_mlp_adapter", "--seed", "3"]
    assert "--freeze_backbone: not looked at" in caplog.text
    with pytest.raises(ValueError, match="nothing would be trained"):
        run("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True")


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_flag_that_is_none_here_is_accepted_only_where_it_asks_for_nothing(name, caplog):
    flag = UNKNOWN[name]
    for value in flag.neutral:
        words = [f"--{name}={value}", "--seed", "1"]
        assert translate(words) == ["--seed", "1"]
    assert f"--{name} is not needed any more" in caplog.text
    if flag.neutral != ("*",):
        with pytest.raises(ValueError, match=f"--{name} 7x: not available, .*; (use|leave) "):
            translate([f"--{name}", "7x"])


def test_every_flag_of_the_table_is_none_of_today():
    assert not {*FAMILY_FLAGS} & {*read_flags()} - {"warmup_ratio"}
    assert {*RENAMED.values()} <= {*read_flags()}
    assert answer_at_once([f"--{name}" for name in FAMILY_FLAGS]) is None


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_of_the_family_are_formats_of_today(name):
    words = run(f"--version {name}")
    assert words == ["--version", VERSIONS[name]]
    assert DataArguments(["x"], version=words[1]).format_name == VERSIONS[name]


def test_forced_frames_are_a_number_of_frames():
    found = run("--video_fps 1 --frames_upbound 32 --force_sample True")
    assert found == ["--num_frames", "32", "--video_fps", "0"]
    assert run("--video_fps 1 --frames_upbound 32 --force_sample False") == [
        "--video_fps",
        "1",
        "--frames_upbound",
        "32",
    ]
    with pytest.raises(ValueError, match="takes --frames_upbound frames of each clip, and that is '0'"):
        run("--force_sample True")


def test_an_empty_adapter_path_is_none():
    assert translate(["--load_lora_path", "", "--seed", "1"], MAY_BE_EMPTY) == ["--seed", "1"]
    assert run("--load_lora_path stage2") == ["--lora_weight_path", "stage2"]


def test_files_of_deepspeed_go_by_their_names(caplog):
    for given in ("scripts/zero2.json", "./scripts/zero3.json", "scripts/zero2_fused_adamw.json"):
        assert find_deepspeed_config(given).endswith(("deepspeed/zero2.json", "deepspeed/zero3.json"))
        assert f"--deepspeed {given} is no file here" in caplog.text
    with pytest.raises(ValueError, match="is no file; give one, or one of zero1"):
        find_deepspeed_config("scripts/zero4.json")


def test_variables_of_the_fork_are_honoured_or_named(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    for name, value in (
        ("MM_PERCEIVER_LATENTS", "64"), ("MM_PERCEIVER_LATENTS_FAST", "32"), ("BABYLM_WORD_LIMIT", "10M"),
        ("BABYLM_ENABLED", "1"), ("WANDB_PROJECT", "babies"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    model = ModelArguments("x", mm_resampler_type="fast_slow_resampler")
    assert (model.mm_perceiver_latents, model.mm_perceiver_latents_fast) == (64, 25)
    training = TrainingArguments(str(tmp_path), report_to="none")
    assert training.word_limit_number == 10_000_000
    for line in (
        "MM_PERCEIVER_LATENTS is honoured; its name now is --mm_perceiver_latents",
        "--mm_perceiver_latents_fast 32 is taken for 25, as the fork ran it: 5 x 5",
        "BABYLM_WORD_LIMIT is honoured; its name now is --word_limit",
        "BABYLM_ENABLED is not needed any more", "WANDB_PROJECT is ignored: --report_to has no wandb",
    ):  # fmt: skip
        assert line in caplog.text
    # What is given as a flag counts, and a limit that is switched off is none.
    assert ModelArguments("x", mm_perceiver_latents=9).mm_perceiver_latents == 9
    assert "MM_PERCEIVER_LATENTS is not looked at: --mm_perceiver_latents is given" in caplog.text
    monkeypatch.setenv("BABYLM_ENABLED", "0")
    assert TrainingArguments(str(tmp_path), report_to="none").word_limit_number is None
    monkeypatch.setenv("MM_PERCEIVER_LATENTS", "many")
    with pytest.raises(ValueError, match="MM_PERCEIVER_LATENTS of the environment is 'many', expected a number"):
        ModelArguments("x")
