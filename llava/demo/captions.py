"""Italian captions of the demo's clips: a noun, a colour that agrees with it, and a movement."""

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
        return self.word[0] == "z" or (self.word[0] == "s" and self.word[1] not in "aeiou")


@dataclass(frozen=True)
class Adjective:
    """An adjective with its two singular forms, equal for an invariable one such as `blu`."""

    masculine: str
    feminine: str

    def agree(self, noun: Noun) -> str:
        """The form that agrees with `noun`."""
        return self.feminine if noun.gender == "f" else self.masculine


SHAPES: dict[str, Noun] = {
    noun.word: noun
    for noun in (
        Noun("cerchio", "m"),
        Noun("quadrato", "m"),
        Noun("triangolo", "m"),
        Noun("stella", "f"),
        Noun("croce", "f"),
        Noun("luna", "f"),
    )
}

COLOURS: dict[str, Adjective] = {
    adjective.masculine: adjective
    for adjective in (
        Adjective("rosso", "rossa"),
        Adjective("giallo", "gialla"),
        Adjective("bianco", "bianca"),
        Adjective("verde", "verde"),
        Adjective("blu", "blu"),
        Adjective("viola", "viola"),
        Adjective("rosa", "rosa"),
        Adjective("arancione", "arancione"),
    )
}

_STILL = Adjective("resta fermo", "resta ferma")

MOVEMENTS: dict[str, Adjective] = {
    "right": Adjective("si muove verso destra", "si muove verso destra"),
    "left": Adjective("si muove verso sinistra", "si muove verso sinistra"),
    "up": Adjective("si muove verso l'alto", "si muove verso l'alto"),
    "down": Adjective("si muove verso il basso", "si muove verso il basso"),
    "circle": Adjective("gira in tondo", "gira in tondo"),
    "still": _STILL,
}

OTHER_NOUNS: tuple[Noun, ...] = (
    Noun("palla", "f"),
    Noun("barca", "f"),
    Noun("macchina", "f"),
    Noun("nuvola", "f"),
    Noun("foglia", "f"),
    Noun("ape", "f"),
    Noun("treno", "m"),
    Noun("gatto", "m"),
    Noun("fiore", "m"),
    Noun("uccello", "m"),
    Noun("zaino", "m"),
    Noun("pesce", "m"),
)
"""Nouns that no clip shows: the text phase learns agreement and word order from them."""


def caption(noun: Noun, colour: str, movement: str) -> str:
    """The sentence for a noun, a key of `COLOURS` and a key of `MOVEMENTS`."""
    adjective = COLOURS[colour].agree(noun)
    return f"{noun.article}{noun.word} {adjective} {MOVEMENTS[movement].agree(noun)}"
