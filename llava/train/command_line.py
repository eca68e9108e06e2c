"""A command line and a recipe file, read into the groups of arguments; ``--help`` and unknown flags at once.

Flags of the LLaVA family, and its variables of the environment, become today's (``family_words``). To load what reads
the values takes seconds, which neither ``--help`` nor a wrong flag is worth: nothing heavy is imported before it must.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.command import FAILED, CommandParser, rename_flags
from llava.io import is_file, read_yaml
from llava.messages import shorten
from llava.registry import import_plugins
from llava.train.family_flags import FAMILY
from llava.train.family_words import Line, read_environment, translate
from llava.train.flag_source import Flag, read_flags
from llava.train.transformers_flags import AS_IN_TRANSFORMERS, FLAGS, REFUSED, TOPICS, WORKS

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent.parent / "recipes"
PROGRAM = "python -m llava.train.train"
DESCRIPTION = "Train a language model on text, images and videos."
CONFIG_HELP = "Recipe: a YAML file, or the name of one that comes with llava. Flags override it."

MAY_BE_EMPTY = (
    "image_folder", "video_folder", "lora_weight_path", "pretrain_mm_mlp_adapter", "run_name", "fsdp", "debug",
)  # fmt: skip
"""Flags of which an empty value says "none", as the family's scripts give them."""

Arguments = tuple["ModelArguments", "DataArguments", "TrainingArguments"]
Group = TypeVar("Group")


def answer_at_once(words: Sequence[str]) -> int | None:
    """For a command line that asks for help or has an unknown flag: answer it, and give the exit status."""
    if "--" in words:  # What follows is no flag: left to the parser.
        return None
    if any(word in ("-h", "--help") for word in words):
        _help_parser().print_help()
        return 0
    if (wrong := explain_unknown_flag(words) or _find_no_temporary_folder()) is not None:
        print(f"error: {wrong}", file=sys.stderr)
        return FAILED
    return None


def _find_no_temporary_folder() -> str | None:
    """What is wrong where no folder takes temporary files, without which torch cannot even be imported."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        return f"{error.strerror}; give TMPDIR a folder that can be written to"
    return None


def explain_unknown_flag(words: Sequence[str], others: Sequence[str] = ()) -> str | None:
    """What is wrong with the first flag that neither the trainer nor ``others`` has; None where all are known."""
    known = {*read_flags(), *FAMILY, "config"}
    # HfArgumentParser adds --no_x for every switch x that is true by default.
    known |= {f"no_{flag.name}" for flag in read_flags().values() if flag.kind == "bool" and flag.default == "True"}
    flags = [*(f"--{name}" for name in known), *others]
    for word, given in zip(rename_flags(words, flags), words, strict=True):
        name = word.partition("=")[0]
        if name.startswith("--") and name not in flags:
            return _help_parser().explain_unknown(given, others)
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read ``--config RECIPE`` (if given) and flags, which override it.

    Args:
        argv: the words of the command line; by default this process's.

    Raises:
        ValueError: an unknown flag or key (with the names that come near it), a value that does not fit, or a launcher
            whose processes would each train alone.
    """
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

    values = parse_values(argv)
    model, data = build_group(ModelArguments, values), build_group(DataArguments, values)
    training = build_group(TrainingArguments, values)
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(training.world_size):
        raise ValueError(
            f"a launcher has started {started} processes (WORLD_SIZE), which would not meet: this one would train as "
            f"{training.world_size}. Give --use_cpu true for a CPU; alone, unset WORLD_SIZE"
        )
    return model, data, training


