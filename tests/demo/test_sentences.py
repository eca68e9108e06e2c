"""Sentences of the demo: articles and adjectives agree."""

from __future__ import annotations

import pytest

from llava.demo.sentences import COLOURS, MOVEMENTS, OTHER_NOUNS, SHAPES, Adjective, Noun, caption


@pytest.mark.parametrize(
    ("shape", "colour", "movement", "expected"),
    [
        ("stella", "giallo", "right", "una stella gialla si muove verso destra"),
        ("quadrato", "rosso", "left", "un quadrato rosso si muove verso sinistra"),
        ("croce", "bianco", "up", "una croce bianca si muove verso l'alto"),
        ("cerchio", "verde", "down", "un cerchio verde si muove verso il basso"),
        ("luna", "arancione", "circle", "una luna arancione gira in tondo"),
        ("triangolo", "blu", "still", "un triangolo blu resta fermo"),
        ("luna", "viola", "still", "una luna viola resta ferma"),
        ("stella", "rosa", "still", "una stella rosa resta ferma"),
    ],
)
def test_captions_agree(shape: str, colour: str, movement: str, expected: str) -> None:
    assert caption(SHAPES[shape], colour, movement) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        (Noun("ape", "f"), "un'ape rossa gira in tondo"),
        (Noun("uccello", "m"), "un uccello rosso gira in tondo"),
        (Noun("zaino", "m"), "uno zaino rosso gira in tondo"),
        (Noun("specchio", "m"), "uno specchio rosso gira in tondo"),
        (Noun("sole", "m"), "un sole rosso gira in tondo"),
        (Noun("stella", "f"), "una stella rossa gira in tondo"),
    ],
)
def test_articles_follow_gender_and_first_letters(noun: Noun, expected: str) -> None:
    assert caption(noun, "rosso", "circle") == expected


def test_invariable_colours_have_one_form() -> None:
    for name in ("verde", "blu", "viola", "rosa", "arancione"):
        assert COLOURS[name] == Adjective(name, name)


def test_there_is_enough_to_tell_apart() -> None:
    assert len(SHAPES) >= 5
    assert len(COLOURS) >= 6
    assert len(MOVEMENTS) >= 5
    assert {noun.gender for noun in SHAPES.values()} == {"m", "f"}
    assert not {noun.word for noun in OTHER_NOUNS} & set(SHAPES)
