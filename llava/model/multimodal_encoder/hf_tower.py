"""Vision models of the transformers library as towers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from llava.config import VisionConfig
from llava.model.multimodal_encoder.base import VisionTower
from llava.model.quiet import quiet_transformers
from llava.registry import Registry

logger = logging.getLogger(__name__)

TOWERS: Registry[Callable[[VisionConfig], VisionTower]] = Registry("vision tower")
"""Towers by the ``model_type`` of the vision model's configuration."""


@TOWERS.register("dinov2")
class HuggingFaceTower(VisionTower):
    """Features of one layer of a transformers vision model.

    Layers behind the selected one are never built: they would cost memory, time and, where the
    tower is trained, leave parameters without gradients. The final norm goes with them, since a
    hidden state is what stands before it.
    """

    final_norm = "layernorm"
    unused_parameters = ("mask_token",)

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__(vision)
        config = build_config(vision)
        self.vision_tower = AutoModel.from_config(config)
        setattr(self.vision_tower, self.final_norm, nn.Identity())

    def freeze_unused(self) -> None:
        for name, parameter in self.vision_tower.named_parameters():
            if name.rpartition(".")[2] in self.unused_parameters:
                parameter.requires_grad = False

    def encode(self, pixels: Tensor) -> Tensor:
        hidden = self.vision_tower(pixel_values=pixels).last_hidden_state
        return hidden[:, -self.vision.num_patches :]

    def load_weights(self, source: str) -> str:
        """Load the selected layers' weights from a folder or a hub name.

        Raises:
            ValueError: the source is gone, lacks weights of this tower, or (where the configuration
                has a hash) holds other weights than those the model was trained with.
        """
        try:
            with quiet_transformers():
                loaded, info = AutoModel.from_pretrained(source, dtype="auto", output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the vision tower's weights cannot be read from {source!r}: {error}\n"
                "Give the folder that has them with --vision_tower; a checkpoint written with "
                "--save_vision_tower holds them itself."
            ) from error
        names = set(self.vision_tower.state_dict())
        missing = sorted(names & set(info["missing_keys"]) | names - set(loaded.state_dict()))
        if missing:
            raise ValueError(f"the vision tower at {source!r} lacks weights: {missing[:5]}")
        weights = {name: tensor for name, tensor in loaded.state_dict().items() if name in names}
        found = hash_weights(weights)
        expected = self.vision.vision_tower_hash
        if expected is not None and found != expected:
            raise ValueError(
                f"the vision tower at {source!r} is not the one this model was trained with (its weights "
                f"hash to {found[:12]}, expected {expected[:12]}); give the right folder with --vision_tower"
            )
        self.vision_tower.load_state_dict(weights)
        return found


def build_config(vision: VisionConfig) -> PretrainedConfig:
    """The vision model's configuration, cut behind the selected layer."""
    # Without the dtype its files were written in: the tower gets that of the model around it.
    settings = {name: value for name, value in vision.vision_config.items() if name != "dtype"}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    selected = vision.vision_select_layer
    kept = selected if selected >= 0 else config.num_hidden_layers + 1 + selected
    if not 1 <= kept <= config.num_hidden_layers:
        raise ValueError(
            f"--mm_vision_select_layer is {selected}, but {vision.vision_tower!r} has "
            f"{config.num_hidden_layers} layers; use 1 to {config.num_hidden_layers}, or -1 to "
            f"{-config.num_hidden_layers}"
        )
    config.num_hidden_layers = kept
    return config


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
