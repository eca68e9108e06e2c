"""Intervals of scores: what resampling must give, and that it gives the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from llava.eval import metrics
from llava.eval.metrics import CaptionScorer, bootstrap

ROWS = [{"hit": float(i % 2), "score": i / 10} for i in range(400)]
REFERENCES = ["una stella gialla si muove", "un cerchio blu resta fermo", "la luna sale", "una croce verde va via"]
CAPTIONS = ["una stella gialla resta ferma", "un cerchio blu resta fermo qui", "la luna", "una stella verde va via"]


def test_value_is_the_mean_and_lies_in_its_interval() -> None:
    report = bootstrap(ROWS)
    assert list(report) == ["hit", "score"]
    assert report["hit"]["value"] == 0.5
    assert report["score"]["value"] == pytest.approx(19.95)
    for score in report.values():
        assert score["low"] < score["value"] < score["high"]
        assert all(type(number) is float for number in score.values())


def test_interval_is_that_of_the_normal_distribution_for_many_samples() -> None:
    # The mean of 400 samples of 0 and 1, half of them 1, has a standard deviation of 0.5 / 20.
    for level, deviations in ((0.95, 1.96), (0.6827, 1.0)):
        hit = bootstrap(ROWS, num_resamples=4000, level=level)["hit"]
        assert hit["low"] == pytest.approx(0.5 - deviations * 0.025, abs=0.004)
        assert hit["high"] == pytest.approx(0.5 + deviations * 0.025, abs=0.004)


def test_same_seed_same_interval() -> None:
    assert bootstrap(ROWS, seed=1) == bootstrap(ROWS, seed=1)
    assert bootstrap(ROWS, seed=1)["score"]["low"] != bootstrap(ROWS, seed=2)["score"]["low"]


def test_resamples_are_the_same_in_parts(monkeypatch) -> None:
    whole = bootstrap(ROWS, num_resamples=50)
    for most_draws in (7 * len(ROWS), 1):
        monkeypatch.setattr(metrics, "_MOST_DRAWS", most_draws)
        in_parts = bootstrap(ROWS, num_resamples=50)
        for name, score in whole.items():
            assert in_parts[name] == pytest.approx(score, rel=1e-12)


def test_samples_that_are_all_alike_leave_no_doubt() -> None:
    assert bootstrap([{"a": 0.25}] * 7) == {"a": {"value": 0.25, "low": 0.25, "high": 0.25}}
    assert bootstrap([{"a": 1.0}]) == {"a": {"value": 1.0, "low": 1.0, "high": 1.0}}


def test_captions_are_scored_anew_in_each_resample() -> None:
    """Against scoring each drawn corpus from its captions; CIDEr alone keeps the weights of the whole corpus."""
    scorer = CaptionScorer.from_texts(CAPTIONS, [[text] for text in REFERENCES])
    drawn = np.random.default_rng(3).integers(4, size=(25, 4))
    expected: dict[str, list[float]] = {name: [] for name in scorer.rows[0]}
    for choice in drawn.tolist():
        chosen = CaptionScorer.from_texts([CAPTIONS[i] for i in choice], [[REFERENCES[i]] for i in choice])
        for name, score in chosen.scores(chosen.statistics.sum(axis=0), 4).items():
            expected[name].append(float(score))
        expected["CIDEr"][-1] = float(np.mean([scorer.rows[i]["CIDEr"] for i in choice]))
    report = bootstrap(scorer, seed=3, num_resamples=25, level=0.9)
    for name, scores in expected.items():
        low, high = np.quantile(scores, [0.05, 0.95])
        assert report[name] == pytest.approx({"value": report[name]["value"], "low": low, "high": high}), name
        assert low < high


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample"):
        bootstrap([])
    with pytest.raises(ValueError, match="no sample"):
        bootstrap(CaptionScorer([], []))
    with pytest.raises(ValueError, match="row 1 has the scores"):
        bootstrap([{"a": 1.0}, {"b": 1.0}])
    for arguments in ({"num_resamples": 0}, {"level": 0.0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="level"):
            bootstrap([{"a": 1.0}], **arguments)
