"""The Italian minimal pairs: many, each one change of a sentence, without cues that need no grammar; and their task."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict

from llava.eval.babylm.results import summarize
from llava.eval.babylm.sources import SourceFile
from llava.eval.babylm.tasks import TASKS, find_tasks, read_items

FIELDS = {
    "article": "article agreement", "adjective": "adjective agreement", "participle": "participle agreement",
    "verb": "subject-verb agreement", "clitic": "clitics", "auxiliary": "auxiliaries", "negation": "negation",
    "wh": "wh",
}  # fmt: skip
REORDERED = {"clitic_climbing", "clitic_cluster_order", "negation_clitic_order", "wh_preposition_stranding"}
"""Paradigms whose two sentences have the same words in another order; those of all others differ in one word."""

DATA = find_tasks([], ["italian"]).tasks[0]
ROWS = [row for _, row in DATA.files[0].read_rows()]


def words(sentence: str) -> list[str]:
    """A word with an apostrophe is one of its own: l'albero are two."""
    return re.findall(r"\w+'?|[^\w\s]", sentence.lower())


def changed(good: str, bad: str) -> tuple[list[str], list[str]]:
    """What is left of two sentences without the words that they begin and end with alike."""
    one, other = words(good), words(bad)
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return one, other


def test_they_are_many_and_named_by_paradigm_and_field() -> None:
    sizes = Counter(row["UID"] for row in ROWS)
    assert len(ROWS) == 544
    assert len(sizes) == 34
    assert set(sizes.values()) == {16}
    for row in ROWS:
        assert list(row) == ["sentence_good", "sentence_bad", "UID", "field", "language"]
        assert row["field"] == FIELDS[row["UID"].split("_")[0]]
        assert row["language"] == "it"


def test_no_sentence_is_there_twice_or_misspelt() -> None:
    sentences = [row[name] for row in ROWS for name in ("sentence_good", "sentence_bad")]
    assert len({sentence.lower() for sentence in sentences}) == len(sentences)
    for sentence in sentences:
        assert sentence == unicodedata.normalize("NFC", sentence)
        # An apostrophe is straight and has no blank behind it; no blank stands at an end, before a mark, or twice.
        assert re.fullmatch(r"[A-ZÈ][a-zàèéìòù]*('?[ ,']?[A-Za-zàèéìòùÈ]+)*[.?!]", sentence), sentence
        assert "' " not in sentence


def test_each_differs_in_one_place_and_in_no_number_of_words() -> None:
    for row in ROWS:
        one, other = changed(row["sentence_good"], row["sentence_bad"])
        if row["UID"] in REORDERED:
            assert one != other, row
            assert sorted(one) == sorted(other), row
        else:
            assert len(one) == len(other) == 1, row


def test_the_good_sentence_is_not_told_by_its_length() -> None:
    longer, shorter = (
        sum(sign * len(row["sentence_good"]) > sign * len(row["sentence_bad"]) for row in ROWS) for sign in (1, -1)
    )
    assert abs(longer - shorter) <= len(ROWS) // 20


def test_agreement_is_wrong_in_either_direction() -> None:
    """What is right in one pair of a paradigm is wrong in another, so that no word alone tells the good sentence."""
    right: dict[str, Counter[str]] = defaultdict(Counter)
    for row in ROWS:
        if row["UID"].startswith(("article", "clitic_left", "wh_relative", "wh_complementizer", "negation_ne")):
            one, other = changed(row["sentence_good"], row["sentence_bad"])
            right[row["UID"]].update(one)
            right[row["UID"]].subtract(other)
    for uid, counts in right.items():
        assert all(abs(count) <= 4 for count in counts.values()), (uid, counts)


def test_the_task_needs_no_data_and_is_scored_where_it_is_named() -> None:
    items = read_items(DATA, fast=True)
    assert len(items) == 544  # No part of them is drawn.
    assert items[0].id == "article_gender_0"
    assert items[0].fields == {"field": "article agreement"}
    result = summarize(DATA, items, [(0.0, -1.0)] * len(items))
    assert (result.official, len([row for row in result.rows if row.kind == "UID"])) == (100.0, 34)
    assert isinstance(DATA.files[0], SourceFile)
    assert [task.name for task in TASKS.values() if task.shipped] == ["italian"]
    found = find_tasks([], ["blimp", "italian"])
    assert [data.name for data in found.tasks] == ["italian"]
    assert found.missing[0].startswith("blimp: needs --data (a folder blimp*")
