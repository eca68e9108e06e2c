"""Puts the features of an anyres image's views together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.tiles import FLAT, AnyRes
from llava.types import MediaKind


@dataclass(frozen=True)
class ViewMerger:
    """Merges views in the manner of ``anyres.merge_type``.

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
        grid = self._without_padding(views[1:], image_size)
        ends = self.newline.to(grid.dtype).expand(len(grid), 1, -1)
        return torch.cat([views[0], torch.cat([grid, ends], dim=1).flatten(0, 1)])

    def _without_padding(self, tiles: Tensor, image_size: tuple[int, int]) -> Tensor:
        """The tiles as one grid (rows, columns, width), cut to what shows the picture and shrunk if need be."""
        rows, columns = self.anyres.choose_grid(image_size)
        side = self.anyres.patches_per_side
        whole = tiles.view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        top, left, size = self.anyres.patches_without_padding(image_size)
        shown = whole[top : top + size.height, left : left + size.width]
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
                    f"{self.anyres.num_views(size)}; cut it with llava.data.image_ops.cut_views"
                )
