"""Flags and variables of the LLaVA family that are none of this library's: what becomes of each, as data.

Those of the argument classes of LLaVA, LLaVA-NeXT, LLaVA-ST and its fork for BabyLM, and of transformers 4. A command
line that has them is read by ``family_words``; ``docs/flags.md`` prints these tables. No flag of today is here, but for
values that it had another name for.
"""

from __future__ import annotations

from dataclasses import dataclass

OFF = ("false", "0", "no", "off", "none", "")
ON = ("true", "1", "yes", "on")
UNGROUPED = "random"
"""The value of ``--train_sampling_strategy`` where all switches for grouping are off."""

RENAMED = {
    "load_lora_path": "lora_weight_path",
    "mm_image_grid_pinpoints": "image_grid_pinpoints",
    "use_downsample_image": "mm_resample_images",
    # Of transformers 4:
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
}
"""Flags that have another name now."""
LORA_NOTE = "its adapters train on, where LLaVA-ST merged them and began new ones"

VALUES = {
    "version": {
        "gemma_instruct": "gemma",
        "llama_3": "llama_v3",
        "llama_v2": "llama_2",
        "llava_llama_2": "llama_2",
        "llava_llama_2_simple": "llama_2",
        "llava_llama_3": "llama_v3",
        "qwen_1_5": "qwen",
        "qwen_2": "qwen",
        "v0_plain": "plain",
        "vicuna_v1": "v1",
    },
    "mm_perceiver_latents": {"32": "25"},
    "mm_perceiver_latents_fast": {"32": "25"},
}
"""Values of today's flags that have another name or, as no square number of latents has, another meaning."""
LATENTS_NOTE = "the packer works on squares, and the fork's made 5 x 5 = 25 of 32"

DEEPSPEED = {
    "zero1": "zero1",
    "zero2": "zero2",
    "zero2_fused_adamw": "zero2",
    "zero2_offload": "zero3_offload",
    "zero3": "zero3",
    "zero3_offload": "zero3_offload",
    "zero3pp": "zero3",
}
"""Names of the family's files for ``--deepspeed``, and the settings here that take their place where they are not."""

GROUPING = {
    "group_by_modality_length": "group_by_modality_length",
    "group_by_modality_length_auto": "group_by_modality_length",
    "group_by_length": "group_by_length",
    "group_by_varlen": "group_by_length",
}
"""Switches that are values of ``--train_sampling_strategy`` now; the first that is on counts."""

PARTS_SWITCHES = {
    "tune_mm_mlp_adapter": "mm_mlp_adapter alone",
    "tune_mm_vision_resampler": "mm_vision_resampler alone",
    "freeze_backbone": "without mm_language_model",
    "freeze_mm_mlp_adapter": "without mm_mlp_adapter",
    "freeze_mm_vision_resampler": "without mm_vision_resampler",
    "unfreeze_language_model": "with mm_language_model",
    "unfreeze_mm_vision_tower": "with mm_vision_tower",
}
"""Switches that ``--mm_tunable_parts`` says now, which overrules them as it did there."""


@dataclass(frozen=True)
class FamilyFlag:
    """A flag that has no equal here.

    Attributes:
        note: why it may be left out.
        accepted: the values that are no error, in lower case; None for all.
        instead: what to use where another value is given.
    """

    note: str
    accepted: tuple[str, ...] | None = None
    instead: str = ""


def _off(instead: str) -> FamilyFlag:
    return FamilyFlag("off is all there is", OFF, instead)


def _unset(instead: str) -> FamilyFlag:
    return FamilyFlag("nothing is asked for", ("none", ""), instead)


_NO_SUCH_SETTING = "what it sets does not exist here"
_MASK = "--mm_mask_drop_ratio alone says how much is kept"
_ROPE = "write rope_scaling into the config.json of --model_name_or_path"
_CONNECTORS = "give the file to --pretrain_mm_mlp_adapter, which takes resamplers too"

