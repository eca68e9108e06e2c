"""Entries of other ``config.json`` files as today's visual settings, and what is said of others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from llava.model.convert.published import follow_published_code
from llava.model.convert.report import Settings
from llava.model.multimodal_encoder.base import TowerDescription

FAMILY_ENTRIES = {
    "mm_vision_select_layer": "vision_select_layer",
    "mm_projector_type": "projector_type",
    "mm_resampler_type": "resampler_type",
    "mm_perceiver_latents": "perceiver_latents",
    "mm_perceiver_latents_fast": "perceiver_latents_fast",
    "mm_spatial_pool_stride": "spatial_pool_stride",
    "mm_spatial_pool_mode": "spatial_pool_mode",
    "mm_mask_drop_ratio": "mask_drop_ratio",
    "mm_patch_merge_type": "patch_merge_type",
    "image_aspect_ratio": "image_aspect_ratio",
    "image_grid_pinpoints": "image_grid_pinpoints",
    "use_downsample_image": "resample_images",
    "add_time_instruction": "add_time_instruction",
    "frames_upbound": "frames_upbound",
}
"""Entries of the family that are fields of ``VisionConfig`` today; one that is null is as if it were not there."""

_WITHOUT_EFFECT = re.compile(
    r"mm_(vision_tower|hidden_size|vision_select_feature|use_im_\w+|perceiver_(depth|ff_mult|pretrained)|\w+_lr"
    r"|tunable_parts|vision_tower_pretrained|qformer\w*|projector_(bias|dim)|vision_tower_cfg|spatial_pool_out_channels"
    r"|mask_drop\w*|attention_dropout)"
    r"|(tune|freeze|unfreeze)_mm_\w+|tune_mm_\w+|pretrain_mm_\w+|use_mm_proj|delay_load|vision_tower_pretrained"
    r"|image_(crop|split)_resolution|tokenizer_(padding_side|model_max_length)|(add_)?faster_(video|token_stride)"
    r"|force_sample|max_frame|use_pos_skipping|pos_skipping_range|num_(temporal|spatial)_tokens|video_fps"
)
"""Entries of training, and of what a model here has by its structure: they are left out and say nothing."""

NATIVE_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
"""Towers whose hidden states ``LlavaForConditionalGeneration`` reads, and how many tokens before the patches: none, or
one, which it drops."""

_PACKER = "fast_slow_resampler"
_POOLED_HERE = ("spatial_pool", "masked_drop", _PACKER)
"""Resamplers of the family whose parameters, if any, are those of the resampler of this name here."""


def translate_family(
    config: Mapping[str, Any], tower: TowerDescription, shapes: Mapping[str, tuple[int, ...]], where: str
) -> Settings:
    """The settings of a checkpoint of the LLaVA family.

    Args:
        config: the entries of its ``config.json``.
        tower: what its vision model's files say.
        shapes: of its tensors, under today's names.
        where: how errors begin.

    Raises:
        ValueError: it has a part that nothing here runs.
    """
    found = Settings()
    for entry, name in FAMILY_ENTRIES.items():
        value = config.get(entry)
        if value is not None:
            found.fields[name] = value if entry != "image_grid_pinpoints" else str(value)
    found.used = [entry for entry in config if entry in FAMILY_ENTRIES or _WITHOUT_EFFECT.fullmatch(entry)]
    fields = found.fields
    fields.setdefault("projector_type", "linear")  # What the family takes where nothing is said.
    if fields.get("resampler_type") in ("none", ""):
        del fields["resampler_type"]
    kind = fields.get("resampler_type")
    if kind is not None and kind not in _POOLED_HERE:
        raise ValueError(
            f"{where} has the resampler {kind!r} of the LLaVA family, whose parameters no resampler here has; nothing "
            "can run it"
        )
    feature = config.get("mm_vision_select_feature") or "patch"
    has_class_token = tower.vision_config["model_type"] not in ("siglip_vision_model", "siglip2_vision_model")
    if feature != "patch" and not (feature == "cls_patch" and not has_class_token):
        raise ValueError(
            f"{where}: mm_vision_select_feature is {feature!r}, and towers here give the patches of one layer (patch)"
        )
    follow_published_code(config, tower, shapes, found, where)
    _look_at_tower(config, tower, found)
    if kind == _PACKER:
        _translate_packer(config, tower, shapes, found)
    if fields.get("resampler_type") is None:
        for name in ("spatial_pool_stride", "spatial_pool_mode"):
            fields.pop(name, None)
    return found


def _look_at_tower(config: Mapping[str, Any], tower: TowerDescription, found: Settings) -> None:
    fields = found.fields
    if str(tower.vision_config["model_type"]).startswith("dinov2"):
        # The only code of the family with a DINOv2 takes what that model returns, whatever the entry says.
        asked = fields.get("vision_select_layer")
        fields |= {"vision_select_layer": -1, "vision_final_norm": True}
        found.changed.append(
            f"mm_vision_select_layer {asked}: the fork's DINOv2 gave its last layer behind the final norm, whatever "
            "this said; so does this model (layer -1, with the norm)"
        )
    if fields.get("image_aspect_ratio") == "pad":
        videos = "frames of videos were prepared as the tower's processor does; here they are padded as pictures are"
        if tower.image_resize_size not in (None, tower.image_size):
            found.changed.append(
                f"image_aspect_ratio pad: padded pictures were resized to {tower.image_resize_size} and cut to "
                f"{tower.image_size}; here the whole padded picture is seen"
            )
        if fields.get("resampler_type") is not None:
            found.changed.append(f"image_aspect_ratio pad: {videos}")


def _translate_packer(
    config: Mapping[str, Any], tower: TowerDescription, shapes: Mapping[str, tuple[int, ...]], found: Settings
) -> None:
    """Settings of the TokenPacker, which the family's code has partly as constants."""
    fields = found.fields
    for entry, name in (
        ("mm_perceiver_latents", "perceiver_latents"),
        ("mm_perceiver_latents_fast", "perceiver_latents_fast"),
    ):
        if name not in fields:
            default = 81 if name == "perceiver_latents" else 9
            fields[name] = default
            found.assumed.append(f"{entry} {default}, as in the recipes (config.json does not say)")
        latents = int(fields[name])
        # The family takes the whole part of the root for the side of a grid.
        side = math.isqrt(latents)
        if side * side != latents:
            fields[name] = side * side
            found.changed.append(f"{entry} {latents} is no square and ran as {side} x {side}: {side * side} here")
    inner = next(
        (shape[0] for name, shape in shapes.items() if name.endswith("vision_resampler.main.q_proj.weight")), None
    )
    if inner is not None:
        fields["resampler_width"] = inner
    fields["resampler_heads"] = 8  # A constant in the family.
    fields["resample_images"] = bool(config.get("use_downsample_image"))
    # LLaVA-ST as published is a Qwen2 with SigLIP; its fork for BabyLM has other numbers of frames and other attention.
    is_original = config.get("model_type") == "llava_qwen" and str(tower.vision_config["model_type"]).startswith(
        "siglip"
    )
    frames, slow = (100, 20) if is_original else (4, 4)
    fields |= {"num_frames": frames, "slow_frames": slow}
    found.assumed.append(
        f"num_frames {frames} and mm_slow_frames {slow}, as {'LLaVA-ST' if is_original else 'the Italian recipe'} has "
        "(config.json does not say)"
    )
    if not is_original:
        side, slow_side = tower.patches_per_side, math.isqrt(int(fields["perceiver_latents"]))
        stretched = (
            f", and keys were stretched from {side} x {side} to a multiple of {slow_side}" if side % slow_side else ""
        )
        found.changed.append(
            "the packer's attention: in the fork every query attended to all cells of all frames"
            f"{stretched}; here to its own window (the weights are the same, what they give is not: train them on)"
        )