def parse_values(
    argv: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    also: Sequence[str] = (),
    tells_notes: bool = True,
) -> dict[str, Any]:
    """The value of every flag of every group, before a group has looked at them.

    Args:
        argv: as for ``parse_arguments``.
        optional: names of flags that may be missing although their group needs them; they are None then.
        also: flags of the command that are read elsewhere, for the errors.
        tells_notes: whether to say what became of flags and variables of the LLaVA family.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        sys.exit(answer_at_once(["--help"]))
    parser = build_parser(optional)
    recipe, words = _take_config(parser.rename(words))
    before, notes = ([], []) if recipe is None else _recipe_words(recipe, parser)
    of_variables, is_plain, more = read_environment(os.environ, words, before)
    words, changes = translate(words, [*before, *of_variables])
    if is_plain:
        before, words = (_without_version(line) for line in (before, words))
        changes = [note for note in changes if not note.startswith("--version ")]
    if tells_notes:
        _tell([*notes, *more, *changes])
    known = parser.parse_words(words, also, [*before, *of_variables])
    # Before any group looks at its values: they may be names that a plugin registers.
    if known.plugins:
        import_plugins(known.plugins)
    return vars(known)


def build_parser(optional: Sequence[str] = ()) -> CommandParser:
    """The parser of all flags, made from the dataclasses; ``optional`` are flags that may be missing nonetheless."""
    from transformers import HfArgumentParser

    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

    groups: Any = (ModelArguments, DataArguments, TrainingArguments)
    # transformers makes argparse actions of the fields; as a parent it gives them to our parser, with our errors.
    flags = HfArgumentParser(groups, add_help=False)
    parser = CommandParser(prog=PROGRAM, description=DESCRIPTION, parents=[flags], may_be_empty=MAY_BE_EMPTY)
    parser.add_argument("--config", help=CONFIG_HELP)
    for action in parser._actions:
        action.required = action.required and action.dest not in optional
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True  # Also a switch that is None by default may stand alone.
    return parser


def build_group(group: type[Group], values: Mapping[str, Any]) -> Group:
    """One group of arguments from what ``parse_values`` read."""
    return group(**{name: values[name] for name in group.__dataclass_fields__ if name in values})  # type: ignore[attr-defined]


def read_variables(names: Sequence[str]) -> dict[str, str]:
    """Those of some variables of the environment that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def set_variables(values: Mapping[str, str]) -> None:
    """Set variables of the environment that are not set, for libraries that know no other way."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def read_array_task() -> tuple[int, int] | None:
    """Which task of how many this process is in a Slurm array, counted from 0; None outside of one."""
    number, first, count = (
        os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "COUNT")
    )  # A step between tasks counts as well: 0, 10 and 20 are three.
    if not (number.isdigit() and count.isdigit() and int(count) > 0):
        return None
    last = os.environ.get("SLURM_ARRAY_TASK_MAX", number)
    step = max(1, (int(last) - int(first or 0)) // max(1, int(count) - 1)) if last.isdigit() else 1
    return min((int(number) - int(first or 0)) // step, int(count) - 1), int(count)


# Recipes and older spellings, as words of today's command line.


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
        if is_file(path):
            return path, rest
    shipped = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml")))
    what = "a folder, not a recipe" if os.path.isdir(recipe) else "no such file"
    raise ValueError(f"--config {shorten(recipe)}: {what}; recipes that come with llava: {shipped}")


def _recipe_words(path: Path, parser: CommandParser) -> tuple[list[str], list[str]]:
    """A recipe as words of a command line, so that both take one way, and notes of what became of flags."""
    recipe = read_yaml(path, f"--config {path}") or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: expected names and values, found {type(recipe).__name__}")
    words: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        values = [_as_word(item) for item in (value if isinstance(value, list) else [value])]
        if flag := next((word for word in values if word.startswith("--")), None):
            raise ValueError(
                f"{path}: {shorten(key)} has the value {shorten(flag)}, which reads as a flag; give another"
            )
        words += [f"--{key}", *values]
    words, notes = translate(parser.rename(words))
    flags = [word[2:] for word in words if word.startswith("--")]
    for flag in flags:
        if f"--{flag}" not in parser._option_string_actions:
            raise ValueError(f"{path}: {parser.explain_unknown('--' + flag)}")
    return words, notes


def _as_word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)  # A date is its text.


def _without_version(words: list[str]) -> list[str]:
    line = Line(words)
    line.take("version")
    return line.words


def _tell(notes: Sequence[str]) -> None:
    """Say, once for all ranks, what became of flags and variables of the LLaVA family."""
    if notes and os.environ.get("RANK", "0") == "0":  # Ranks are not joined yet; torchrun and deepspeed number them so.
        logger.warning(
            "Flags and variables of other versions (docs/migrating.md):\n%s",
            "\n".join(f"  {note}" for note in dict.fromkeys(notes)),
        )


# Help.


def _help_parser() -> CommandParser:
    """A parser that knows the flags and their help, topic by topic, but reads none of their values."""
    usage = "%(prog)s [--config RECIPE] [--FLAG VALUE ...]"
    parser = CommandParser(prog=PROGRAM, usage=usage, description=DESCRIPTION)
    parser.add_argument("--config", help=CONFIG_HELP)
    flags = read_flags().values()
    for topic in dict.fromkeys([*(flag.topic for flag in flags if flag.topic not in TOPICS), *TOPICS]):
        group = parser.add_argument_group(topic)
        for flag in flags:
            if flag.topic == topic:
                default = "" if flag.default in (None, "None") else f" (default: {flag.default})"
                metavar = flag.kind.removesuffix(" | None").upper()
                text = f"{_describe(flag)}{default}".replace("%", "%%")
                group.add_argument(f"--{flag.name}", metavar=metavar, help=text)
    return parser


def _describe(flag: Flag) -> str:
    """The help of a flag; of one of transformers what it does here, where that is not what transformers says."""
    if not flag.of_transformers:
        return flag.help
    known, theirs = FLAGS.get(flag.name), flag.help.replace("%%", "%")  # They write it for argparse.
    if known is None or known.note == AS_IN_TRANSFORMERS:
        return theirs
    note = known.note.replace("`", "")
    if known.effect != WORKS:
        return f"{'Refused' if known.effect == REFUSED else 'No effect'}: {note}."
    return f"{theirs.removesuffix('.')}. Here: {note}."