WITHOUT_EFFECT: dict[str, FamilyFlag] = {
    # The model.
    "model_class_name": FamilyFlag("the class follows from the checkpoint's model_type"),
    "vision_tower_pretrained": _unset("give the folder or the hub name of the weights as --vision_tower"),
    "mm_use_im_start_end": FamilyFlag(
        "the first and the last token of a span take features too", OFF, "there are no markers besides; leave it out"
    ),
    "mm_use_im_patch_token": FamilyFlag("patch tokens are always in the vocabulary"),
    "mm_vision_select_feature": FamilyFlag(
        "the patches are taken, without CLS", ("patch",), "the CLS token is no patch of a grid; use patch"
    ),
    "mm_mask_drop_skip_percentage": FamilyFlag("no frame is spared", ("0", "0.0", "0."), _MASK),
    "mm_mask_drop_ratio_lower": FamilyFlag(_MASK),
    "mm_mask_drop_ratio_upper": FamilyFlag(_MASK),
    "mm_spatial_pool_out_channels": FamilyFlag("only pooling by a convolution has it, of which there is none"),
    "mm_perceiver_ff_mult": FamilyFlag("4 is what it is", ("4", "4.0", "4."), "use 4"),
    "mm_perceiver_pretrained": _unset(_CONNECTORS),
    "mm_qformer_pretrained": _unset(_CONNECTORS),
    "rope_scaling_factor": _unset(_ROPE),
    "rope_scaling_type": _unset(_ROPE),
    "s2": _off("several scales at once do not exist; use --image_aspect_ratio anyres"),
    "s2_scales": FamilyFlag(_NO_SUCH_SETTING),
    "use_pos_skipping": _off("positions are never skipped; use a model with a longer context"),
    "pos_skipping_range": FamilyFlag(_NO_SUCH_SETTING),
    "mm_newline_position": FamilyFlag(
        "videos have no newline tokens; anyres images have them, with --mm_patch_merge_type spatial_unpad",
        ("grid", "no_token"),
        "videos have no newline tokens; use no_token",
    ),
    "delay_load": FamilyFlag("the tower's weights are read when the model is there"),
    "add_faster_video": _off("use --mm_resampler_type fast_slow_resampler, which has a fast span"),
    "faster_token_stride": FamilyFlag(_NO_SUCH_SETTING),
    # The data.
    "lazy_preprocess": FamilyFlag("samples are always read when they are needed"),
    "is_multimodal": FamilyFlag("a sample's own media decide"),
    "image_crop_resolution": FamilyFlag("the tower's own side counts"),
    "image_split_resolution": FamilyFlag("the tower's own side counts"),
    # Training.
    "cache_dir": _unset("set HF_HUB_CACHE in the environment"),
    "mpt_attn_impl": FamilyFlag("--attn_implementation chooses for every model"),
    "lora_bias": FamilyFlag("biases stay as they are", ("none", ""), "adapters leave biases as they are; use none"),
    "verbose_logging": FamilyFlag("the report of the parts names what trains"),
    "trainer_mode": FamilyFlag("there is no other", ("regular",), "gradients are always computed; use regular"),
    "zo_eps": FamilyFlag(_NO_SUCH_SETTING),
    "zo_num_directions": FamilyFlag(_NO_SUCH_SETTING),
    # Of transformers 4.
    "adafactor": _off("use --optim adafactor"),
    "dispatch_batches": _unset("every rank makes its own batches; leave it out"),
    "fp16_backend": FamilyFlag("PyTorch's own is used", ("auto", "cuda_amp"), "use --fp16 or --bf16"),
    "fp16_opt_level": FamilyFlag("it set Apex, which is not used"),
    "half_precision_backend": FamilyFlag("PyTorch's own is used", ("auto", "cuda_amp"), "use --fp16 or --bf16"),
    "include_inputs_for_metrics": _off("use --include_for_metrics inputs"),
    "include_tokens_per_second": _off("use --include_num_input_tokens_seen"),
    "jit_mode_eval": _off("use --torch_compile"),
    "logging_dir": _unset("set TENSORBOARD_LOGGING_DIR in the environment"),
    "overwrite_cache": FamilyFlag("indexes of data are made anew where a file has changed"),
    "push_to_hub_token": _unset("use --hub_token"),
    "save_safetensors": FamilyFlag("checkpoints are always safetensors"),
    "split_batches": _off("use --per_device_train_batch_size"),
    "torchdynamo": _unset("use --torch_compile_backend"),
    "use_legacy_prediction_loop": _off("leave it out"),
}
"""Flags that change nothing here at the values that are accepted."""

FRAMES = {
    "force_sample": "--num_frames with the number of --frames_upbound, where it is on",
    "frames_upbound": "--num_frames where that is given too, as in LLaVA-ST; else --video_fps 1 where no rate is given",
}
"""How frames are chosen, which takes several flags together; only in a command line that has others of the family's."""

OTHER_DEFAULTS = {
    "mm_vision_select_layer": ("-2", "-1"),
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "num_frames": ("4", "100 in LLaVA-ST"),
    "mm_slow_frames": ("0, all frames", "20 in LLaVA-ST"),
}
"""Defaults of new models, here and there, that shape a model: named where a line of the family's relies on one."""

ENVIRONMENT = {
    "MM_PERCEIVER_LATENTS": "is --mm_perceiver_latents",
    "MM_PERCEIVER_LATENTS_FAST": "is --mm_perceiver_latents_fast",
    "BABYLM_ENABLED": "is --milestones strict_small (strict, above 100M words); false: BABYLM_WORD_LIMIT has no effect",
    "BABYLM_WORD_LIMIT": "is --word_limit",
    "BABYLM_EVAL_BACKEND": "has no effect: see --score_tasks",
    "USE_PLAIN_LM": "is --plain_lm, and overrules --version",
    "WANDB_PROJECT": "is read by wandb, with --report_to wandb",
}
"""Variables of the environment, which flags overrule, and what each means here."""

TRANSFORMERS_4 = frozenset(
    {
        "adafactor", "dispatch_batches", "evaluation_strategy", "fp16_backend", "fp16_opt_level", "group_by_length",
        "half_precision_backend", "include_inputs_for_metrics", "include_tokens_per_second", "jit_mode_eval",
        "logging_dir", "no_cuda", "overwrite_cache", "per_gpu_eval_batch_size",
        "per_gpu_train_batch_size", "push_to_hub_token", "save_safetensors", "split_batches", "torchdynamo",
        "use_legacy_prediction_loop", "warmup_ratio",
    }
)  # fmt: skip
"""Those of the flags above that are no sign of the LLaVA family."""

FAMILY = frozenset({*RENAMED, *GROUPING, *PARTS_SWITCHES, *WITHOUT_EFFECT, "force_sample"})
"""Names of all flags that only ``family_words`` knows."""
