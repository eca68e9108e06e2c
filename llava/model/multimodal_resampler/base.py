"""The contract of a resampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.registry import Registry
from llava.token_layout import RESAMPLER_SETTINGS, ResamplerSettings
from llava.types import MediaKind


class Resampler(nn.Module, ABC):
    """Turns patch features of equally long media into their token features.

    Learned queries belong into an ``nn.Embedding``: a checkpoint without them is loaded into a model that was built
    without memory, and transformers fills the modules that it knows; a bare parameter stays as it happens to be.

    Args:
        vision: the settings; those of the resampler, as it was registered with them, are in ``settings``.
        hidden_size: width of the features that come in and go out.
    """

    structure: ClassVar[tuple[str, ...]] = ()
    """The settings that decide which parameters there are, or what they mean: a checkpoint is bound to them."""

    settings: ResamplerSettings

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        assert vision.resampler is not None
        self.vision = vision
        self.settings = vision.resampler

    @abstractmethod
    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """Resample a group of media of one kind and length.

        Args:
            features: (media, frames, patches, width), patches row by row on a grid of ``vision.grid_side``.
            kind: "image" (one frame each) or "video".

        Returns:
            (media, tokens, width), the tokens of the spans in order, as many as ``settings.count_tokens`` says.
        """

    def forward(self, features: Tensor, kind: MediaKind) -> Tensor:
        """As ``resample``, in the dtype of ``features``; images pass as they are if they are not to be resampled.

        Raises:
            ValueError: the subclass does not make as many tokens as its settings count.
        """
        # The text has as many placeholders as the layout counts: what is made here has to agree with it to the token.
        if not self.vision.layout.resamples(kind):
            return features.flatten(1, 2)  # (media, patches, width)
        tokens = self.resample(features, kind).to(features.dtype)  # (media, tokens, width)
        expected = sum(self.vision.layout.count_tokens(kind, features.shape[1]))
        if tokens.shape[1] != expected:
            raise ValueError(
                f"the resampler {self.vision.resampler_type!r} makes {tokens.shape[1]} tokens of one {kind} of "
                f"{features.shape[1]} frames, but its settings ({type(self.settings).__name__}) count {expected}"
            )
        return tokens

    def attribute(self, features: Tensor, kind: MediaKind, weights: Tensor) -> Tensor | None:
        """Hand the weights of one medium's tokens on to the patches that they were made of, for heat maps.

        Args:
            features: (1, frames, patches, width), as for ``resample``.
            kind: as for ``resample``; a kind that is resampled.
            weights: (tokens,), at least 0.

        Returns:
            (frames, patches), whose sum is that of the weights; None for a resampler that cannot tell.
        """
        return None


RESAMPLERS: Registry[type[Resampler]] = Registry("resampler", RESAMPLER_SETTINGS)


def build_resampler(vision: VisionConfig, hidden_size: int) -> Resampler | None:
    """Build the resampler that ``vision.resampler_type`` names, or None when it names none.

    Args:
        vision: type and settings.
        hidden_size: width of the features that come in and go out.
    """
    if vision.resampler_type is None:
        return None
    return RESAMPLERS.get(vision.resampler_type)(vision, hidden_size)


def transposed(linear: Callable[[Tensor], Tensor], shape: tuple[int, ...], weights: Tensor) -> Tensor:
    """What the transpose of a linear map makes of weights.

    Args:
        linear: from a tensor of ``shape`` to one of the shape of ``weights``.
        shape: of its input, and of the result.
        weights: a number for each element of its output.
    """
    with torch.enable_grad():
        zeros = torch.zeros(shape, dtype=weights.dtype, device=weights.device, requires_grad=True)
        (found,) = torch.autograd.grad(linear(zeros), zeros, weights)
    return found


def resize(x: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """Interpolate (batch, width, *axes) to (batch, width, *size), in fp32."""
    return F.interpolate(x.float(), size=size, mode=mode, align_corners=False).to(x.dtype)
