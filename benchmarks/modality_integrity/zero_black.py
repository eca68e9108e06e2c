"""A projector that is linear, but gives exact zeros for a black picture: the arm "zero" of the study beside this file.

``--mm_projector_args '{"features": "black_features.safetensors"}'`` names what the tower sees in one.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.model.multimodal_projector.projectors import PROJECTORS
from llava.token_layout import ProjectorSettings

NEAR = 0.1
"""Distance, relative to the norm of a black picture's features; bf16 moves them by 0.01, the next picture is at 0.3."""


@dataclass(frozen=True)
class ZeroBlackSettings(ProjectorSettings):
    features: str = ""  # file that make_data.py has written


@PROJECTORS.register("zero_black", ZeroBlackSettings)
class ZeroBlack(nn.Module):
    """A linear layer behind which black pictures are zero."""

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(vision.hidden_size, hidden_size)
        self.file = vision.projector.features
        self.black: Tensor | None = None  # Read when needed: text alone never asks for it.

    def forward(self, features: Tensor) -> Tensor:
        if self.black is None:
            self.black = load_file(self.file)["black"].to(features.device)
        distance = (features.float() - self.black).flatten(1).norm(dim=1) / self.black.norm()  # (frames,)
        seen = (distance > NEAR).view(-1, 1, 1)
        return torch.where(seen, self.layer(features), torch.zeros((), dtype=features.dtype, device=features.device))
