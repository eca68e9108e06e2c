"""Chooses a projector by name."""

from __future__ import annotations

from torch import nn

from llava.config import VisionConfig
from llava.model.multimodal_projector.projectors import MLP_NAMES, PROJECTORS, build_mlp, parse_mlp


def build_projector(vision: VisionConfig, hidden_size: int) -> nn.Module:
    """Build the projector that ``vision.projector_type`` names.

    Args:
        vision: gives the type, the tower's width and its grid.
        hidden_size: width of the language model.

    Returns:
        A module that maps (frames, ``vision.num_patches``, ``vision.hidden_size``) to
        (frames, ``vision.grid_patches``, hidden_size).

    Raises:
        ValueError: an unknown type, or widths that the type cannot join.
    """
    shape = parse_mlp(vision.projector_type)
    if shape is not None:
        return build_mlp(vision.hidden_size, hidden_size, shape)
    if vision.projector_type not in PROJECTORS:
        known = ", ".join([*PROJECTORS.names(), *MLP_NAMES])
        raise ValueError(f"unknown --mm_projector_type {vision.projector_type!r}; known: {known}")
    return PROJECTORS.get(vision.projector_type)(vision, hidden_size)
