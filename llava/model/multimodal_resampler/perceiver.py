"""The perceiver resampler: learned latents gather what a frame holds.

After Flamingo (arXiv 2204.14198), frame by frame. Flamingo puts all frames of a video into one set of
latents and has to mark each with an embedding of its time; here every frame has tokens of its own, in
order, and the language model's positions tell the time. A video may so be of any length, and an image
is a video of one frame.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler
from llava.token_layout import PerceiverSettings
from llava.types import MediaKind


class LatentAttention(nn.Module):
    """Latents attend to a frame's features and to each other.

    Args:
        width: width of features and latents.
        inner_width: width of queries, keys and values over all heads.
        num_heads: attention heads.
    """

    def __init__(self, width: int, inner_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_features = nn.LayerNorm(width)
        self.ln_latents = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner_width, bias=False)
        self.k_proj = nn.Linear(width, inner_width, bias=False)
        self.v_proj = nn.Linear(width, inner_width, bias=False)
        self.o_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """From (frames, latents, width) and (frames, patches, width) to what the latents gather."""
        latents = self.ln_latents(latents)  # (frames, latents, width)
        seen = torch.cat([self.ln_features(features), latents], dim=1)  # (frames, patches + latents, width)
        q, k, v = (self._split(x) for x in (self.q_proj(latents), self.k_proj(seen), self.v_proj(seen)))
        gathered = F.scaled_dot_product_attention(q, k, v)  # (frames, heads, latents, width of a head)
        return self.o_proj(gathered.transpose(1, 2).flatten(2))  # (frames, latents, width)

    def weigh(self, latents: Tensor, features: Tensor) -> Tensor:
        """How much each latent attends to patches and latents: (frames, latents, patches + latents), of all heads."""
        latents = self.ln_latents(latents)
        seen = torch.cat([self.ln_features(features), latents], dim=1)
        q, k = self._split(self.q_proj(latents)), self._split(self.k_proj(seen))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (frames, heads, latents, patches + latents)
        return scores.float().softmax(-1).mean(1)

    def _split(self, x: Tensor) -> Tensor:
        """(frames, positions, inner width) to (frames, heads, positions, width of a head)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PerceiverLayer(nn.Module):
    """Attention of the latents, then a two-layer MLP four times as wide; both are added to them."""

    def __init__(self, width: int, inner_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = LatentAttention(width, inner_width, num_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """(frames, latents, width) and (frames, patches, width) to (frames, latents, width)."""
        latents = latents + self.attention(latents, features)
        return latents + self.mlp(latents)


@RESAMPLERS.register("perceiver")
class Perceiver(Resampler):
    """Makes ``perceiver_latents`` tokens of each frame, in ``perceiver_depth`` layers."""

    structure = ("perceiver_latents", "perceiver_depth", "resampler_width", "resampler_heads")
    settings: PerceiverSettings

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__(vision, hidden_size)
        self.latents = nn.Embedding(self.settings.perceiver_latents, hidden_size)
        nn.init.normal_(self.latents.weight, std=0.02)
        block = (hidden_size, self.settings.resampler_width, self.settings.resampler_heads)
        self.layers = nn.ModuleList(PerceiverLayer(*block) for _ in range(self.settings.perceiver_depth))
        self.norm = nn.LayerNorm(hidden_size)

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; a frame's tokens depend on that frame alone."""
        frames = features.flatten(0, 1)  # (all frames, patches, width)
        # Called, not indexed: engines that share out parameters gather those of modules that are called.
        latents = self.latents(torch.arange(self.latents.num_embeddings, device=features.device))
        latents = latents.expand(len(frames), -1, -1)  # (all frames, latents, width)
        for layer in self.layers:
            latents = layer(latents, frames)
        return self.norm(latents).unflatten(0, features.shape[:2]).flatten(1, 2)  # (media, frames * latents, width)

    def attribute(self, features: Tensor, kind: MediaKind, weights: Tensor) -> Tensor:
        """See ``Resampler.attribute``; by attention rollout (arXiv 2005.00928) through the layers.

        A latent is learned and shows nothing of a frame before the first layer: what leads back to it is left out.
        """
        frames, num_latents = features[0], self.settings.perceiver_latents  # (frames, patches, width)
        latents = self.latents(torch.arange(num_latents, device=features.device)).expand(len(frames), -1, -1)
        held = torch.zeros(len(frames), num_latents, frames.shape[1], device=features.device)  # (..., latents, patches)
        for layer in self.layers:
            seen = cast(PerceiverLayer, layer).attention.weigh(latents, frames)  # (frames, latents, patches + latents)
            gathered = seen[..., : frames.shape[1]] + seen[..., frames.shape[1] :] @ held
            held = (held + gathered) / 2  # Half stays as it is: the residual connection.
            latents = layer(latents, frames)
        shares = held / held.sum(-1, keepdim=True)
        return (weights.unflatten(0, (len(frames), num_latents))[..., None] * shares).sum(1)
