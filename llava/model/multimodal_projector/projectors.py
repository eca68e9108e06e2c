"""Projectors: from the features of the tower's width to those of the language model's."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.messages import shorten
from llava.registry import PLUGIN_HINT, Registry
from llava.token_layout import PROJECTOR_SETTINGS, PoolerSettings

Builder = Callable[[VisionConfig, int], nn.Module]
"""From the visual settings and the width of the language model to a projector, which maps (frames, tower's patches,
``vision.hidden_size``) to (frames, ``vision.grid_side`` squared, width)."""

PROJECTORS: Registry[Builder] = Registry("projector", PROJECTOR_SETTINGS)
"""Builders by exact name; the names of MLPs are a pattern, see ``parse_mlp``."""

MLP_NAMES = ("mlpNx_gelu", "mlpNx_resMx_gelu (N, M >= 1)")

_MOST_LAYERS = 64
_MLP_NAME = re.compile(r"mlp([1-9]\d*)x(?:_res([1-9]\d*)x)?_gelu")


@PROJECTORS.register("linear")
def build_linear(vision: VisionConfig, hidden_size: int) -> nn.Module:
    """One linear layer."""
    return nn.Linear(vision.hidden_size, hidden_size)


@PROJECTORS.register("identity")
def build_identity(vision: VisionConfig, hidden_size: int) -> nn.Module:
    """Nothing at all, for a tower that is as wide as the language model; another one is a ValueError."""
    if vision.hidden_size != hidden_size:
        raise ValueError(
            f"--mm_projector_type identity needs a tower as wide as the language model, but the tower is "
            f"{vision.hidden_size} wide and the language model {hidden_size}; use linear or mlp2x_gelu"
        )
    return nn.Identity()


@PROJECTORS.register("pooler")
class Pooler(nn.Module):
    """Makes one feature of each 2 x 2 patches, by a strided convolution, GELU and a linear layer.

    Parameters are named as in LLaVA-NeXT. A grid of an odd side is continued by one row and one
    column like its last, so that no patch is left out.
    """

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.side = vision.patches_per_side
        self.stride = PoolerSettings.stride
        self.conv_pool = nn.Conv2d(vision.hidden_size, hidden_size, kernel_size=self.stride, stride=self.stride)
        self.proj = nn.Sequential(nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        grids = features.transpose(1, 2).unflatten(2, (self.side, self.side))  # (frames, tower width, side, side)
        missing = -self.side % self.stride
        if missing:
            grids = F.pad(grids, (0, missing, 0, missing), mode="replicate")  # an even side
        pooled = self.conv_pool(grids).flatten(2).transpose(1, 2)  # (frames, side / 2 squared, width)
        return self.proj(pooled)  # (frames, side / 2 squared, width)


class ResidualBlock(nn.Module):
    """Layer norm, then a two-layer GELU MLP that is added to the normed features.

    The residual starts behind the norm, and parameters are named, as in the LLaVA family.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        normed = self.pre_norm(features)  # (frames, patches, width)
        return normed + self.proj(normed)


class MlpShape(NamedTuple):
    """Linear layers of an MLP, and residual blocks behind them."""

    depth: int
    num_blocks: int


def parse_mlp(name: str) -> MlpShape | None:
    """What a name like ``mlp2x_gelu`` or ``mlp2x_res2x_gelu`` asks for, or None for another name.

    Raises:
        ValueError: it asks for more layers than a projector may have.
    """
    if (match := _MLP_NAME.fullmatch(name)) is None:
        return None
    if max(map(len, match.groups(default=""))) > 3 or max(map(int, match.groups(default="0"))) > _MOST_LAYERS:
        raise ValueError(
            f"--mm_projector_type is {shorten(name)}; it may have {_MOST_LAYERS} layers and blocks at most"
        )
    return MlpShape(int(match.group(1)), int(match.group(2) or 0))


def build_mlp(input_size: int, output_size: int, shape: MlpShape, width: int | None = None) -> nn.Module:
    """N linear layers with GELU between them, ``width`` wide (by default as the output), then M residual blocks."""
    # "mlp2x_gelu" is the projector of LLaVA-1.5 (arXiv 2310.03744); parameters are named by their place, as there.
    sizes = [input_size, *[width or output_size] * (shape.depth - 1), output_size]
    layers: list[nn.Module] = []
    for before, behind in pairwise(sizes):
        layers += [nn.Linear(before, behind), nn.GELU()]
    layers.pop()
    return nn.Sequential(*layers, *(ResidualBlock(output_size) for _ in range(shape.num_blocks)))


def build_projector(vision: VisionConfig, hidden_size: int) -> nn.Module:
    """Build the projector that ``vision.projector_type`` names, see ``Builder``.

    Raises:
        ValueError: an unknown type, or widths that the type cannot join.
    """
    shape = parse_mlp(vision.projector_type)
    if vision.projector_width is not None and (shape is None or shape.depth == 1):
        raise ValueError(
            f"--mm_projector_width is {vision.projector_width}, but --mm_projector_type {vision.projector_type} has no "
            "layers that it could lie between; use mlp2x_gelu, or leave the width out"
        )
    if shape is not None:
        return build_mlp(vision.hidden_size, hidden_size, shape, vision.projector_width)
    if vision.projector_type not in PROJECTORS:
        known = ", ".join([*PROJECTORS.names(), *MLP_NAMES])
        raise ValueError(f"unknown --mm_projector_type {vision.projector_type!r}; known: {known}; {PLUGIN_HINT}")
    return PROJECTORS.get(vision.projector_type)(vision, hidden_size)
