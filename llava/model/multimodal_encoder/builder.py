"""Chooses a tower for a vision model, and describes a vision model's folder."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from llava.config import VisionConfig
from llava.model.multimodal_encoder import hf, timm  # noqa: F401  (they register themselves)
from llava.model.multimodal_encoder.base import TOWERS, TowerDescription, VisionTower
from llava.model.multimodal_encoder.timm import require_timm
from llava.model.pretrained import foreign_code_note, forget_implementations, locate_model


def build_tower(vision: VisionConfig) -> VisionTower:
    """Build the structure of the tower that ``vision`` describes; its weights are loaded later."""
    return _find_tower(vision.vision_config["model_type"], vision.vision_tower)(vision)


def describe_tower(source: str) -> TowerDescription:
    """Read ``config.json`` and, where present, ``preprocessor_config.json`` of a vision model.

    Args:
        source: a folder, or a name on the model hub. Of a model of images and text (CLIP, SigLIP) the
            vision half is meant.

    Raises:
        ValueError: the source cannot be read, no tower is known for it, or its grid is no square of patches.
    """
    config = _read_config(locate_model(source, "--vision_tower"))
    return _find_tower(config.model_type, source).describe(source, config)


def _find_tower(model_type: str, source: str) -> type[VisionTower]:
    if model_type not in TOWERS:
        raise ValueError(
            f"the vision tower {source!r} has model_type {model_type!r}; known: {', '.join(TOWERS.names())}, "
            "and models whose vision_config is one of these"
        )
    return TOWERS.get(model_type)


def _read_config(source: str) -> PretrainedConfig:
    """The configuration of a vision model, or of the vision half of a two-tower model."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(source, error) from error
    # timm's own configurations have no model_type, and transformers cannot even read them without timm.
    if settings.get("model_type") == "timm_wrapper" or "pretrained_cfg" in settings:
        require_timm()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        if note := foreign_code_note(settings):
            raise ValueError(
                f"--vision_tower {source!r} has the unknown type {settings.get('model_type')!r}{note}"
            ) from error
        raise _unreadable(source, error) from error
    return forget_implementations(getattr(config, "vision_config", config))


def _unreadable(source: str, error: Exception) -> ValueError:
    return ValueError(f"--vision_tower {source!r} has no readable configuration: {error}")
