"""Pictures, clips and records of the demo of grounding: exact places and times, and no held-out pair in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava.data.records import read_records
from llava.demo.grounding.dataset import (
    HELD_OUT,
    NUM_FIGURES,
    NUM_FRAMES,
    TRAIN,
    Amounts,
    GroundingData,
    asked_figures,
    clip_scene,
    picture_scene,
    reflect,
    render_frames,
    render_picture,
    time_moved,
    write_dataset,
)
from llava.demo.scenes import FRAME_SIZE
from llava.demo.sentences import ASK_WHERE_IN_EACH_FRAME, HELD_OUT_PAIRS, Noun, ask_when, ask_where, names_held_out_pair
from llava.geometry import TimeSpan
from llava.grounding.syntax import box_text, span_text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> GroundingData:
    folder = tmp_path_factory.mktemp("grounding")
    return write_dataset(folder, seed=0, train=Amounts(6, 4), held_out=Amounts(3, 2))


def test_questions_have_articles_that_agree() -> None:
    assert ask_where(("stella", "giallo")) == "dov'è la stella gialla? <image>"
    assert ask_when(("quadrato", "rosso")) == "quando si ferma il quadrato rosso? <video>"
    nouns = [Noun("ape", "f"), Noun("uccello", "m"), Noun("zaino", "m")]
    assert [noun.definite_article for noun in nouns] == ["l'", "l'", "lo "]


def test_a_box_is_around_what_is_painted() -> None:
    for index in range(30):
        scene = picture_scene("train", 0, index)
        empty = render_picture([], scene.background).astype(int)
        for figure in scene.figures:
            painted = np.abs(render_picture([figure], scene.background) - empty).sum(-1) > 30
            rows, columns = (np.flatnonzero(painted.any(axis)) for axis in (1, 0))
            bounds = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(np.array(figure.box) * FRAME_SIZE - bounds).max() <= 1.25, figure


def test_pictures_make_it_necessary_to_listen() -> None:
    for index in range(100):
        pairs = [figure.pair for figure in picture_scene(HELD_OUT, 0, index).figures]
        assert len(pairs) == NUM_FIGURES
        for of_all in zip(*pairs, strict=True):
            assert len(set(of_all)) == len(pairs), "no two of one shape or of one colour"


def test_every_other_held_out_scene_is_of_a_pair_that_training_never_shows() -> None:
    shown = {figure.pair for index in range(1000) for figure in picture_scene(TRAIN, 0, index).figures}
    moved = {clip_scene(TRAIN, 0, index).pair for index in range(1000)}
    assert not (shown | moved) & set(HELD_OUT_PAIRS)
    for index in range(100):
        new = bool(index % 2)
        scene = picture_scene(HELD_OUT, 0, index)
        assert [figure.pair in HELD_OUT_PAIRS for figure in scene.figures] == [new] + [False] * (NUM_FIGURES - 1)
        assert names_held_out_pair(ask_where(scene.figures[0].pair)) == new
        assert (clip_scene(HELD_OUT, 0, index).pair in HELD_OUT_PAIRS) == new


def test_shapes_do_not_meet() -> None:
    for index in range(100):
        boxes = [figure.box for figure in picture_scene("train", 0, index).figures]
        for number, box in enumerate(boxes):
            assert 0 < box.x1 < box.x2 < 1
            assert 0 < box.y1 < box.y2 < 1
            for other in boxes[:number]:
                assert box.x2 < other.x1 or other.x2 < box.x1 or box.y2 < other.y1 or other.y2 < box.y1


def test_time_stands_still_during_the_rest() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.4, 0.7, 0.85, 1.0])
    assert time_moved(times, TimeSpan(0.2, 0.7)) == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.2, 0.35, 0.5])


def test_sides_throw_back() -> None:
    assert reflect(np.array([10.0, 30.0, 55.0, 95.0, 105.0]), 10.0, 50.0) == pytest.approx(
        [10.0, 30.0, 45.0, 15.0, 25.0]
    )


def test_a_clip_rests_in_its_span_and_moves_outside() -> None:
    times = np.linspace(0, 1, NUM_FRAMES)
    for index in range(50):
        clip = clip_scene("train", 0, index)
        centres = np.array([figure.centre for figure in clip.figures])
        steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
        inside = (times[:-1] >= clip.rest.start) & (times[1:] <= clip.rest.end)
        outside = (times[1:] <= clip.rest.start) | (times[:-1] >= clip.rest.end)
        assert steps[inside].max(initial=0.0) < 1e-9
        assert steps[outside].min(initial=99.0) > 9
        assert np.abs(centres - FRAME_SIZE / 2).max() + clip.figures[0].radius < FRAME_SIZE / 2


def test_all_shapes_are_asked_for_in_training_and_one_of_a_held_out_picture() -> None:
    scene = picture_scene(TRAIN, 0, 3)
    assert asked_figures(TRAIN, scene) == scene.figures
    assert asked_figures(HELD_OUT, scene) == scene.figures[:1]


def test_records_are_the_librarys(data: GroundingData) -> None:
    pictures = read_records(str(data.train[0]))
    asked = [figure for index in range(6) for figure in picture_scene(TRAIN, 0, index).figures]
    assert len(pictures) == len(asked)
    for record, figure in zip(pictures, asked, strict=True):
        assert [turn.text for turn in record.turns] == [ask_where(figure.pair), box_text()]
        assert Path(record.media[0].path).is_file()
        assert record.coordinates.spatial_width_output_locations == pytest.approx((figure.box.x1, figure.box.x2))
        assert record.coordinates.spatial_height_output_locations == pytest.approx((figure.box.y1, figure.box.y2))


def test_a_clip_is_asked_in_training_where_it_goes(data: GroundingData) -> None:
    record, scene = read_records(str(data.train[1]))[1], clip_scene(TRAIN, 0, 1)
    question, span, way, boxes = (turn.text for turn in record.turns)
    assert (question, span) == (ask_when(scene.pair), span_text())
    assert (way, boxes) == (ASK_WHERE_IN_EACH_FRAME, box_text() * NUM_FRAMES)
    assert record.coordinates.temporal_output_locations == pytest.approx(scene.rest)
    lefts = [figure.box.x1 for figure in scene.figures]
    assert record.coordinates.spatial_width_output_locations[::2] == pytest.approx(lefts)
    assert all(len(record.turns) == 2 for record in read_records(str(data.held_out_clips)))


def test_same_seed_same_data(data: GroundingData, tmp_path: Path) -> None:
    again = write_dataset(tmp_path, seed=0, train=Amounts(6, 4), held_out=Amounts(3, 2))
    for one, other in zip((*data.train, data.held_out_clips), (*again.train, again.held_out_clips), strict=True):
        assert one.read_bytes() == other.read_bytes()
    first, second = (render_frames(clip_scene("train", seed, 0)) for seed in (0, 1))
    assert not np.array_equal(first, second)
