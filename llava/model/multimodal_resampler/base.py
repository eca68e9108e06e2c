"""The contract of a resampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from llava.config import VisionConfig
from llava.registry import Registry
from llava.types import MediaKind


class Resampler(nn.Module, ABC):
    """Turns patch features of equally long media into their token features."""

    @abstractmethod
    def forward(self, features: Tensor, kind: MediaKind) -> Tensor:
        """Resample a group of media of one kind.

        Args:
            features: (media, frames, patches, width); the number of media may be zero.
            kind: "image" (one frame each) or "video".

        Returns:
            (media, tokens, width) with ``tokens == VisionConfig.num_tokens(kind, frames)``.
        """


RESAMPLERS: Registry[Callable[[VisionConfig, int], Resampler]] = Registry("resampler")
