"""The parts of ``llava.data.localized_narratives``: boxes from points, places in captions, the choice of pictures."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFont

from llava.data.localized_narratives.boxes import (
    BoxSettings,
    GroundedUtterance,
    NarrativeSample,
    compute_quantile,
    find_ends,
    form_box,
    group_utterances,
)
from llava.data.localized_narratives.preview import PreviewChoice
from llava.data.localized_narratives.rows import Narrative, Point, Utterance
from llava.draw import wrap_text
from llava.geometry import Box

SETTINGS = BoxSettings()


def points(*places: tuple[float, float]) -> list[Point]:
    return [Point(x, y, 0.0) for x, y in places]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 21])
def test_quantiles_are_numpys(size: int) -> None:
    numbers = sorted(random.Random(size).random() for _ in range(size))
    for share in (0.0, 0.05, 0.3, 0.5, 0.95, 1.0):
        assert compute_quantile(numbers, share) == pytest.approx(np.quantile(numbers, share), abs=1e-12)


def test_a_box_leaves_out_strays() -> None:
    # 41 places from 0.3 to 0.5, the 5 % quantile being the third; one stray takes one place of the two below it.
    steady = [(0.3 + 0.005 * i, 0.6) for i in range(41)]
    assert form_box(points(*steady), SETTINGS) == Box(0.31, 0.575, 0.49, 0.625)
    strayed = form_box(points((0.0, 0.0), (1.0, 1.0), *steady), replace(SETTINGS, quantile=0.05))
    assert strayed is not None
    assert strayed == pytest.approx((0.305, 0.575, 0.495, 0.625), abs=0.006)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([(0.5, 0.5)], (0.475, 0.475, 0.525, 0.525)),
        ([(0.0, 1.0)], (0.0, 0.95, 0.05, 1.0)),
        ([(0.5, 0.5), (1.001, 0.5), (0.5, -0.001)], (0.475, 0.475, 0.525, 0.525)),
        ([(0.123456, 0.2), (0.9, 0.9)], (0.162, 0.235, 0.861, 0.865)),
        ([(-0.1, 0.5)], None),
        ([], None),
    ],
)
def test_boxes_of_few_points(places: list[tuple[float, float]], expected: tuple[float, ...] | None) -> None:
    assert form_box(points(*places), SETTINGS) == expected


def test_a_box_is_always_one() -> None:
    rng = random.Random(0)
    for _ in range(500):
        settings = BoxSettings(
            quantile=rng.uniform(0, 0.4), min_size=rng.choice([0.001, 0.05, 1.0]), decimals=rng.choice([3, 4])
        )
        middle = rng.random()
        box = form_box(points(*((middle + rng.gauss(0, 0.1), rng.random()) for _ in range(5))), settings)
        if box is not None:
            assert 0 <= box.x1 < box.x2 <= 1
            assert 0 <= box.y1 < box.y2 <= 1
            assert list(box) == [round(edge, settings.decimals) for edge in box]


@pytest.mark.parametrize(
    ("caption", "utterances", "expected"),
    [
        ("A dog, a cat.", ["a dog", "a cat"], ["A dog", "A dog, a cat"]),
        ("A dog, a cat.", ["A dog,", "a cat."], ["A dog,", "A dog, a cat."]),
        ("A dog, a cat.", ["A dog .", "a cat ."], ["A dog", "A dog, a cat."]),
        ("The man's hat.", ["the mans", "hat"], ["The man's", "The man's hat"]),
        ("The man’s hat.", ["the man's", "hat"], ["The man’s", "The man’s hat"]),
        # Spelt alike.
        ("A grey giraffe eats.", ["a gray", "jiraf", "eats"], ["A grey", "A grey giraffe", "A grey giraffe eats"]),
        ("He has a tshirt on.", ["he has", "a t-shirt", "on"], ["He has", "He has a tshirt", "He has a tshirt on"]),
        ("A brown dog.", ["a", "braun", "uhm yes so", "dogg."], ["A", "A brown", None, "A brown dog."]),
        # Missing on either side.
        ("A dog and a cat.", ["a dog", "uhm", "a cat"], ["A dog", None, "A dog and a cat"]),
        ("There is a dog. A cat.", ["a dog", "a cat"], ["There is a dog", "There is a dog. A cat"]),
        ("A dog.", ["", "...", "a dog"], [None, None, "A dog"]),
        ("A dog.", ["two", "old", "horses"], [None, None, None]),
        # Words that return are found where they were said.
        ("A man, a dog, a man.", ["a man", "a dog", "a man"], ["A man", "A man, a dog", "A man, a dog, a man"]),
        ("Über a Straße.", ["ÜBER", "a strasse"], ["Über", "Über a Straße"]),
    ],
)  # fmt: skip
def test_places_in_the_caption(caption: str, utterances: list[str], expected: list[str | None]) -> None:
    ends = find_ends(caption, utterances)
    assert [None if end is None else caption[:end] for end in ends] == expected


def test_places_come_in_order() -> None:
    rng = random.Random(0)
    vocabulary = ["a", "dog", "cat,", "the", "grass.", "on"]
    for _ in range(300):
        caption = " ".join(rng.choices(vocabulary, k=8))
        utterances = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 3))) for _ in range(4)]
        ends = [end for end in find_ends(caption, utterances) if end is not None]
        assert ends == sorted(set(ends))
        assert all(0 < end <= len(caption) for end in ends)


def test_groups() -> None:
    said = [Utterance("In", (0.0, 0.2)), Utterance("this image", None), Utterance("dogs.", (0.9, 1.0)),
            Utterance("Two", (1.0, 1.2)), Utterance("cats", None)]  # fmt: skip
    assert list(group_utterances(said, 1)) == said
    assert list(group_utterances(said, 3)) == [
        Utterance("In this image", (0.0, 0.2)),
        Utterance("dogs.", (0.9, 1.0)),
        Utterance("Two cats", (1.0, 1.2)),
    ]
    assert list(group_utterances(said[1:2] + said[4:], 9)) == [Utterance("this image cats", None)]


def make_sample(identity: str, has_box: bool) -> NarrativeSample:
    utterance = GroundedUtterance("a dog", box=Box(0.1, 0.1, 0.2, 0.2) if has_box else None)
    return NarrativeSample(identity, Narrative("d", "1", "", "a dog", (), ()), "1.jpg", [utterance])


def test_pictures_are_chosen_by_id_and_not_by_place() -> None:
    samples = [make_sample(str(i), has_box=i % 2 == 0) for i in range(40)]
    chosen = []
    for order in (samples, samples[::-1]):
        choice = PreviewChoice(5)
        for sample in [*order, replace(samples[0], image=None, identity="text")]:
            choice.offer(sample)
        chosen.append([sample.identity for sample in choice.samples])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 5
    assert all(int(identity) % 2 == 0 for identity in chosen[0]), "samples with boxes come first"
    assert max(map(int, chosen[0])) > 9, "they come from everywhere"


def test_few_samples_are_all_drawn() -> None:
    choice = PreviewChoice(5)
    for sample in (make_sample("a", False), make_sample("b", True)):
        choice.offer(sample)
    assert [sample.identity for sample in choice.samples] == ["b", "a"]


def test_lines_of_text_fit() -> None:
    font = ImageFont.load_default(15)
    text = "there is a dog with a very long incomprehensibilities-of-the-world collar"
    lines = wrap_text(text, 120)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 or " " not in line for line in lines)
