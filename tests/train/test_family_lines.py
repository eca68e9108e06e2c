"""Command lines of the LLaVA family as their scripts have them: they start, train, and say what became of their flags.

Paths and sizes are changed; what a machine without a GPU cannot have is overruled by flags behind the line.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest
import torch
from conftest import make_tower
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llava.train.train import main

ROOT = Path(__file__).parents[2]

HERE = """--use_cpu True --fp16 False --bf16 False --tf32 False --report_to none --max_steps 2 --disable_tqdm True
    --dataloader_num_workers 0 --mm_resampler_width 32 --mm_resampler_heads 4 --per_device_train_batch_size 2
    --gradient_accumulation_steps 1 --save_strategy no --gradient_checkpointing False"""

FORK = """--model_name_or_path {model} --version llama_v2 --data_path {data} --image_folder . {folders}
    --vision_tower {tower} --image_aspect_ratio pad --output_dir {out}
    --mm_tunable_parts mm_vision_resampler,mm_mlp_adapter,mm_language_model --mm_vision_select_layer -2
    --mm_projector_type mlp2x_gelu --mm_resampler_type fast_slow_resampler --mm_perceiver_latents {slow}
    --mm_perceiver_latents_fast {fast} --mm_perceiver_depth 2 --use_downsample_image False --fp16 True
    --attn_implementation {attention} --num_train_epochs 1 --per_device_train_batch_size 16
    --gradient_accumulation_steps 4 --learning_rate 5e-4 --mm_projector_lr 5e-4 --stage {stage} --save_strategy steps
    --save_steps 2000 --save_total_limit 50 --weight_decay 0. --warmup_ratio 0.1 --lr_scheduler_type cosine
    --logging_steps 2 --model_max_length {length} --gradient_checkpointing True --dataloader_num_workers 2
    --lazy_preprocess True --report_to wandb"""
ITALIAN_VIDEO = (
    f"{FORK} --video_fps 1 --frames_upbound 4 --num_frames 4 --force_sample False --add_time_instruction False"
)

ST = """--model_name_or_path {model} --version qwen_1_5 --data_path {data} --vision_tower {tower}
    --mm_tunable_parts mm_vision_resampler --mm_resampler_type fast_slow_resampler --mm_perceiver_latents 81
    --mm_perceiver_latents_fast 9 --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --mm_use_im_start_end False
    --mm_use_im_patch_token False --bf16 True --output_dir {out} --num_train_epochs 1 --per_device_train_batch_size 4
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 2 --evaluation_strategy no --save_strategy steps
    --save_steps 200 --save_total_limit 3 --learning_rate 1e-4 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 32768 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb --stage {stage}"""
ST_LORA = f"{ST} --lora_enable True --lora_r 128 --lora_alpha 256 --mm_vision_resampler_lr 2e-5"

NEXT = """--model_name_or_path {model} --version qwen_1_5 --data_path {data} --image_folder {media}
    --video_folder {media} --mm_tunable_parts=mm_vision_tower,mm_mlp_adapter,mm_language_model --mm_vision_tower_lr=2e-6
    --vision_tower {tower}
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --group_by_modality_length True --image_aspect_ratio anyres_max_9 --image_grid_pinpoints "(1x1),...,(6x6)"
    --mm_patch_merge_type spatial_unpad --bf16 True --run_name llava-onevision --output_dir {out} --num_train_epochs 1
    --per_device_train_batch_size 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2
    --evaluation_strategy no --save_strategy steps --save_steps 1000 --save_total_limit 1 --learning_rate 1e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 32768 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb --torch_compile True --torch_compile_backend inductor --dataloader_drop_last True
    --frames_upbound 32"""


@pytest.fixture(scope="module")
def grid16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tower with the 16 x 16 grid of DINOv2-large at 224 pixels."""
    return make_tower(tmp_path_factory.mktemp("grid16"), side=224)


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A tiny Qwen2 whose tokenizer knows the marks of its turns."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def without(kind: str, data: Path, folder: Path) -> Path:
    """A data file without the samples that have an image or, as ``kind`` says, a video."""
    path = folder / "part.json"
    path.write_text(json.dumps([sample for sample in json.loads(data.read_text()) if kind not in sample]))
    return path


