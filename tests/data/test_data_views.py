"""Anyres on the data side: tiles hold the right pixels, and samples count what their images' sizes say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from llava.constants import IGNORE_INDEX
from llava.data import dataset as dataset_module
from llava.data.collator import SupervisedCollator
from llava.data.dataset import SupervisedDataset
from llava.data.images import read_image_size
from llava.data.media import MediaError, cut_views, fit_frames, load_image, load_media
from llava.data.placeholders import expand_placeholders, expand_text, preprocess_multimodal
from llava.train.report import supervision_table
from llava.types import BadSampleError, Media, Record, Turn

COLOURS = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200), (200, 10, 200)]
MEAN = (123, 116, 103)


@pytest.fixture
def tiled(tiny_vision):
    """Tiles of 56 pixels and 4 x 4 patches; a picture of 2 x 2 tiles takes 80 tokens."""
    return replace(tiny_vision, image_aspect_ratio="anyres")


@pytest.fixture
def unpadded(tiled):
    return replace(tiled, patch_merge_type="spatial_unpad")


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


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.webp", "a.gif", "a.bmp"])
def test_headers_tell_the_upright_size(tmp_path: Path, monkeypatch, name: str, orientation: int | None) -> None:
    path = str(tmp_path / name)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (70, 30)).save(path, exif=exif)
    expected = tuple(load_image(path).shape[:2])
    sideways = orientation in (6, 8) and not name.endswith((".gif", ".bmp"))
    assert expected == ((70, 30) if sideways else (30, 70))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert read_image_size(path) == expected


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_a_file_without_a_header_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=str(path)):
        read_image_size(str(path))


def test_placeholders_take_sizes_in_reading_order(unpadded) -> None:
    text = "<image> poi <video> e <image>"
    expanded = expand_text(text, unpadded, [3], [(112, 112), (56, 112)])
    first, second = expanded.split(" poi ")[0], expanded.split(" e ")[1]
    assert first.count("<im_patch>") == 16 + 8 * 9 - 2
    assert second.count("<im_patch>") == 16 + 4 * 9 - 2
    turns = [Turn("user", "<image> poi <video>"), Turn("assistant", " e <image>")]
    split = expand_placeholders(turns, unpadded, [3], [(112, 112), (56, 112)])
    assert "".join(turn.text for turn in split) == expanded
    raw = [[{"from": "human", "value": "<image> poi <video>"}, {"role": "assistant", "content": " e <image>"}]]
    ((one, other),) = preprocess_multimodal(raw, unpadded, [[(112, 112), (56, 112)]])
    assert one["value"] + other["content"] == expanded


def test_sizes_that_do_not_fit_the_text_are_an_error(unpadded) -> None:
    with pytest.raises(ValueError, match="2 <image>, but 1 images were given"):
        expand_text("<image><image>", unpadded, image_sizes=[(10, 10)])
    with pytest.raises(ValueError, match="depends on its size"):
        expand_text("<image>", unpadded)
    with pytest.raises(ValueError, match="1 conversations came with image sizes for 2"):
        preprocess_multimodal([[{"from": "human", "value": "<image>"}]], unpadded, [[(10, 10)], []])


@pytest.fixture
def two_images(tmp_path: Path) -> Record:
    """A sample with a picture that lies on its side in its file, and a wide one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 90)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (300, 20)).save(tmp_path / "wide.png")
    media = tuple(Media("image", str(tmp_path / name)) for name in ("turned.jpg", "wide.png"))
    return Record("s1", (Turn("user", "<image> e <image>"), Turn("assistant", "ciao")), media, "x.json, sample 1")


@pytest.mark.parametrize("merge_type", ["flat", "spatial_unpad"])
def test_samples_count_their_own_images(visual_tokenizer, tiled, two_images: Record, merge_type: str) -> None:
    vision = replace(tiled, patch_merge_type=merge_type)
    dataset = SupervisedDataset([two_images], visual_tokenizer, vision, 512)
    example = dataset[0]
    # 60 x 90 lies on 2 x 2 tiles, of whose 8 x 8 patches 6 rows show it; 20 x 300 on 1 x 3, of which 2 rows do.
    visual = 5 * 16 + 4 * 16 if merge_type == "flat" else 16 + 6 * 9 + 16 + 2 * 13
    assert [len(m.frames) for m in example.media] == [5, 4]
    assert example.labels.count(IGNORE_INDEX) == visual == dataset.visual_tokens(two_images)
    assert dataset.lengths.tolist() == [len(example.input_ids)]
    assert dataset.tokenize(two_images) == (example.input_ids, example.labels)
    assert SupervisedCollator(0)([example])["image_sizes"] == [(60, 90), (20, 300)]


def test_a_decoded_image_is_counted_by_its_pixels(visual_tokenizer, unpadded, two_images: Record, monkeypatch) -> None:
    monkeypatch.setattr(dataset_module, "read_image_size", lambda path: pytest.fail("the header was read"))
    example = SupervisedDataset([two_images], visual_tokenizer, unpadded, 512)[0]
    assert example.labels.count(IGNORE_INDEX) == 112


def test_an_image_that_does_not_fit_is_named_with_the_remedy(visual_tokenizer, unpadded, two_images: Record) -> None:
    dataset = SupervisedDataset([two_images], visual_tokenizer, unpadded, 100)
    message = r"sample 's1' .*at least 114 tokens \(112 of them visual\), but the limit is 100.*--image_grid_pinpoints"
    with pytest.raises(BadSampleError, match=message):
        _ = dataset[0]


def test_a_missing_image_is_named_while_counting(visual_tokenizer, unpadded, two_images: Record) -> None:
    gone = replace(two_images, media=(two_images.media[0], Media("image", "/nowhere/a.png")))
    dataset = SupervisedDataset([gone], visual_tokenizer, unpadded, 512)
    with pytest.raises(MediaError, match=r"sample 's1' \(x\.json, sample 1\): /nowhere/a\.png: no such file"):
        _ = dataset.lengths


def test_lengths_pass_over_an_image_that_will_be_skipped(media_dir, tmp_path, visual_tokenizer, tiled) -> None:
    turn = Turn("user", "<image> un gatto")
    records = [Record(name, (turn,), (Media("image", str(media_dir / name)),)) for name in ("a.png", "none.png")]
    with pytest.raises(MediaError, match=r"sample 'none\.png': .*none\.png: no such file"):
        SupervisedDataset(records, visual_tokenizer, tiled, 512).lengths  # noqa: B018
    skipping = SupervisedDataset(records, visual_tokenizer, tiled, 512, on_bad_sample="skip")
    assert skipping.lengths[0] == len(skipping[0].input_ids)
    assert skipping.lengths[1] == skipping.lengths[0] - skipping.visual_tokens(records[0])
    first, second = supervision_table(skipping).splitlines()[1:]
    assert first.startswith("  a.png: ")
    assert second.startswith("  sample 'none.png': ")
    assert second.endswith(": no such file (skipped)")