def translate_native(config: Mapping[str, Any], tower: TowerDescription, where: str) -> Settings:
    """The settings of transformers' ``LlavaForConditionalGeneration``.

    Args:
        config: the entries of its configuration, with all defaults.
        tower: what its folder says of the vision model.
        where: how errors begin.

    Raises:
        ValueError: it reads its tower in a way that no tower here does.
    """
    layer, strategy = config["vision_feature_layer"], config["vision_feature_select_strategy"]
    kind = str(tower.vision_config["model_type"])
    if not isinstance(layer, int):
        raise ValueError(f"{where}: vision_feature_layer is {layer}, and towers here give one layer")
    wanted = "default" if NATIVE_TOWERS.get(kind) else "full"
    if kind not in NATIVE_TOWERS or strategy != wanted:
        raise ValueError(
            f"{where}: vision_feature_select_strategy {strategy!r} of a {kind} gives something else than its patches; "
            f"read are {', '.join(NATIVE_TOWERS)} with class tokens dropped"
        )
    if config["projector_hidden_act"] != "gelu" or not config["multimodal_projector_bias"]:
        raise ValueError(f"{where}: its projector is no mlp2x_gelu (two layers with biases, GELU between them)")
    return Settings({"vision_select_layer": layer, "projector_type": "mlp2x_gelu"})
