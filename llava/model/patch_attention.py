"""Where a model looked when it chose a token: its attention over the patches of images and videos, for heat maps.

attention of the decoder's layers (tokens, positions), from one more step of the answer with eager attention
-> weights of each medium's visual tokens (tokens,)
-> shares of patches (frames, side, side), back through merged views and the resampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.compat import attention_of, set_attention
from llava.geometry import AnyRes
from llava.model.coordinates import Variables
from llava.model.llava_arch import CACHE
from llava.model.multimodal_resampler.base import transposed
from llava.model.visual import ViewMerger, encode_frames
from llava.types import MediaKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llava.model.llava_arch import LlavaMetaForCausalLM

_FINER = 8
"""Cells that a side of a patch is cut into where tiles, whose edges lie anywhere, are put onto a picture."""


@torch.no_grad()
def read_attention(
    model: LlavaMetaForCausalLM,
    input_ids: Tensor,
    num_prompt: int,
    images: list[Tensor],
    modalities: list[MediaKind],
    image_sizes: list[tuple[int, int]] | None = None,
    variables: Variables | None = None,
) -> Tensor:
    """How much each token of an answer attended to each position before it, when it was chosen.

    Args:
        model: in eval mode.
        input_ids: int64 (1, length), a prompt and its answer.
        num_prompt: tokens of the prompt, at least 1.
        images, modalities, image_sizes, variables: as for ``forward``.

    Returns:
        (length - num_prompt, length - 1), the mean over layers and heads; each row sums to 1.

    Raises:
        ValueError: the decoder gives no attention weights.
    """
    decoder = model.get_model()
    tables, tokens = decoder.coordinate_embeddings(), model.find_coordinates(input_ids, variables)
    embeddings = model.embed_multimodal(input_ids, images, modalities, image_sizes, tables, tokens)
    assert embeddings is not None
    others = model.decoder_inputs(input_ids)  # (1, length) each
    # A token is chosen at the position before its own. What lies before the first of these goes into the cache in the
    # model's own attention: eager attention of a whole prompt would hold its square in every layer.
    start, end = num_prompt - 1, input_ids.shape[1] - 1
    given: dict[str, object] = {}
    if start:
        before = {name: ids[:, :start] for name, ids in others.items()}
        given[CACHE] = getattr(
            model(inputs_embeds=embeddings[:, :start], use_cache=True, logits_to_keep=1, return_dict=True, **before),
            CACHE,
        )
    asked = {name: ids[:, start:end] for name, ids in others.items()}
    mask = torch.ones_like(input_ids[:, :end])
    with _eager_attention(decoder.config):
        output = model(
            inputs_embeds=embeddings[:, start:end], attention_mask=mask, use_cache=bool(start), logits_to_keep=1,
            output_attentions=True, return_dict=True, **asked, **given,
        )  # fmt: skip
    layers = [layer for layer in output.attentions or () if layer is not None]  # (1, heads, tokens, keys) each
    if not layers:
        raise ValueError(f"{type(decoder).__name__} gives no attention weights: where it looked cannot be told")
    # A layer with a sliding window keeps the last keys alone.
    means = [F.pad(layer[0].float().mean(0), (end - layer.shape[-1], 0)) for layer in layers]
    return torch.stack(means).mean(0)


@contextmanager
def _eager_attention(config: PretrainedConfig) -> Iterator[None]:
    """Within it a decoder computes attention weights as such, which fused kernels never hold."""
    own = attention_of(config)
    name = own or "eager"
    for fused in ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
        # A model's own attention functions have the names of transformers' behind a prefix.
        name = name.replace(fused, "eager")
    set_attention(config, name)
    try:
        yield
    finally:
        set_attention(config, own or "eager")


def split_by_media(
    attention: Tensor, input_ids: Sequence[int], visual_token_ids: Sequence[int], num_tokens: Sequence[int]
) -> list[Tensor]:
    """The attention on each image or video, (tokens of the answer, tokens of the medium) each.

    Args:
        attention: (tokens, positions), from ``read_attention``.
        input_ids: at least as many as positions.
        visual_token_ids: the ids of all visual tokens.
        num_tokens: of each image or video, in reading order.
    """
    ids = torch.tensor(list(input_ids[: attention.shape[1]]))
    places = torch.isin(ids, torch.tensor(list(visual_token_ids))).nonzero().squeeze(1)  # (visual positions,)
    return list(attention[:, places.to(attention.device)].split(list(num_tokens), dim=1))


@torch.no_grad()
def attribute_to_patches(
    model: LlavaMetaForCausalLM, frames: Tensor, kind: MediaKind, size: tuple[int, int], weights: Tensor
) -> tuple[Tensor, bool]:
    """Hand the weights of the visual tokens of one image or video on to its patches.

    Args:
        model: that made the tokens.
        frames: as an entry of ``images`` of ``forward``.
        kind: which of the two it is.
        size: its original (height, width).
        weights: (tokens,), at least 0, such as a row of ``split_by_media``.

    Returns:
        (frames, side, side) on the grid of each frame, the sum that of the weights but for what lies on the ends of
        rows and the padding of anyres tiles; of an anyres image one frame, the whole picture. And whether places
        within frames are told: False where the resampler only has tokens of each frame, which are then spread evenly.

    Raises:
        ValueError: the resampler does not even tell its tokens by frames.
    """
    decoder, vision = model.get_model(), model.vision
    assert vision is not None
    side, layout = vision.grid_side, vision.layout
    frames = (frames.unsqueeze(0) if frames.ndim == 3 else frames).to(model.device)
    weights = weights.float()
    anyres = vision.anyres if kind == "image" else None
    if anyres is not None:
        shape = (len(frames), sum(layout.count_tokens("image")), 1)  # (views, tokens, 1)
        merger = ViewMerger(anyres, weights.new_zeros(1))
        weights = transposed(lambda views: merger(views, size), shape, weights[:, None])[..., 0].flatten()
    if not layout.resamples(kind):
        return _place(weights.view(len(frames), side, side), anyres, size), True
    features = decoder.mm_projector(encode_frames(decoder.vision_tower, [frames]))  # (frames, patches, width)
    if (tables := decoder.coordinate_embeddings()) is not None:
        features = features + tables.patch_positions(len(frames), grid_side=side).to(features.dtype)
    # The resampler takes views of an image one by one, the frames of a video together.
    media = [view[None, None] for view in features] if kind == "image" else [features[None]]
    shares = [
        decoder.vision_resampler.attribute(one, kind, part)
        for one, part in zip(media, weights.chunk(len(media)), strict=True)
    ]
    if all(share is not None for share in shares):
        return _place(torch.cat(shares).float().view(len(frames), side, side), anyres, size), True
    if len(weights) % len(frames):
        raise ValueError(
            f"the resampler {vision.resampler_type!r} does not tell which patches its tokens are made of; define "
            "attribute() in its class (docs/extending.md)"
        )
    even = weights.view(len(frames), -1).sum(1) / side**2
    return _place(even[:, None, None].expand(-1, side, side), anyres, size), False


def _place(views: Tensor, anyres: AnyRes | None, size: tuple[int, int]) -> Tensor:
    """The shares of patches of frames as they are; those of the views of a picture, on the grid of the first one."""
    if anyres is None:
        return views
    side = views.shape[-1]
    grid, (height, width) = anyres.place(size)
    tiles = views[1:].unflatten(0, (grid.height, grid.width)).transpose(1, 2)
    canvas = tiles.reshape(grid.height * side, grid.width * side).repeat_interleave(_FINER, 0)
    canvas = canvas.repeat_interleave(_FINER, 1) / _FINER**2  # so many cells a patch
    # The picture lies in the middle of the canvas.
    cells = side * _FINER / anyres.side
    rows, columns = max(round(height * cells), 1), max(round(width * cells), 1)
    top, left = (canvas.shape[0] - rows) // 2, (canvas.shape[1] - columns) // 2
    shown = canvas[top : top + rows, left : left + columns]
    fitted = F.adaptive_avg_pool2d(shown[None], (side, side))[0]
    total = fitted.sum()
    return (views[0] + (fitted * shown.sum() / total if total > 0 else fitted))[None]
