"""Frames are chosen by when they are shown, and their times are told as they are."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import encode, number_of

from llava.data.decoding import FrameRequest, choose_frames, nearest
from llava.data.media import sample_video
from llava.data.video import frame_rate, seconds_of

# 30 frames a second apart, then 30 in one second.
VARYING = [i * 1000 for i in range(30)] + [30_000 + 33 * i for i in range(30)]


@pytest.fixture(scope="module", params=[".mp4", ".mkv", ".ts", ".mov"])
def varying(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A clip of 31 seconds whose frame rate varies."""
    path = tmp_path_factory.mktemp("varying") / f"clip{request.param}"
    return encode(path, options={"g": "12"}, times=VARYING, time_base=Fraction(1, 1000))


def test_frames_a_second_are_a_second_apart(varying: Path) -> None:
    sampled = sample_video(str(varying), 4, fps=1.0, max_frames=64)
    assert len(sampled.times) == 31
    assert np.diff(sampled.times) == pytest.approx(np.ones(30), abs=0.04)
    assert sampled.indices == tuple(range(31))
    assert [number_of(frame.numpy()) for frame in sampled.frames] == list(range(31))
    assert sampled.duration == pytest.approx(31, abs=0.03)


def test_frames_lie_evenly_in_time(varying: Path) -> None:
    sampled = sample_video(str(varying), 8)
    assert sampled.times == pytest.approx(np.linspace(0, 30.957, 8), abs=0.5)
    assert sampled.indices[0] == 0
    assert sampled.indices[-1] == 59
    bounded = sample_video(str(varying), 4, fps=5.0, max_frames=8)
    assert bounded.indices == sampled.indices


def test_a_part_of_a_varying_clip(varying: Path) -> None:
    assert sample_video(str(varying), 3, split=(30, 59)).times == pytest.approx((30, 30.479, 30.957), abs=0.02)
    assert len(sample_video(str(varying), 3, fps=1.0, split=(30, 59)).times) == 1
    assert len(sample_video(str(varying), 3, fps=1.0, split=(0, 29)).times) == 30


def test_no_bound(tmp_path: Path) -> None:
    path = str(encode(tmp_path / "a.mp4", options={"g": "12"}, numbers=range(50)))
    assert len(sample_video(path, 4, fps=25.0, max_frames=0).indices) == 50
    assert len(sample_video(path, 4, fps=25.0).indices) == 32
    # More frames than there are would only repeat them.
    assert sample_video(path, 4, fps=1e6, max_frames=0).indices == tuple(range(50))


@pytest.mark.parametrize("rate", [8.0, 12.5, 25.0, 30000 / 1001, 60.0, 600.0])
@pytest.mark.parametrize("unit", [None, 0.001])
def test_at_a_constant_rate_times_and_counting_agree(rate: float, unit: float | None) -> None:
    for length in (1, 2, 3, 7, 100, 1389):
        times = [i / rate for i in range(length)]
        times = times if unit is None else [round(time / unit) * unit for time in times]
        assert frame_rate(times, rate) == rate
        for num_frames, fps, bound in ((4, 0.0, 32), (9, 0.0, 32), (4, 1.0, 32), (4, 2.5, 999)):
            wanted = min(max(round(length / rate * fps), 1), bound) if fps else num_frames
            counted = np.linspace(0, length - 1, wanted).round().astype(int).tolist()
            assert choose_frames(times, rate, FrameRequest("", num_frames, fps, bound)) == counted


def test_a_rate_that_is_not_that_of_the_times() -> None:
    assert frame_rate([0, 0.5, 1.0], 1000.0) == 2.0
    assert frame_rate([0, 0.5, 1.0], 0.0) == 2.0
    assert frame_rate([0.0], 0.0) == 1.0


def test_times_that_are_missing_doubled_or_begin_anew() -> None:
    assert seconds_of([5, 6, 7], 0.5, 2.0) == [0, 0.5, 1.0]
    assert seconds_of([None, 2, None, 4, None], 1.0, 1.0) == [0, 1, 2, 3, 4]
    assert seconds_of([None, None, None], 1.0, 4.0) == [0, 0.25, 0.5]
    assert seconds_of([0, 10, 10, 20], 0.01, 10.0) == pytest.approx([0, 0.1, 0.15, 0.2])
    # Two joined clips, each of which counts from its own beginning.
    assert seconds_of([0, 1, 2, 3, 0, 1, 2], 1.0, 1.0) == [0, 1, 2, 3, 4, 5, 6]
    assert seconds_of([-3, -2, -1], 1.0, 1.0) == [0, 1, 2]


def test_the_nearest_frame() -> None:
    assert nearest([0, 1, 5], [0, 0.5, 0.6, 2.9, 3.1, 9, -1]) == [0, 0, 1, 1, 2, 2, 0]
