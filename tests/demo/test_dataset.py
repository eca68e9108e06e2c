"""The demo's clips and records: reproducible, and free of held-out pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llava.data.media import sample_video
from llava.data.records import read_records
from llava.demo.dataset import DemoData, clip_scene, read_captions, text_samples, write_dataset
from llava.demo.scenes import FRAME_SIZE, FRAMES_PER_CLIP, render_clip, render_coverage, write_clip
from llava.demo.sentences import COLOURS, HELD_OUT_PAIRS, SHAPES, TRAINING_PAIRS, caption


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return write_dataset(tmp_path_factory.mktemp("demo"), seed=0, num_train_clips=8, num_held_out_clips=4)


def held_out_beginnings() -> tuple[str, ...]:
    """How a sentence about a held-out pair begins."""
    return tuple(
        caption(SHAPES[shape], colour, "circle").removesuffix("gira in tondo") for shape, colour in HELD_OUT_PAIRS
    )


def test_every_shape_and_colour_of_a_held_out_pair_is_trained() -> None:
    assert not set(HELD_OUT_PAIRS) & set(TRAINING_PAIRS)
    assert {shape for shape, _ in TRAINING_PAIRS} == set(SHAPES)
    assert {colour for _, colour in TRAINING_PAIRS} == set(COLOURS)
    for shape, colour in HELD_OUT_PAIRS:
        # The form of the adjective that the held-out caption needs occurs with another noun.
        gender = SHAPES[shape].gender
        assert any(c == colour and SHAPES[s].gender == gender for s, c in TRAINING_PAIRS), (shape, colour)


def test_training_never_shows_or_names_a_held_out_pair() -> None:
    scenes = [clip_scene("train", 0, index) for index in range(3000)]
    assert not {(scene.shape, scene.colour) for scene in scenes} & set(HELD_OUT_PAIRS)
    sentences = [scene.caption for scene in scenes]
    sentences += [sample["conversations"][-1]["value"] for sample in text_samples()]
    assert not [sentence for sentence in sentences if sentence.startswith(held_out_beginnings())]


def test_held_out_clips_show_only_held_out_pairs() -> None:
    scenes = [clip_scene("held_out", 0, index) for index in range(300)]
    assert {(scene.shape, scene.colour) for scene in scenes} == set(HELD_OUT_PAIRS)
    assert all(scene.caption.startswith(held_out_beginnings()) for scene in scenes)


def test_same_seed_same_pixels() -> None:
    first, again = (render_clip(clip_scene("train", 3, 5)) for _ in range(2))
    other = render_clip(clip_scene("train", 4, 5))
    assert first.shape == (FRAMES_PER_CLIP, FRAME_SIZE, FRAME_SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_shapes_stay_inside_the_frame() -> None:
    for index in range(200):
        scene = clip_scene("train", 0, index)
        for frame in range(FRAMES_PER_CLIP):
            coverage = render_coverage(scene, frame)
            edges = (coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1])
            assert not any(edge.any() for edge in edges), (scene, frame)


def test_mp4_decodes_to_what_was_drawn(tmp_path: Path) -> None:
    frames = render_clip(clip_scene("train", 0, 1))
    write_clip(tmp_path / "clip.mp4", frames)
    video = sample_video(str(tmp_path / "clip.mp4"), FRAMES_PER_CLIP)
    assert video.indices == tuple(range(FRAMES_PER_CLIP))
    error = np.abs(video.frames.numpy().astype(int) - frames.astype(int))
    assert error.mean() < 6


def test_records_are_the_librarys(data: DemoData) -> None:
    train = read_records(str(data.train))
    assert [len(record.media) for record in train] == [1] * 8
    assert all(Path(record.media[0].path).is_file() for record in train)
    assert [record.turns[-1].text for record in train] == [clip_scene("train", 0, i).caption for i in range(8)]
    raw = json.loads(data.text.read_text(encoding="utf-8"))
    assert not any("video" in record or "<video>" in str(record) for record in raw)
    assert all(not record.media for record in read_records(str(data.text)))


def test_same_seed_same_files(data: DemoData, tmp_path: Path) -> None:
    again = write_dataset(tmp_path, seed=0, num_train_clips=8, num_held_out_clips=4)
    assert read_captions(again.train) == read_captions(data.train)
    assert again.held_out.read_bytes() == data.held_out.read_bytes()
    # Decoded, not as bytes: the conversion to yuv420p may round otherwise from one call to the next.
    first, second = (sample_video(str(d.train.parent / "train/00003.mp4"), 8).frames.float() for d in (data, again))
    assert (first - second).abs().mean() < 1
