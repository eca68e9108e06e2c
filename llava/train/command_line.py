"""A command line and a recipe file, read into the argument groups."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from llava.data.samplers import RANDOM
from llava.io import read_yaml
from llava.messages import shorten
from llava.parser import CommandParser
from llava.registry import import_plugins
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.flag_table import ALWAYS_OFF, CONFIG_HELP, DESCRIPTION, GROUPING, PROGRAM, RENAMED, RETIRED

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent.parent / "recipes"

_OFF = ("false", "0", "no", "none")
_ON = ("true", "1", "yes")

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]
Group = TypeVar("Group")

GROUPS = (ModelArguments, DataArguments, TrainingArguments)
# Flags of which an empty value says "none", as the family's scripts give them.
MAY_BE_EMPTY = ("image_folder", "video_folder", "lora_weight_path", "run_name", "fsdp", "debug")


class TrainingParser(CommandParser, HfArgumentParser):
    """A parser of groups of arguments, with errors of one line."""


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read ``--config RECIPE`` (if given) and flags, which override it.

    Args:
        argv: the words of the command line; by default this process's.

    Raises:
        ValueError: an unknown flag or key (with the names that come near it), or a value that does not fit.
    """
    values = parse_values(argv)
    return tuple(build_group(group, values) for group in GROUPS)  # type: ignore[return-value]


def parse_values(
    argv: Sequence[str] | None = None, optional: Sequence[str] = (), also: Sequence[str] = ()
) -> dict[str, Any]:
    """The value of every flag of every group, before a group has looked at them.

    Args:
        argv: as for ``parse_arguments``.
        optional: names of flags that may be missing although their group needs them; they are None then.
        also: flags of the command that are read elsewhere, for the errors.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = TrainingParser(
        GROUPS,  # type: ignore[arg-type]
        prog=PROGRAM,
        description=DESCRIPTION,
        may_be_empty=MAY_BE_EMPTY,
    )
    parser.add_argument("--config", help=CONFIG_HELP)
    for action in parser._actions:
        action.required = action.required and action.dest not in optional
    recipe, words = _take_config(words)
    words = _translate(words)
    parser.warn_of_repeats(words)
    if recipe is not None:
        words = _recipe_words(recipe, parser) + words
    known = parser.parse_words(words, also)
    # Before any group looks at its values: they may be names that a plugin registers.
    import_plugins(known.plugins)
    return vars(known)


def build_group(group: type[Group], values: dict[str, Any]) -> Group:
    """One group of arguments from what ``parse_values`` read."""
    return group(**{name: values[name] for name in group.__dataclass_fields__ if name in values})  # type: ignore[attr-defined]


def _take_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """Split ``--config FILE`` off a command line."""
    rest, recipe = [], None
    iterator = iter(words)
    for word in iterator:
        name, _, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        if recipe is not None:
            raise ValueError(f"--config is given twice, {recipe!r} first; one recipe is read, and flags override it")
        recipe = value or next(iterator, "")
    if recipe is None:
        return None, rest
    for path in (Path(recipe), RECIPES / recipe):
        if path.is_file():
            return path, rest
    shipped = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml")))
    what = "a folder, not a recipe" if Path(recipe or "-").is_dir() else "no such file"
    raise ValueError(f"--config {shorten(recipe)}: {what}; recipes that come with llava: {shipped}")


def _recipe_words(path: Path, parser: TrainingParser) -> list[str]:
    """A recipe as words of a command line, so that both take one way."""
    recipe = read_yaml(path, f"--config {path}") or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: expected names and values, found {type(recipe).__name__}")
    words: list[str] = []
    for key, value in recipe.items():
        if value is not None:
            words += [f"--{key}", *(map(_as_word, value) if isinstance(value, list) else [_as_word(value)])]
    words = _translate(words)
    flags = [word[2:] for word in words if word.startswith("--")]
    for flag in flags:
        if f"--{flag}" not in parser._option_string_actions:
            raise ValueError(f"{path}: {parser.explain_unknown('--' + flag)}")
    return words


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _translate(words: list[str]) -> list[str]:
    """Map flags that the family's scripts still pass to today's, with a note for each."""
    words = _resolve_warmup(words)
    translated: list[str] = []
    grouping: dict[str, bool] = {}
    skipping = False
    for i, word in enumerate(words):
        if not word.startswith("--"):
            translated += [] if skipping else [word]
            continue
        name, equals, value = word[2:].partition("=")
        given = value if equals else (words[i + 1] if i + 1 < len(words) else "")
        skipping = name in RETIRED or name in ALWAYS_OFF or name in GROUPING
        if name in RENAMED:
            logger.warning("--%s is now --%s", name, RENAMED[name])
            translated.append(f"--{RENAMED[name]}{equals}{value}")
        elif name in RETIRED:
            logger.warning("--%s is not needed any more: %s", name, RETIRED[name])
        elif name in ALWAYS_OFF:
            if given.lower() not in _OFF:
                raise ValueError(f"--{name} {given}: not available in this version; leave the flag out")
            logger.warning("--%s is not needed any more: off is all there is", name)
        elif name in GROUPING:
            if given and not given.startswith("--") and given.lower() not in (*_ON, *_OFF):
                raise ValueError(f"--{name} is {shorten(given)}, expected true or false")
            grouping[name] = given.lower() not in _OFF
        else:
            translated.append(word)
    return _translate_grouping(grouping) + translated


def _resolve_warmup(words: list[str]) -> list[str]:
    """Of ``--warmup_ratio`` and ``--warmup_steps`` the one that counts, as older transformers had it.

    Steps count unless they are 0; flags of a command line, which come later, override those of its recipe.

    Raises:
        ValueError: the ratio is not below 1, and would be a number of steps.
    """
    given: dict[str, tuple[int, int, float]] = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--warmup_ratio", "--warmup_steps"):
            text = value if equals else (words[i + 1] if i + 1 < len(words) else "")
            number = _as_number(text)
            if number is None:
                return words  # which the parser explains
            if name == "--warmup_ratio" and not 0 <= number < 1:
                raise ValueError(f"--warmup_ratio is {text}; it is a share of the steps, at least 0 and below 1")
            given[name] = (i, i + (1 if equals else 2), number)
    if len(given) < 2:
        return words
    steps_count = given["--warmup_steps"][2] > 0
    if steps_count and given["--warmup_ratio"][2] > 0:
        logger.warning("--warmup_steps and --warmup_ratio are both given: the steps count")
    first, behind, _ = given["--warmup_ratio" if steps_count else "--warmup_steps"]
    return words[:first] + words[behind:]


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _translate_grouping(switches: dict[str, bool]) -> list[str]:
    """The family's switches for grouping as words; they come first, so that the flag of today overrides them."""
    if not switches:
        return []
    strategy = next((name for name in GROUPING if switches.get(name)), RANDOM)
    logger.warning("--%s is now --train_sampling_strategy %s", " and --".join(switches), strategy)
    return ["--train_sampling_strategy", strategy]
