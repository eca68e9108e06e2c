"""Scores and table of the demo."""

from __future__ import annotations

from operator import attrgetter

import pytest

from llava.demo.common import choose_examples, time_lines
from llava.demo.evaluation import CaptionedClip, caption_table, choose_others, score

CLIPS = [
    CaptionedClip("a.mp4", "una luna rosa", "una luna rosa", "b.mp4", "un cerchio blu"),
    CaptionedClip("b.mp4", "un cerchio blu", "un cerchio verde", "c.mp4", "un cerchio blu"),
    CaptionedClip("c.mp4", "una croce viola", "una croce viola", "a.mp4", "una luna rosa"),
    CaptionedClip("d.mp4", "una stella gialla", "una stella gialla", "a.mp4", "una luna rosa"),
]


def test_others_have_another_caption() -> None:
    assert choose_others(["a", "a", "b", "a"]) == [2, 2, 3, 2]


def test_others_need_a_second_caption() -> None:
    with pytest.raises(ValueError, match="--num_held_out_clips"):
        choose_others(["a", "a"])


def test_scores_count_whole_captions() -> None:
    scores = score(CLIPS)
    assert scores.right_video == 0.75
    assert scores.other_video == 0.25


def test_table_is_aligned_and_marks_what_is_right() -> None:
    lines = caption_table(CLIPS).splitlines()
    columns = {tuple(i for i, c in enumerate(line) if c in "|+") for line in lines}
    assert len(lines) == len(CLIPS) + 2
    assert len(columns) == 1
    assert "= una luna rosa" in lines[2]
    assert "= un cerchio verde" not in lines[3]


def test_times_are_summed() -> None:
    assert time_lines({"a": 61.0, "b": 2.0}) == "elapsed: 1 min 03 s (a 61 s, b 2 s)"


def test_examples_show_different_things_first() -> None:
    topic_of = attrgetter("topic")
    again = CaptionedClip("e.mp4", "una luna rosa", "", "b.mp4", "")
    assert choose_examples([CLIPS[0], again, *CLIPS[1:]], 4, topic_of) == CLIPS
    assert choose_examples([CLIPS[0], again], 4, topic_of) == [CLIPS[0], again]
