"""From images and frames to the tower's square or tiles: parity with PIL and with transformers' image processing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.media import cut_views, fit_frames, load_media, resize
from llava.types import Media

SIZES = [(480, 640), (640, 480), (333, 500), (224, 224), (360, 640), (100, 57), (50, 50)]


def picture(height: int, width: int) -> np.ndarray:
    """Smooth waves with sharp edges."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(x / 9) * np.cos(y / 13), (x // 16 + y // 16) % 2 - 0.5, np.sin((x + y) / 21)]
    return ((np.stack(channels, -1) + 1) * 100).clip(0, 255).astype(np.uint8)


def fit(image: np.ndarray, vision) -> np.ndarray:
    fitted = fit_frames(torch.from_numpy(image)[None], vision)
    assert fitted.dtype == torch.uint8
    assert fitted.shape == (1, 3, vision.image_size, vision.image_size)
    return fitted[0].permute(1, 2, 0).numpy()


def assert_near(found: np.ndarray, expected: np.ndarray, most: int = 4, mean: float = 0.5) -> None:
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= most, difference.max()
    assert difference.mean() <= mean, difference.mean()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_square_equals_transformers(italian_vision, height, width):
    from transformers import BitImageProcessorPil

    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=Image.Resampling.BICUBIC,
        do_rescale=False, do_normalize=False, do_convert_rgb=False,
    )  # fmt: skip
    image = picture(height, width)
    expected = np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    assert_near(fit(image, italian_vision), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_stretching_equals_pil(italian_vision, height, width):
    image = picture(height, width)
    expected = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    assert_near(fit(image, replace(italian_vision, image_resize_size=None)), np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (224, 224), (448, 112)])
def test_padding_equals_the_familys_square(italian_vision, height, width):
    """The LLaVA family pastes the picture into a square of the mean colour and resizes that."""
    image = picture(height, width)
    side = max(height, width)
    mean = tuple(int(channel * 255) for channel in italian_vision.image_mean)
    square = Image.new("RGB", (side, side), mean)
    square.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))
    found = fit(image, replace(italian_vision, image_aspect_ratio="pad"))
    # Where picture and padding meet, the family's way blends the two.
    inner = np.ones((224, 224), bool)
    top, left = (224 - height * 224 // side) // 2, (224 - width * 224 // side) // 2
    for edge, axis in ((top, 0), (224 - top, 0), (left, 1), (224 - left, 1)):
        np.moveaxis(inner, axis, 0)[max(edge - 3, 0) : edge + 3] = False
    assert_near(found[inner], expected[inner])
    if top:
        assert (found[: top - 1] == mean).all()
        assert (found[-top + 1 :] == mean).all()
    if left:
        assert (found[:, : left - 1] == mean).all()
        assert (found[:, -left + 1 :] == mean).all()


def test_padding_keeps_all_of_the_picture(italian_vision):
    image = np.zeros((100, 400, 3), np.uint8)
    image[:, :8], image[:, -8:] = (255, 0, 0), (0, 0, 255)
    found = fit(image, replace(italian_vision, image_aspect_ratio="pad"))
    assert tuple(found[112, 1]) == (255, 0, 0)
    assert tuple(found[112, -2]) == (0, 0, 255)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (3, 2)])
@pytest.mark.parametrize("manner", ["square", "stretch", "pad"])
def test_tiny_and_thin_pictures(tiny_vision, height, width, manner):
    vision = replace(
        tiny_vision,
        image_aspect_ratio="pad" if manner == "pad" else "square",
        image_resize_size=64 if manner == "square" else None,
    )
    found = fit(np.full((height, width, 3), 77, np.uint8), vision)
    assert (found == 77).all() or manner == "pad"


def test_frames_are_fitted_as_they_would_be_one_by_one(italian_vision):
    frames = torch.from_numpy(np.stack([picture(120, 200), picture(120, 200)[::-1], picture(120, 200)[:, ::-1]]))
    together = fit_frames(frames, italian_vision)
    for i in range(3):
        assert torch.equal(together[i : i + 1], fit_frames(frames[i : i + 1], italian_vision))


