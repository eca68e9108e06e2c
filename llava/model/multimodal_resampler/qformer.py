"""The Q-Former of BLIP-2 (arXiv 2301.12597), in transformers' implementation.

Learned queries attend to each other and to a frame's features. BLIP-2 looks at the features in every
second layer of twelve; with the few layers of a resampler every one does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from llava.config import VisionConfig
from llava.model.multimodal_resampler.base import RESAMPLERS, Resampler
from llava.token_layout import QFormerSettings
from llava.types import MediaKind


@RESAMPLERS.register("qformer")
class QFormer(Resampler):
    """Makes ``qformer_latents`` tokens of each frame, in ``qformer_depth`` layers."""

    structure = ("qformer_latents", "qformer_depth", "resampler_width", "resampler_heads")
    settings: QFormerSettings

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        super().__init__(vision, hidden_size)
        width = self.settings.resampler_width
        config = AutoConfig.for_model(
            "blip_2_qformer",
            hidden_size=width,
            num_hidden_layers=self.settings.qformer_depth,
            num_attention_heads=self.settings.resampler_heads,
            intermediate_size=4 * width,
            encoder_hidden_size=hidden_size,
            cross_attention_frequency=1,
            # As in the other vision modules: a batch in parts gives what the whole one gives.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.ln_features = nn.LayerNorm(hidden_size)
        self.queries = nn.Embedding(self.settings.qformer_latents, width)
        nn.init.normal_(self.queries.weight, std=config.initializer_range)
        self.encoder = AutoModel.from_config(config, trust_remote_code=False)
        self.to_out = nn.Linear(width, hidden_size)

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        """See ``Resampler.resample``; a frame's tokens depend on that frame alone."""
        frames = self.ln_features(features.flatten(0, 1))  # (all frames, patches, width)
        # Called, not indexed: engines that share out parameters gather those of modules that are called.
        queries = self.queries(torch.arange(self.queries.num_embeddings, device=features.device))
        queries = queries.expand(len(frames), -1, -1)  # (all frames, queries, inner width)
        gathered = self.encoder(query_embeds=queries, encoder_hidden_states=frames).last_hidden_state
        tokens = self.to_out(gathered)  # (all frames, queries, width)
        return tokens.unflatten(0, features.shape[:2]).flatten(1, 2)  # (media, frames * queries, width)
