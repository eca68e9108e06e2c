"""Flags and variables of the LLaVA family: translated, accepted where they ask for nothing, or refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from llava.data.formats import FORMATS
from llava.train.command_line import answer_at_once
from llava.train.engines import SHIPPED
from llava.train.family_flags import DEEPSPEED, ENVIRONMENT, FAMILY, RENAMED, TRANSFORMERS_4, VALUES, WITHOUT_EFFECT
from llava.train.family_words import read_environment, translate
from llava.train.flag_source import read_flags

PARTS = {
    "--tune_mm_mlp_adapter True": "mm_mlp_adapter",
    "--tune_mm_mlp_adapter True --tune_mm_vision_resampler True": "mm_mlp_adapter,mm_vision_resampler",
    "--tune_mm_mlp_adapter True --freeze_backbone True": "mm_mlp_adapter",
    "--freeze_backbone True": "mm_mlp_adapter,mm_vision_resampler",
    "--freeze_backbone": "mm_mlp_adapter,mm_vision_resampler",
    "--freeze_mm_mlp_adapter True": "mm_vision_resampler,mm_language_model",
    "--unfreeze_mm_vision_tower True": "mm_vision_tower,mm_mlp_adapter,mm_vision_resampler,mm_language_model",
    "--tune_mm_mlp_adapter=True --unfreeze_language_model True": "mm_mlp_adapter,mm_language_model",
}

LLAVA = """
    model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
    pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
    mm_vision_select_feature data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio cache_dir optim
    remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type bits lora_enable
    lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr group_by_modality_length"""
LLAVA_NEXT = """
    model_class_name mm_tunable_parts tune_mm_vision_resampler vision_tower_pretrained unfreeze_mm_vision_tower
    unfreeze_language_model mm_resampler_type mm_mask_drop_mode mm_mask_drop_skip_percentage mm_mask_drop_ratio
    mm_mask_drop_ratio_upper mm_mask_drop_ratio_lower mm_spatial_pool_stride mm_spatial_pool_mode
    mm_spatial_pool_out_channels mm_perceiver_depth mm_perceiver_latents mm_perceiver_ff_mult mm_perceiver_pretrained
    mm_qformer_depth mm_qformer_latents mm_qformer_pretrained rope_scaling_factor rope_scaling_type s2 s2_scales
    use_pos_skipping pos_skipping_range mm_newline_position delay_load add_faster_video faster_token_stride
    early_mix_text image_grid_pinpoints image_crop_resolution image_split_resolution video_folder video_fps
    frames_upbound add_time_instruction force_sample freeze_mm_vision_resampler mm_vision_tower_lr group_by_varlen
    group_by_modality_length_auto auto_find_batch_size gradient_checkpointing verbose_logging attn_implementation
    trainer_mode zo_eps zo_num_directions"""
LLAVA_ST = "mm_perceiver_latents_fast use_downsample_image num_frames mm_vision_resampler_lr stage load_lora_path"
OF_TRANSFORMERS_4 = """
    evaluation_strategy per_gpu_train_batch_size per_gpu_eval_batch_size warmup_ratio logging_dir save_safetensors
    no_cuda jit_mode_eval fp16_opt_level half_precision_backend adafactor group_by_length use_legacy_prediction_loop
    include_inputs_for_metrics fp16_backend push_to_hub_token torchdynamo dispatch_batches split_batches
    include_tokens_per_second local_rank overwrite_output_dir use_cpu tf32"""


@pytest.mark.parametrize("fields", [LLAVA, LLAVA_NEXT, LLAVA_ST, OF_TRANSFORMERS_4])
def test_every_flag_of_the_argument_classes_is_known(fields: str, capsys) -> None:
    assert [name for name in fields.split() if name not in FAMILY | set(read_flags())] == []
    assert answer_at_once([f"--{name}" for name in fields.split()]) is None


def test_the_tables_and_the_flags_of_today_are_apart() -> None:
    assert FAMILY.isdisjoint(read_flags())
    assert set(RENAMED.values()) | set(VALUES) <= set(read_flags())
    assert TRANSFORMERS_4 <= FAMILY
    assert set(DEEPSPEED.values()) <= set(SHIPPED)
    assert set(VALUES["version"].values()) <= set(FORMATS.names())
    assert not set(VALUES["version"]) & set(FORMATS.names())


@pytest.mark.parametrize("text", PARTS)
def test_switches_of_parts_become_mm_tunable_parts(text: str) -> None:
    assert translate(text.split())[0] == ["--mm_tunable_parts", PARTS[text]]


def test_parts_that_are_named_overrule_the_switches() -> None:
    words = ["--mm_tunable_parts", "mm_mlp_adapter", "--seed", "3"]
    translated, notes = translate([*words, "--freeze_backbone", "True"])
    assert translated == words
    assert notes == ["--freeze_backbone True has no effect: --mm_tunable_parts mm_mlp_adapter says what trains"]
    assert translate(["--tune_mm_mlp_adapter", "False"])[0] == []
    with pytest.raises(ValueError, match="nothing would be trained"):
        translate(["--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True"])
    with pytest.raises(ValueError, match="--freeze_backbone is 'maybe', expected true or false"):
        translate(["--freeze_backbone", "maybe"])


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_flag_that_is_none_here_is_accepted_only_where_it_asks_for_nothing(name: str) -> None:
    flag = WITHOUT_EFFECT[name]
    for value in flag.accepted or ("True", "7x"):
        translated, notes = translate([f"--{name}={value}", "--seed", "1"])
        assert translated == ["--seed", "1"]
        assert any(f"--{name} {value} is not needed any more: {flag.note}" == note for note in notes)
    if flag.accepted is not None:
        assert flag.instead
        with pytest.raises(ValueError, match=f"--{name} 7x: not available; "):
            translate([f"--{name}", "7x"])


@pytest.mark.parametrize(
    ("line", "now"),
    [
        # LLaVA-ST and its fork: a number of frames, and a bound; the rate only wrote their times.
        ("--num_frames 8 --video_fps 1 --frames_upbound 4 --lazy_preprocess", "--num_frames 4 --video_fps 0"),
        ("--num_frames 4 --video_fps 1 --frames_upbound 0 --lazy_preprocess", "--num_frames 4 --video_fps 0"),
        # LLaVA-NeXT: a rate, 1 by default, up to a bound.
        ("--frames_upbound 32 --delay_load", "--frames_upbound 32 --video_fps 1"),
        ("--frames_upbound 32 --video_fps 2 --force_sample False", "--frames_upbound 32 --video_fps 2"),
        ("--frames_upbound 32 --video_fps 2 --force_sample True", "--num_frames 32 --video_fps 0"),
        # Lines of today, and of other trainers of transformers, mean what they say.
        ("--num_frames 8 --video_fps 1 --frames_upbound 4", "--num_frames 8 --video_fps 1 --frames_upbound 4"),
        ("--frames_upbound 8 --evaluation_strategy no", "--frames_upbound 8 --eval_strategy no"),
        # Latents that are no square number, where they lie in a square.
        (
            "--mm_resampler_type fast_slow_resampler --mm_perceiver_latents 32",
            "--mm_resampler_type fast_slow_resampler --mm_perceiver_latents 25",
        ),
        ("--mm_perceiver_latents 32", "--mm_perceiver_latents 32"),
        ("--mm_perceiver_latents_fast=32", "--mm_perceiver_latents_fast 25"),
        ("--warmup_ratio 0.03 --warmup_steps 0", "--warmup_steps 0.03"),
        ("--warmup_ratio 0.03 --warmup_steps 5", "--warmup_steps 5"),
        ("--load-lora-path stage2 --seed 1", "--lora_weight_path stage2 --seed 1"),
        ("--load_lora_path '' --seed 1", "--lora_weight_path '' --seed 1"),
        ("--deepspeed nowhere/zero4.json", "--deepspeed nowhere/zero4.json"),
    ],
)
def test_a_line_as_today_s(line: str, now: str) -> None:
    assert translate(shlex.split(line))[0] == shlex.split(now)


def test_a_file_of_deepspeed_that_is_there_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "zero2.json"
    assert translate(["--deepspeed", str(file)])[0] == ["--deepspeed", "zero2"]
    file.write_text("{}")
    assert translate(["--deepspeed", str(file)])[0] == ["--deepspeed", str(file)]


@pytest.mark.parametrize(
    ("variables", "line", "recipe", "words", "note"),
    [
        ("MM_PERCEIVER_LATENTS=64", "", "--mm_perceiver_latents 81", "--mm_perceiver_latents 64", "is --mm_perceiver"),
        ("MM_PERCEIVER_LATENTS=64", "--mm_perceiver_latents 81", "", "", "is overruled by --mm_perceiver_latents 81"),
        ("MM_PERCEIVER_LATENTS_FAST=32", "", "--mm_resampler_type fast_slow_resampler",
         "--mm_perceiver_latents_fast 25", "32 is now 25"),
        ("BABYLM_WORD_LIMIT=500", "--word_limit 9", "", "", "is overruled by --word_limit 9"),
        ("BABYLM_ENABLED=false BABYLM_WORD_LIMIT=500", "", "", "", "BABYLM_WORD_LIMIT has no effect"),
        ("BABYLM_ENABLED=true BABYLM_WORD_LIMIT=1000000000", "", "", "--word_limit 1000000000 --milestones strict", ""),
        ("BABYLM_ENABLED=true", "", "--milestones 1k", "", "the milestones are those of --milestones 1k"),
        ("USE_PLAIN_LM=0", "--version v1", "", "", ""),
        ("USE_PLAIN_LM=1", "--plain_lm false --version v1", "", "", "is overruled by --plain_lm false"),
        ("WANDB_PROJECT=p", "--report_to wandb", "", "", "WANDB_PROJECT=p is read by wandb"),
        ("WANDB_PROJECT=p", "--report_to none", "--report_to wandb", "", "no effect without --report_to wandb"),
        ("BABYLM_EVAL_BACKEND=causal", "", "", "", "BABYLM_EVAL_BACKEND has no effect"),
    ],
)  # fmt: skip
def test_variables_stand_between_recipe_and_command_line(
    variables: str, line: str, recipe: str, words: str, note: str
) -> None:
    environ = dict(variable.split("=") for variable in variables.split())
    assert set(environ) <= set(ENVIRONMENT)
    found, _, notes = read_environment(environ, line.split(), recipe.split())
    assert found == words.split()
    assert any(note in told for told in notes) or not note


def test_latents_go_by_the_resampler_of_the_recipe_too():
    words = ["--mm_perceiver_latents", "32"]
    assert translate(words, ["--mm_resampler_type", "fast_slow_resampler"])[0] == ["--mm_perceiver_latents", "25"]
    assert translate(words, ["--mm_resampler_type", "perceiver"])[0] == words
