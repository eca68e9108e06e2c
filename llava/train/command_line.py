"""A command line and a recipe file, read into the groups of arguments; ``--help`` and unknown flags at once.

The flags and their help are read from the source of ``arguments.py`` and of the installed transformers. To load these
takes seconds, which neither ``--help`` nor a wrong flag is worth: this module imports nothing heavy before it must.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava.command import FAILED, CommandParser
from llava.io import read_yaml
from llava.messages import shorten
from llava.registry import import_plugins
from llava.train.family_flags import FAMILY_FLAGS, translate
from llava.train.transformers_flags import AS_IN_TRANSFORMERS, FLAGS, REFUSED, TOPICS, WORKS

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments


RECIPES = Path(__file__).parent.parent / "recipes"
PROGRAM = "python -m llava.train.train"
DESCRIPTION = "Train a language model on text, images and videos."
CONFIG_HELP = "Recipe: a YAML file, or the name of one that comes with llava. Flags override it."

MAY_BE_EMPTY = ("image_folder", "video_folder", "lora_weight_path", "run_name", "fsdp", "debug")
"""Flags of which an empty value says "none", as the family's scripts give them."""

_HEADING = re.compile(r" *# --- (.+) ---")
_OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.Pow: operator.pow}
_OTHER = list(TOPICS)[-1]
_TOPIC_OF = {name: topic for topic, flags in TOPICS.items() for name in flags}
_GROUPS = ("ModelArguments", "DataArguments", "TrainingArguments")

Arguments = tuple["ModelArguments", "DataArguments", "TrainingArguments"]
Group = TypeVar("Group")


