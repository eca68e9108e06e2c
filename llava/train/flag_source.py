"""The flags of training as the source has them: name, type, default, help and heading of each, read without imports.

The source is that of ``arguments.py`` and of the installed transformers. To load these takes seconds, which neither
``--help`` nor a wrong flag is worth.
"""

from __future__ import annotations

import ast
import importlib.util
import operator
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llava.train.transformers_flags import TOPICS

_HEADING = re.compile(r" *# --- (.+) ---")
_OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.Pow: operator.pow}
_OTHER = list(TOPICS)[-1]
_TOPIC_OF = {name: topic for topic, flags in TOPICS.items() for name in flags}
_GROUPS = ("ModelArguments", "DataArguments", "TrainingArguments")


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
            if (local := ast.unparse(base)) in self.classes:
                found |= self.read_fields(local)
                continue
            module, base_name = self._find(local)
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
