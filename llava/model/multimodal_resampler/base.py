"""The contract of a resampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.registry import Registry
from llava.types import MediaKind


class Resampler(nn.Module, ABC):
    """Turns patch features of equally long media into their token features.

    A subclass is registered under the name that its law has in ``llava.token_layout``. Learned queries
    belong into an ``nn.Embedding``: a checkpoint without them is loaded into a model that was built
    without memory, and transformers fills the modules that it knows; a bare parameter stays as it
    happens to be.

    Args:
        vision: the settings.
        hidden_size: width of the features that come in and go out.
    """

    structure: ClassVar[tuple[str, ...]] = ()
    """Fields of ``VisionConfig`` that decide which parameters there are, or what they mean."""

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.vision = vision

    @abstractmethod
    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """Resample a group of media of one kind and length.

        Args:
            features: (media, frames, patches, width), patches row by row on a square grid.
            kind: "image" (one frame each) or "video".

        Returns:
            (media, tokens, width), with the tokens of the streams in order, as many as the law counts.
        """

    def output_tokens(self, kind: MediaKind, num_frames: int = 1) -> int:
        """Tokens of one image, or of one video of ``num_frames`` frames."""
        return sum(self.vision.stream_lengths(kind, num_frames))

    def forward(self, features: Tensor, kind: MediaKind) -> Tensor:
        """As ``resample``, in the dtype of ``features``; images pass as they are if they are not to be resampled.

        Raises:
            ValueError: the subclass and its law do not agree on the number of tokens.
        """
        if not self.vision.resamples(kind):
            return features.flatten(1, 2)
        tokens = self.resample(features, kind).to(features.dtype)
        expected = self.output_tokens(kind, features.shape[1])
        if tokens.shape[1] != expected:
            raise ValueError(
                f"the resampler {self.vision.resampler_type!r} makes {tokens.shape[1]} tokens of one {kind} of "
                f"{features.shape[1]} frames, but its law in llava.token_layout counts {expected}"
            )
        return tokens


RESAMPLERS: Registry[type[Resampler]] = Registry("resampler")


# Interpolation of grids and of time.


def resize(x: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """Interpolate (batch, width, *axes) to (batch, width, *size), in fp32."""
    return F.interpolate(x.float(), size=size, mode=mode, align_corners=False).to(x.dtype)
