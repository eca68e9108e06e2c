"""Contract: what a batch holds."""

from __future__ import annotations

import pytest
import torch

from llava.data.collator import SupervisedCollator, model_inputs
from llava.types import BadSample, Coordinates, Example, VisualInput

EOS = PAD = 0


def visual(kind: str, num_frames: int, value: int) -> VisualInput:
    return VisualInput(kind, torch.full((num_frames, 3, 4, 4), value, dtype=torch.uint8), (480, 640 + value))


def test_mask_comes_from_lengths_so_that_a_real_end_of_text_is_seen():
    batch = SupervisedCollator(PAD)([Example("a", [5, 6, EOS], [5, 6, EOS]), Example("b", [7, EOS], [7, EOS])])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 0], [7, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "attention_mask"))


def test_text_only_batch_has_no_media_keys():
    batch = SupervisedCollator(PAD)([Example("a", [5, EOS], [5, EOS])])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "sample_ids"}


def test_media_of_a_mixed_batch_stand_in_reading_order():
    examples = [
        Example("both", [1, EOS], [1, EOS], [visual("video", 3, 1), visual("image", 1, 2)]),
        Example("text", [1, 2, 3, EOS], [1, 2, 3, EOS]),
        Example("image", [1, EOS], [1, EOS], [visual("image", 1, 3)]),
    ]
    batch = SupervisedCollator(PAD)(examples)
    assert batch["modalities"] == ["video", "image", "image"]
    assert [tuple(image.shape) for image in batch["images"]] == [(3, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 4)]
    assert [int(image[0, 0, 0, 0]) for image in batch["images"]] == [1, 2, 3]
    assert all(image.dtype == torch.uint8 for image in batch["images"])
    assert batch["image_sizes"] == [(480, 641), (480, 642), (480, 643)]
    assert batch["attention_mask"].sum(1).tolist() == [2, 4, 2]


def test_padding_id_fills_up_the_ids_only():
    batch = SupervisedCollator(9)([Example("a", [1], [1]), Example("b", [1, 2], [1, 2])])
    assert batch["input_ids"].tolist() == [[1, 9], [1, 2]]
    assert batch["labels"].tolist() == [[1, -100], [1, 2]]


def test_bad_samples_get_no_row():
    bad = BadSample("bad", "x.json, sample 2", "a.mp4", "no such file")
    batch = SupervisedCollator(PAD)([Example("a", [5, EOS], [5, EOS]), bad, Example("b", [7, EOS], [7, EOS])])
    assert batch["sample_ids"] == ["a", "b"]
    assert batch["bad_samples"] == [bad]
    assert batch["input_ids"].tolist() == [[5, 0], [7, 0]]
    assert set(model_inputs(batch)) == {"input_ids", "labels", "attention_mask"}


@pytest.mark.parametrize("bad", [[], [BadSample("bad", "x.json, sample 2", "a.mp4", "no such file")]])
def test_without_a_good_sample_the_batch_is_empty(bad):
    batch = SupervisedCollator(9)(bad)
    assert batch["input_ids"].tolist() == [[9]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["attention_mask"].tolist() == [[1]]
    assert batch["sample_ids"] == []
    assert batch.get("bad_samples", []) == bad
    assert "images" not in batch


def test_examples_of_a_pack_stand_one_behind_the_other():
    examples = [
        Example("a", [5, 6, EOS], [5, 6, EOS], [visual("image", 1, 1)], Coordinates((0.5,), (), (0.1, 0.2))),
        Example("b", [7, EOS], [-100, EOS]),
        Example("c", [8, 9, 1, EOS], [8, 9, 1, EOS], [visual("video", 3, 2)], Coordinates((0.25,), (0.75,), (0.3,))),
    ]
    batch = SupervisedCollator(PAD, pack_length=6)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 7, 0], [8, 9, 1, 0, 0]]
    # The first token of an example is predicted by nothing: what stands before it is another's.
    assert batch["labels"].tolist() == [[-100, 6, 0, -100, 0], [-100, 9, 1, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["pack_lengths"] == [[3, 2], [4]]
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert [len(image) for image in batch["images"]] == [1, 3]
    first, second = batch["variables"]
    assert first["temporal_input_locations"] == [0.5]
    assert first["spatial_height_input_locations"] == [0.1, 0.2]
    assert second["temporal_output_locations"] == [0.75]
    joined = SupervisedCollator(PAD, pack_length=20)(examples)["variables"]
    assert [variables["temporal_input_locations"] for variables in joined] == [[0.5, 0.25]]
    assert SupervisedCollator(PAD, pack_length=6)([])["pack_lengths"] == [[1]]
