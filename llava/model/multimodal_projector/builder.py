"""Chooses a projector by name."""

from __future__ import annotations

from torch import nn

from llava.config import VisionConfig
from llava.model.multimodal_projector.projectors import PROJECTORS, build_mlp, parse_mlp


def build_projector(vision: VisionConfig, hidden_size: int) -> nn.Module:
    """Build the projector that ``vision.projector_type`` names.

    Args:
        vision: gives the type and the tower's width.
        hidden_size: width of the language model.

    Returns:
        A module that maps (..., vision.hidden_size) to (..., hidden_size).
    """
    depth = parse_mlp(vision.projector_type)
    if depth is not None:
        return build_mlp(vision.hidden_size, hidden_size, depth)
    if vision.projector_type not in PROJECTORS:
        known = ", ".join([*PROJECTORS.names(), "mlpNx_gelu (N >= 1)"])
        raise ValueError(f"unknown --mm_projector_type {vision.projector_type!r}; known: {known}")
    return PROJECTORS.get(vision.projector_type)(vision.hidden_size, hidden_size)
