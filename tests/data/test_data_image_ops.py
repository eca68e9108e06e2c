"""Parity of the geometry with PIL and with transformers' image processing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.data.media import fit_frames, resize

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
