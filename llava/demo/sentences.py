"""Italian sentences of both demos: captions of clips, and questions about places and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """An Italian noun with its gender, `"m"` or `"f"`."""

    word: str
    gender: str

    @property
    def article(self) -> str:
        """The indefinite article: un, uno (before z, or s and a consonant), una, un'."""
        if self.gender == "f":
            # Elision: un'ape, but un uccello without the apostrophe.
            return "un'" if self._starts_with_vowel else "una "
        return "uno " if self._starts_impure else "un "

    @property
    def definite_article(self) -> str:
        """The definite article: il, lo (before z, or s and a consonant), la, l'."""
        if self._starts_with_vowel:
            return "l'"
        if self.gender == "f":
            return "la "
        return "lo " if self._starts_impure else "il "

    @property
    def _starts_with_vowel(self) -> bool:
        return self.word[0] in "aeiou"

    @property
    def _starts_impure(self) -> bool:
        # lo zaino, lo specchio, but il sole.
        return self.word[0] == "z" or (self.word[0] == "s" and self.word[1] not in "aeiou")


@dataclass(frozen=True)
class Adjective:
    """An adjective with its two singular forms, equal for an invariable one such as `blu`."""

    masculine: str
    feminine: str

    def agree(self, noun: Noun) -> str:
        """The form that agrees with `noun`."""
        return self.feminine if noun.gender == "f" else self.masculine


_MASCULINE_SHAPES = ("cerchio", "quadrato", "triangolo")
_FEMININE_SHAPES = ("stella", "croce", "luna")
# The order is the class numbers of the tower's heads: a new shape or colour goes to the end.
SHAPES = {word: Noun(word, "m") for word in _MASCULINE_SHAPES} | {word: Noun(word, "f") for word in _FEMININE_SHAPES}

_CHANGING_COLOURS = {"rosso": "rossa", "giallo": "gialla", "bianco": "bianca"}
_INVARIABLE_COLOURS = ("verde", "blu", "viola", "rosa", "arancione")
COLOURS = {
    word: Adjective(word, _CHANGING_COLOURS.get(word, word)) for word in (*_CHANGING_COLOURS, *_INVARIABLE_COLOURS)
}

Pair = tuple[str, str]
"""A shape and a colour, as keys of ``SHAPES`` and ``COLOURS``."""

HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("stella", "giallo"),
    ("cerchio", "blu"),
    ("quadrato", "rosso"),
    ("triangolo", "viola"),
    ("croce", "verde"),
    ("luna", "bianco"),
)
"""Pairs that occur in no training clip, no training text and no frame that trained the tower.

No shape and no colour is in more than one of them.
"""

TRAINING_PAIRS: tuple[Pair, ...] = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT_PAIRS
)

MOVEMENTS: dict[str, Adjective] = {
    "right": Adjective("si muove verso destra", "si muove verso destra"),
    "left": Adjective("si muove verso sinistra", "si muove verso sinistra"),
    "up": Adjective("si muove verso l'alto", "si muove verso l'alto"),
    "down": Adjective("si muove verso il basso", "si muove verso il basso"),
    "circle": Adjective("gira in tondo", "gira in tondo"),
    "still": Adjective("resta fermo", "resta ferma"),
}

OTHER_NOUNS: tuple[Noun, ...] = tuple(
    Noun(word, gender)
    # None of these is a shape: a clip never shows them.
    for gender, words in {
        "f": ("palla", "barca", "macchina", "nuvola", "foglia", "ape"),
        "m": ("treno", "gatto", "fiore", "uccello", "zaino", "pesce"),
    }.items()
    for word in words
)
"""Nouns that no clip shows: the text phase learns agreement and word order from them."""


def caption(noun: Noun, colour: str, movement: str) -> str:
    """The sentence for a noun, a key of ``COLOURS`` and one of ``MOVEMENTS``: "una stella gialla gira in tondo"."""
    adjective = COLOURS[colour].agree(noun)
    return f"{noun.article}{noun.word} {adjective} {MOVEMENTS[movement].agree(noun)}"


# Questions of the demo of grounding.


def ask_where(pair: Pair) -> str:
    """The question for a place in a picture: "dov'è la stella gialla? <image>".

    The picture comes behind it: a model that reads it from left to right has to know what it looks for.
    """
    return f"dov'è {_name(pair)}? <image>"


def ask_when(pair: Pair) -> str:
    """The question for a span of time in a clip: "quando si ferma la stella gialla? <video>"."""
    return f"quando si ferma {_name(pair)}? <video>"


ASK_WHERE_IN_EACH_FRAME = "e dov'è in ogni fotogramma?"
"""The question for a shape's way through a clip that has been asked about."""


def names_held_out_pair(question: str) -> bool:
    """Whether a question is for a shape in a colour that training does not show."""
    return any(_name(pair) in question for pair in HELD_OUT_PAIRS)


def _name(pair: Pair) -> str:
    noun = SHAPES[pair[0]]
    return f"{noun.definite_article}{noun.word} {COLOURS[pair[1]].agree(noun)}"
