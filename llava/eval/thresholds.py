"""Whether a score reaches a threshold."""

from __future__ import annotations

THRESHOLDS = (0.3, 0.5, 0.7)

_DECIMALS = 9
"""Scores are compared rounded: 0.1 / (0.3 - 0.1) is no half in floating point, yet it is one to whoever reads it."""


def reaches(score: float, threshold: float) -> bool:
    """Whether the score is at least the threshold."""
    return round(score, _DECIMALS) >= threshold


def exceeds(score: float, threshold: float) -> bool:
    """Whether the score is more than the threshold."""
    return round(score, _DECIMALS) > threshold


def shares_reaching(name: str, score: float) -> dict[str, float]:
    """Of a sample's score, 1 for each of 0.3, 0.5 and 0.7 that it reaches and else 0, under ``NAME>=0.3``."""
    return {f"{name}>={threshold}": float(reaches(score, threshold)) for threshold in THRESHOLDS}