def train(line: str, caplog: pytest.LogCaptureFixture, **values: object):
    """Train two steps as a line says; gives the trainer and what was said of older flags."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = main(shlex.split(line.format(**values)) + HERE.split())
    assert trainer.state.global_step == 2
    told = [record.getMessage() for record in caplog.records if "Flags and variables" in record.getMessage()]
    assert len(told) == 1
    return trainer, told[0]


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_italian_line_of_the_fork(
    gpt2_dir, grid16, mixed_data, tmp_path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixed_data.parent)
    set_environment(
        monkeypatch, WANDB_PROJECT="baby", BABYLM_ENABLED="false", USE_PLAIN_LM="1", BABYLM_WORD_LIMIT="100",
        MM_PERCEIVER_LATENTS="81",
    )  # fmt: skip
    trainer, told = train(
        ITALIAN_VIDEO, caplog, model=gpt2_dir, data=without("image", mixed_data, tmp_path), tower=grid16,
        folders="--video_folder ''", out=tmp_path / "out", slow=81, fast=9, attention="eager", stage=1, length=2048,
    )  # fmt: skip
    vision = trainer.model.vision
    assert (vision.num_frames, vision.video_fps, vision.perceiver_latents_fast) == (4, 0, 9)
    assert trainer.model.config.llava_format == "plain_lm"
    assert trainer.args.word_limit is None
    assert "WANDB_PROJECT=baby has no effect without --report_to wandb" in told
    assert "--version llama_v2 has no effect: USE_PLAIN_LM overrules it" in told
    assert "BABYLM_ENABLED=false: BABYLM_WORD_LIMIT has no effect" in told
    assert "MM_PERCEIVER_LATENTS=81 agrees with --mm_perceiver_latents 81" in told
    assert "is now --num_frames 4: so many frames, evenly over each video" in told
    assert "--model_max_length is 2048, but the model's context is 512, which is taken" in caplog.text


def test_the_english_line_of_the_fork(
    llama_dir, grid16, mixed_data, tmp_path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixed_data.parent)
    set_environment(
        monkeypatch, BABYLM_ENABLED="true", BABYLM_WORD_LIMIT="100000000", USE_PLAIN_LM="1", MM_PERCEIVER_LATENTS="64",
        MM_PERCEIVER_LATENTS_FAST="32",
    )  # fmt: skip
    data = without("video", mixed_data, tmp_path)
    trainer, told = train(
        FORK + " --mm_projector_width 2560 --num_frames 8", caplog, model=llama_dir, data=data, folders="",
        tower=grid16, out=tmp_path / "out", slow=64, fast=32, attention="sdpa", stage=2, length=32768,
    )  # fmt: skip
    vision = trainer.model.vision
    assert (vision.perceiver_latents, vision.perceiver_latents_fast, vision.num_frames) == (64, 25, 8)
    assert [tuple(p.shape) for p in trainer.model.get_model().mm_projector.parameters()] == [
        (2560, 32), (2560,), (32, 2560), (32,)
    ]  # fmt: skip
    assert trainer.args.word_limit_number == 100_000_000
    assert trainer.args.milestone_numbers[-1] == 100_000_000
    assert "--mm_perceiver_latents_fast 32 is now 25: the packer works on squares" in told
    assert "BABYLM_WORD_LIMIT=100000000 is --word_limit 100000000" in told


def test_the_three_stages_of_llava_st(qwen_dir, grid16, mixed_data, tmp_path, caplog) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    one, two, three = (tmp_path / name for name in "123")
    values = {"data": mixed_data, "tower": grid16}
    trainer, told = train(ST, caplog, model=qwen_dir, out=one, stage=1, **values)
    trained = {name.split(".")[1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"vision_resampler"}
    assert trainer.model.config.llava_format == "qwen"
    for part in ("--version qwen_1_5 is now qwen", "--evaluation_strategy is now --eval_strategy",
                 "--num_frames (4; there 100 in LLaVA-ST)"):  # fmt: skip
        assert part in told
    trainer, _ = train(ST_LORA, caplog, model=one, out=two, stage=2, **values)
    assert trainer.model.grounding.mode == "lape"
    trainer, told = train(f"{ST_LORA} --load_lora_path {two}", caplog, model=one, out=three, stage=3, **values)
    assert "--load_lora_path is now --lora_weight_path: its adapters train on, where LLaVA-ST merged them" in told
    assert trainer.model.grounding.mode == "lape"


def test_the_finetuning_line_of_llava_next(
    qwen_dir, tower_dir, mixed_data, media_dir, tmp_path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._dynamo.config.disable", True)  # A compiler takes longer than these tests.
    trainer, told = train(
        NEXT, caplog, model=qwen_dir, data=mixed_data, media=media_dir, tower=tower_dir, out=tmp_path / "out"
    )
    assert "--group_by_modality_length True is now --train_sampling_strategy group_by_modality_length" in told
    vision = trainer.model.vision
    assert (vision.video_fps, vision.frames_upbound, vision.patch_merge_type) == (1, 32, "spatial_unpad")
    assert any(p.requires_grad for p in trainer.model.get_vision_tower().parameters())
