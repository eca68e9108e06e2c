"""The metrics of all tasks, in one place.

=======  ==================================  ======================================================
task     scores of each sample               scores of all samples
=======  ==================================  ======================================================
rec      ``score_rec``                       ``bootstrap(rows)``
tvg      ``score_tvg``                       ``bootstrap(rows)``
stvg     ``parse_tube``, ``score_stvg``      ``bootstrap(rows)``
svg      ``parse_tube``, ``score_svg``       ``bootstrap(rows)``
elc      ``parse_tube``, ``score_elc``       ``bootstrap(rows) | bootstrap(CaptionScorer(...))``
caption  ``score_caption``                   ``bootstrap(rows) | bootstrap(CaptionScorer(...))``
=======  ==================================  ======================================================

Every row has ``unparsable``, 0 or 1, whose mean is the share of answers that say nothing of what was asked.
"""

from __future__ import annotations

from llava.eval.metrics.bootstrap import bootstrap
from llava.eval.metrics.captions import CaptionScorer, score_caption, score_elc, split_words
from llava.eval.metrics.grounding import Tube, find_tube, parse_tube, score_rec, score_stvg, score_svg, score_tvg

__all__ = [
    "CaptionScorer",
    "Tube",
    "bootstrap",
    "find_tube",
    "parse_tube",
    "score_caption",
    "score_elc",
    "score_rec",
    "score_stvg",
    "score_svg",
    "score_tvg",
    "split_words",
]
