"""From images and videos to embeddings among those of a text.

media (frames, 3, side, side) -> tower (frames, patches, tower width) -> projector (frames, patches, width)
(or the tower's features themselves, kept from before: (frames, 1, patches, tower width) -> projector)
-> positions, for models with tables of coordinates -> resampler (tokens, width) -> merged views, for anyres images
-> spliced into the token embeddings (batch, length, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.geometry import FLAT, AnyRes
from llava.model.coordinates import COORDINATES
from llava.model.multimodal_encoder.base import VisionTower
from llava.types import MediaKind, holds_features

VISION_MODULES = ("vision_tower", "mm_projector", "vision_resampler", "image_newline")
"""Attributes of a decoder that hold its vision modules; the first part of their parameters' names."""


def vision_module_of(name: str) -> str | None:
    """Which of ``VISION_MODULES`` a parameter or module belongs to by its name; None for the language model's."""
    return next((module for module in VISION_MODULES if module in name.split(".")), None)


def is_added(name: str) -> bool:
    """Whether a parameter belongs to what this library adds to a language model: vision modules, coordinates."""
    return vision_module_of(name) is not None or COORDINATES in name.split(".")


def encode_visual(
    tower: VisionTower,
    projector: nn.Module,
    resampler: nn.Module | None,
    media: list[Tensor],
    modalities: list[MediaKind],
    image_sizes: Sequence[tuple[int, int]] | None = None,
    merger: ViewMerger | None = None,
    positions: Callable[[int], Tensor] | None = None,
) -> list[Tensor]:
    """Encode all media of a batch: one call of the tower, one of the resampler for images and each length of video.

    Args:
        tower: frames to (frames, patches, tower width).
        projector: tower width to the language model's width; may pool the patches' grid.
        resampler: see ``Resampler.forward``; None keeps every patch.
        media: one (frames, 3, side, side) tensor for each image or video; the frames of an anyres image are its views.
            One (frames, 1, patches, tower width) holds features of the tower, which does not run for it.
        modalities: which of the two each is.
        image_sizes: original (height, width) of each; needed for anyres images alone.
        merger: puts the views of anyres images together; None where an image is one frame.
        positions: from a number of frames to (frames, patches, width) embeddings of where and when the patches are,
            added before the resampler; None adds nothing.

    Returns:
        One (tokens, width) tensor for each image or video, in order.
    """
    if len(media) != len(modalities):
        raise ValueError(f"{len(media)} images or videos came with {len(modalities)} modalities; pass one for each")
    if merger is not None:
        merger.check(media, modalities, image_sizes)
    features = projector(encode_frames(tower, media))  # (all frames, patches, width)
    by_media = features.split([len(frames) for frames in media])  # (frames, patches, width) each
    if positions is not None:
        by_media = tuple(feature + positions(len(feature)).to(feature.dtype) for feature in by_media)
    # The resampler takes media of one shape together. Each view of an image is resampled on its own, and so all images
    # are one group; the frames of a video are together.
    groups: dict[tuple[MediaKind, int], list[int]] = {}
    for i, (kind, frames) in enumerate(zip(modalities, media, strict=True)):
        groups.setdefault((kind, 1 if kind == "image" else len(frames)), []).append(i)
    encoded: dict[int, Tensor] = {}
    for (kind, length), members in groups.items():
        group = torch.cat([by_media[i] for i in members]).unflatten(0, (-1, length))  # (media, frames, patches, width)
        tokens = group.flatten(1, 2) if resampler is None else resampler(group, kind)  # (media, tokens, width)
        for i, parts in zip(members, tokens.split([len(media[i]) // length for i in members]), strict=True):
            if kind == "image" and merger is not None:
                assert image_sizes is not None
                encoded[i] = merger(parts, image_sizes[i])  # (views, tokens, width) -> (tokens, width)
            else:
                encoded[i] = parts.flatten(0, 1)
    # Groups were encoded in an order of their own: the features go back to that of the text.
    return [encoded[i] for i in range(len(media))]


def encode_frames(tower: VisionTower, media: list[Tensor]) -> Tensor:
    """The tower's features of all media, (all frames, patches, tower width); those that are given stay as they are."""
    pixels = [frames for frames in media if not holds_features(frames)]
    if len(pixels) == len(media):
        # Without gaps where class tokens were, as features that were kept: in bf16 a product's last bits depend on it.
        return tower(torch.cat(media)).contiguous()
    live = iter(tower(torch.cat(pixels)).split([len(frames) for frames in pixels]) if pixels else ())
    given = (frames.squeeze(1) if holds_features(frames) else next(live) for frames in media)
    # The same dtype for all: what the tower computes in.
    return torch.cat([frames.to(tower.dtype) for frames in given])


def splice(input_ids: Tensor, embeddings: Tensor, features: list[Tensor], visual_token_ids: list[int]) -> Tensor:
    """Overwrite every visual position of a batch with its feature, in one scatter.

    Start and end markers are overwritten like patches, as in the LLaVA-ST family: its checkpoints
    were trained so.

    Args:
        input_ids: int64 (batch, length).
        embeddings: (batch, length, width) embeddings of ``input_ids``.
        features: one (tokens, width) tensor for each image or video, over the batch in reading order.
        visual_token_ids: the ids of all visual tokens.

    Returns:
        (batch, length, width) embeddings; without features, ``embeddings`` with its values untouched.

    Raises:
        ValueError: there are more or fewer features than visual positions.
    """
    is_visual = torch.isin(input_ids, torch.tensor(visual_token_ids, device=input_ids.device))  # (batch, length)
    positions = is_visual.flatten().nonzero().squeeze(1)  # (visual positions,), in the flattened batch
    num_features = sum(len(feature) for feature in features)
    if num_features != len(positions):
        by_sample = is_visual.sum(1).tolist()
        raise ValueError(
            f"the text has {len(positions)} visual positions (by sample: {by_sample}), but the media give "
            f"{num_features} features (by image or video: {[len(feature) for feature in features]}); pass exactly the "
            "media whose placeholders stand in the text, with the number of frames they were expanded for"
        )
    if not features:
        return embeddings
    flat = embeddings.flatten(0, 1)  # (batch * length, width)
    return flat.index_copy(0, positions, torch.cat(features).to(flat.dtype)).view_as(embeddings)


@dataclass(frozen=True)
class ViewMerger:
    """Puts the features of an anyres image's views together, in the manner of ``anyres.merge_type``.

    Attributes:
        anyres: the geometry that the views were cut by.
        newline: (width,) what ends a row of the merged grid; None with ``flat``.
    """

    anyres: AnyRes
    newline: Tensor | None

    def __call__(self, views: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Merge the views of one image.

        Args:
            views: (1 + tiles, tokens, width), the whole picture first, then the tiles, row by row.
            image_size: original (height, width).

        Returns:
            (tokens, width), as many as ``anyres.num_tokens`` counts.
        """
        if self.anyres.merge_type == FLAT:
            return views.flatten(0, 1)
        assert self.newline is not None
        grid = self._without_padding(views[1:], image_size)  # (rows, columns, width)
        ends = self.newline.to(grid.dtype).expand(len(grid), 1, -1)  # (rows, 1, width)
        return torch.cat([views[0], torch.cat([grid, ends], dim=1).flatten(0, 1)])

    def _without_padding(self, tiles: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The tiles as one grid (rows, columns, width), cut to what shows the picture and shrunk if need be."""
        rows, columns = self.anyres.choose_grid(image_size)
        side = self.anyres.patches_per_side
        grid = tiles.view(rows, columns, side, side, -1).transpose(1, 2)  # (tile row, row, tile column, column, width)
        whole = grid.reshape(rows * side, columns * side, -1)  # (rows, columns, width) of patches
        top, left, size = self.anyres.patches_without_padding(image_size)
        shown = whole[top : top + size.height, left : left + size.width]  # without the canvas around the picture
        wanted = self.anyres.without_excess(size)
        if wanted == size:
            return shown
        shrunk = F.interpolate(shown.permute(2, 0, 1).unsqueeze(0).float(), size=wanted, mode="bilinear")
        return shrunk[0].permute(1, 2, 0).to(shown.dtype)

    def check(
        self,
        media: Sequence[Tensor],
        modalities: Sequence[MediaKind],
        image_sizes: Sequence[tuple[int, int]] | None,
    ) -> None:
        """A ValueError where images come without sizes, or with other views than their sizes ask for."""
        if "image" not in modalities:
            return
        if image_sizes is None or len(image_sizes) != len(media):
            found = "none" if image_sizes is None else str(len(image_sizes))
            raise ValueError(
                f"{len(media)} images or videos came with {found} image_sizes; this model cuts images into tiles "
                "(image_aspect_ratio anyres): pass the original (height, width) of each"
            )
        for views, kind, size in zip(media, modalities, image_sizes, strict=True):
            if kind == "image" and len(views) != self.anyres.num_views(size):
                raise ValueError(
                    f"an image of {size[0]} x {size[1]} (height x width) came as {len(views)} views, but is cut into "
                    f"{self.anyres.num_views(size)}; cut it with llava.data.media.cut_views"
                )