def answer_at_once(words: Sequence[str]) -> int | None:
    """For a command line that asks for help or has an unknown flag: answer it, and give the exit status."""
    if "--" in words:  # What follows is no flag: left to the parser.
        return None
    if any(word in ("-h", "--help") for word in words):
        print(_help_parser().format_help(), end="")
        return 0
    known = {*read_flags(), *FAMILY_FLAGS, "config"}
    # HfArgumentParser adds --no_x for every switch x that is true by default.
    known |= {f"no_{flag.name}" for flag in read_flags().values() if flag.kind == "bool" and flag.default == "True"}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:].replace("-", "_") not in known:
            print(f"error: {_help_parser().explain_unknown(word)}", file=sys.stderr)
            return FAILED
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read ``--config RECIPE`` (if given) and flags, which override it.

    Args:
        argv: the words of the command line; by default this process's.

    Raises:
        ValueError: an unknown flag or key (with the names that come near it), or a value that does not fit.
    """
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

    values = parse_values(argv)
    return (
        build_group(ModelArguments, values),
        build_group(DataArguments, values),
        build_group(TrainingArguments, values),
    )


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
    if any(word in ("-h", "--help") for word in words):
        sys.exit(answer_at_once(["--help"]))
    parser = build_parser(optional)
    recipe, words = _take_config(words)
    before = [] if recipe is None else _recipe_words(recipe, parser)
    known = parser.parse_words(translate(words, MAY_BE_EMPTY), also, before)
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
        if path.is_file():
            return path, rest
    shipped = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml")))
    what = "a folder, not a recipe" if Path(recipe or "-").is_dir() else "no such file"
    raise ValueError(f"--config {shorten(recipe)}: {what}; recipes that come with llava: {shipped}")


def _recipe_words(path: Path, parser: CommandParser) -> list[str]:
    """A recipe as words of a command line, so that both take one way."""
    recipe = read_yaml(path, f"--config {path}") or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: expected names and values, found {type(recipe).__name__}")
    words: list[str] = []
    for key, value in recipe.items():
        if value is not None:
            words += [f"--{key}", *(map(_as_word, value) if isinstance(value, list) else [_as_word(value)])]
    words = translate(words, MAY_BE_EMPTY)
    flags = [word[2:] for word in words if word.startswith("--")]
    for flag in flags:
        if f"--{flag}" not in parser._option_string_actions:
            raise ValueError(f"{path}: {parser.explain_unknown('--' + flag)}")
    return words


def _as_word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)  # A date is its text.


# The flags as the source has them.


@dataclass(frozen=True)
class Flag:
    """One field of a group of arguments: its type and default as the source has them, and its heading in the help."""

    name: str
    kind: str
    default: str | None
    help: str
    topic: str
    of_transformers: bool = False


@cache
def read_flags() -> dict[str, Flag]:
    """All flags by name, in the order of the groups."""
    return {name: flag for group in _GROUPS for name, flag in _fields_of("llava.train.arguments", group).items()}


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


class _Source:
    """A module as its source has it: enough of it to read the fields of its dataclasses.

    A flag is one of these::

        mm_slow_frames: int | None = kept(VisionConfig.slow_frames)    None; help and default are the setting's
        max_image_bytes: int = MediaLimits.max_image_bytes             the setting's default and help
        stage: str = CONTENT                                           with its help as the docstring below
        seed: int = field(default=42, metadata={"help": "..."})        as transformers writes them
    """

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        body = ast.parse(text).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        lines = enumerate(text.splitlines(), 1)
        self.headings = [(number, match[1]) for number, line in lines if (match := _HEADING.fullmatch(line))]
        self.imports: dict[str, tuple[str, str]] = {}
        self.values: dict[str, ast.expr] = {}
        for node in body:
            if isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self.values[ast.unparse(node.target)] = node.value
            elif isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):  # CONTENT, COORDINATES = "1", "2"
                    self.values |= {ast.unparse(name): part for name, part in zip(target.elts, value.elts, strict=True)}
                else:
                    self.values[ast.unparse(target)] = value

    def read_fields(self, name: str) -> dict[str, Flag]:
        """The fields of a dataclass, those of its bases first, as ``dataclasses`` orders them."""
        node = self.classes[name]
        found: dict[str, Flag] = {}
        for base in reversed(node.bases):  # As dataclasses orders the fields: those of the last base first.
            module, base_name = self._find(ast.unparse(base))
            inherited = _fields_of(module, base_name)
            if not module.startswith("llava."):  # transformers', whose headings here are ours.
                inherited = {
                    name: replace(flag, topic=_TOPIC_OF.get(name, _OTHER), of_transformers=True)
                    for name, flag in inherited.items()
                }
            found |= inherited
        # Each statement with the one behind it: a docstring under a field is an expression of its own.
        for statement, behind in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
                text = ""
                if isinstance(behind, ast.Expr):  # The docstring under the field.
                    text = " ".join(str(self.evaluate(behind.value)).split())
                if (flag := self._read_field(statement, text)) is not None:
                    found[flag.name] = flag
        return found

    def _read_field(self, node: ast.AnnAssign, text: str) -> Flag | None:
        name, value = ast.unparse(node.target), node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
            given = {keyword.arg: keyword.value for keyword in value.keywords}
            if "init" in given:  # No flag: field(init=False) is set in __post_init__.
                return None
            value = given.get("default")
            if isinstance(metadata := given.get("metadata"), ast.Dict):
                entries = dict(zip(map(ast.unparse, filter(None, metadata.keys)), metadata.values, strict=True))
                text = str(self.evaluate(entries["'help'"])) if "'help'" in entries else text
        elif isinstance(value, ast.Call) and ast.unparse(value.func) == "kept":
            kept = self._find_setting(value.args[0])
            text, value = kept.help, ast.Constant(None)
            if kept.default not in (None, "None", "False") and "(default" not in text:
                text = f"{text.removesuffix('.')} (default {kept.default})."
        elif isinstance(value, ast.Attribute) and not text:
            text = self._find_setting(value).help
        heading = next((title for line, title in reversed(self.headings) if line < node.lineno), "")
        default = None if value is None else str(self.evaluate(value))
        return Flag(name, ast.unparse(node.annotation), default, text, heading)

    def _find_setting(self, node: ast.expr) -> Flag:
        """The field that ``VisionConfig.num_frames`` names."""
        class_name, _, name = ast.unparse(node).partition(".")
        return _fields_of(*self._find(class_name))[name]

    def _find(self, name: str) -> tuple[str, str]:
        """Module and name of what is called ``name`` here, if it is imported."""
        if name == "transformers.TrainingArguments":
            return "transformers.training_args", "TrainingArguments"
        return self.imports[name]

    def evaluate(self, node: ast.expr) -> Any:
        """A constant expression: texts, numbers, tuples, names of such, and what joins them; else its source."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.values:
            return self.evaluate(self.values[node.id])
        if isinstance(node, ast.Name) and node.id in self.imports:
            module, original = self.imports[node.id]
            return _source_of(module).evaluate(ast.Name(original))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in self.imports:
            return self._find_setting(node).default
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self.evaluate(node.left), self.evaluate(node.right))
        return ast.unparse(node)


@cache
def _fields_of(module: str, class_name: str) -> dict[str, Flag]:
    return _source_of(module).read_fields(class_name)


@cache
def _source_of(module: str) -> _Source:
    """A module's source, found without importing it or its packages."""
    # For a dotted name find_spec imports the packages above it, and transformers takes seconds: so the top one only.
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{first} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return _Source(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
