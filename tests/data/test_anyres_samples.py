"""Anyres on the data side: samples count what their images' sizes say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava.constants import IGNORE_INDEX
from llava.data import dataset as dataset_module
from llava.data.collator import SupervisedCollator
from llava.data.dataset import SupervisedDataset
from llava.data.media import MediaError
from llava.data.placeholders import expand_placeholders, preprocess_multimodal
from llava.train.report import supervision_table
from llava.types import BadSampleError, Media, Record, Turn


def expand_text(text: str, *args, **kwargs) -> str:
    return expand_placeholders([Turn("user", text)], *args, **kwargs)[0].text


@pytest.fixture
def tiled(tiny_vision):
    """Tiles of 56 pixels and 4 x 4 patches; a picture of 2 x 2 tiles takes 80 tokens."""
    return replace(tiny_vision, image_aspect_ratio="anyres")


@pytest.fixture
def unpadded(tiled):
    return replace(tiled, patch_merge_type="spatial_unpad")


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