def test_resizing_to_the_same_size_changes_nothing():
    pixels = torch.from_numpy(picture(30, 40)).permute(2, 0, 1)[None]
    assert torch.equal(resize(pixels, 30, 40), pixels)


# Tiles of anyres

COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200), (200, 10, 200)]
MEAN = (123, 116, 103)


@pytest.fixture
def tiled(tiny_vision):
    """Tiles of 56 pixels and 4 x 4 patches; a picture of 2 x 2 tiles takes 80 tokens."""
    return replace(tiny_vision, image_aspect_ratio="anyres")


def painted(rows: int, columns: int, side: int) -> torch.Tensor:
    """A picture of flat squares, row by row in the order of ``COLOURS``."""
    colours = np.array(COLOURS[: rows * columns], np.uint8).reshape(rows, columns, 3)
    return torch.from_numpy(colours.repeat(side, 0).repeat(side, 1))


def colour_of(frame: torch.Tensor) -> tuple[int, ...]:
    """The colour of a (3, height, width) frame, which must have one."""
    assert (frame == frame[:, :1, :1]).all()
    return tuple(frame[:, 0, 0].tolist())


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 2), (2, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("side", [56, 112])
def test_tiles_follow_the_whole_picture_row_by_row(tiled, rows: int, columns: int, side: int) -> None:
    views = cut_views(painted(rows, columns, side), tiled)
    assert views.dtype == torch.uint8
    assert views.shape == (1 + rows * columns, 3, 56, 56)
    # Where colours meet, resizing blends them.
    middle = slice(4, -4) if side != 56 else slice(None)
    assert [colour_of(tile[:, middle, middle]) for tile in views[1:]] == COLOURS[: rows * columns]
    whole = Image.fromarray(painted(rows, columns, side).numpy()).resize((56, 56), Image.Resampling.BICUBIC)
    assert (views[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(whole)).int()).abs().max() <= 4


def test_padding_is_the_mean_colour_on_both_sides(tiled) -> None:
    vision = replace(tiled, image_grid_pinpoints="(2x2)")
    picture = torch.full((50, 100, 3), 250, dtype=torch.uint8)
    whole, *tiles = cut_views(picture, vision)
    assert colour_of(whole) == (250, 250, 250)
    upper, lower = slice(28), slice(28, 56)
    for tile, padding, shown in zip(tiles, [upper, upper, lower, lower], [lower, lower, upper, upper], strict=True):
        assert colour_of(tile[:, padding]) == MEAN
        assert colour_of(tile[:, shown]) == (250, 250, 250)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1, 1), (3, 2)])
def test_thin_and_tiny_pictures(tiled, size: tuple[int, int]) -> None:
    views = cut_views(torch.full((*size, 3), 250, dtype=torch.uint8), tiled)
    assert len(views) == tiled.anyres.num_views(size)
    assert colour_of(views[0]) == (250, 250, 250)
    shown = (views[1:] == 250).all(1).sum()
    assert shown == tiled.anyres.place(size)[1].area


def test_frames_of_a_video_are_fitted_as_without_tiles(tiled, tiny_vision, media_dir: Path) -> None:
    clip = Media("video", str(media_dir / "a.mp4"))
    assert torch.equal(load_media(clip, tiled).frames, load_media(clip, tiny_vision).frames)
    frames = torch.randint(0, 256, (2, 40, 70, 3), dtype=torch.uint8)
    assert torch.equal(fit_frames(frames, tiled), fit_frames(frames, tiny_vision))


def test_an_image_is_loaded_as_its_views(tiled, media_dir: Path) -> None:
    image = load_media(Media("image", str(media_dir / "a.png")), tiled)
    assert (image.kind, image.original_size, image.frames.shape) == ("image", (60, 90), (5, 3, 56, 56))


def test_video_is_fitted_and_sampled_the_same_each_time(media_dir, tiny_vision):
    first, second = (load_media(Media("video", str(media_dir / "a.mp4")), tiny_vision) for _ in range(2))
    assert first.frames.shape == (3, 3, 56, 56)
    assert str(first.frames.dtype) == "torch.uint8"
    assert first.original_size == (48, 64)
    assert (first.frames == second.frames).all()
    assert first.times == second.times
