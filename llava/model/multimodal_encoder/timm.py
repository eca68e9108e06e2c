"""Vision transformers of the timm library, through transformers' wrapper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from llava.model.multimodal_encoder.base import TOWERS, TowerDescription, require_timm
from llava.model.multimodal_encoder.hf import HuggingFaceTower, count_layers, count_patches, square_side


class TimmModel(Protocol):
    """What is used of a model of timm, which has no types."""

    pretrained_cfg: Mapping[str, object]
    feature_info: Sequence[Mapping[str, int]]

    def forward_intermediates(
        self, x: Tensor, *, indices: int, output_fmt: str, intermediates_only: bool
    ) -> Sequence[Tensor]: ...


@TOWERS.register("timm_wrapper")
class TimmTower(HuggingFaceTower):
    """A model of timm whose layers share one width and one grid (extra `timm`).

    timm counts no embeddings among its hidden states; here layer 1 is the first block all the same.
    """

    unused_parameters = ("mask_token",)

    @classmethod
    def describe(cls, source: str, config: PretrainedConfig) -> TowerDescription:
        model = _build_on_meta(source, config)
        width, patch = _width_and_patch(source, config, model)
        images = _resolve_images(config, model)
        # input_size is (channels, height, width).
        side = square_side(images["input_size"][1:], source, "input_size")
        own_side = square_side(getattr(_patch_embed(model), "img_size", None) or side, source, "img_size")
        if side != own_side and getattr(_patch_embed(model), "strict_img_size", True):
            raise ValueError(
                f"--vision_tower {source!r} builds {config.architecture} for {own_side} x {own_side} pixels, but its "
                f"pretrained_cfg says {side} x {side}; let img_size in model_args and input_size in "
                "pretrained_cfg of its config.json agree"
            )
        return TowerDescription(
            vision_config={
                "model_type": config.model_type,
                "architecture": config.architecture,
                "model_args": config.model_args,
            },
            hidden_size=width,
            image_size=side,
            patches_per_side=count_patches(source, side, patch, own_side),
            # timm's other ways to cut ("squash", "border") show the whole image.
            image_resize_size=math.floor(side / images["crop_pct"]) if images["crop_mode"] == "center" else None,
            image_mean=tuple(images["mean"]),
            image_std=tuple(images["std"]),
        )

    def build_model(self, config: PretrainedConfig) -> PreTrainedModel:
        require_timm()
        model = AutoModel.from_config(config, trust_remote_code=False)
        # Blocks behind the selected one, the norm and the head are taken away, as from transformers' own models.
        kept = count_layers(self.vision, len(model.timm_model.feature_info))
        model.timm_model.prune_intermediate_layers([kept - 1], prune_norm=True, prune_head=True)
        return model

    def encode(self, pixels: Tensor) -> Tensor:
        model = cast(TimmModel, self.vision_tower.timm_model)
        # Maps (frames, width, rows, columns) are the one form that every architecture gives.
        features = model.forward_intermediates(pixels, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
        return features.flatten(2).transpose(1, 2)  # (frames, patches, width)


def _build_on_meta(source: str, config: PretrainedConfig) -> TimmModel:
    """The timm model without weights, to ask it for its shape."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(config.architecture, num_classes=0, **(config.model_args or {}))
    except RuntimeError as error:
        raise ValueError(
            f"--vision_tower {source!r} is {config.architecture}, which timm {timm.__version__} cannot build: {error}"
        ) from error


def _width_and_patch(source: str, config: PretrainedConfig, model: TimmModel) -> tuple[int, int]:
    """Width of a model's features and side of its patches in pixels, the same at every layer."""
    layers = model.feature_info if hasattr(model, "prune_intermediate_layers") else []
    shapes = {(layer["num_chs"], layer["reduction"]) for layer in layers}
    if len(shapes) != 1:
        raise ValueError(
            f"--vision_tower {source!r} is {config.architecture}, whose layers differ in width or grid; "
            "choose a vision transformer, which has one of each"
        )
    # num_chs is the width of the features, reduction the pixels of the picture that one of them stands for.
    return shapes.pop()


def _resolve_images(config: PretrainedConfig, model: TimmModel) -> dict[str, Any]:
    """input_size (channels, height, width), mean, std, crop_pct and crop_mode.

    What config.json says in pretrained_cfg comes before the architecture's own defaults.
    """
    from timm.data import resolve_data_config

    own = getattr(config, "pretrained_cfg", None) or {}
    own_size = getattr(_patch_embed(model), "img_size", None)
    own_format = {"input_size": (3, *own_size)} if own_size else {}
    return resolve_data_config(pretrained_cfg={**model.pretrained_cfg, **own_format, **own})


def _patch_embed(model: TimmModel) -> object:
    return getattr(model, "patch_embed", None)
