"""The flags of training, read from the source of the argument groups, without loading torch and transformers.

That takes seconds, which neither ``--help`` nor a wrong flag is worth. transformers' own flags are read from the
release that is installed. A test holds the table against the parser that a run is read with.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llava.messages import FAILED
from llava.parser import CommandParser

PROGRAM = "python -m llava.train.train"
DESCRIPTION = "Train a language model on text, images and videos."
CONFIG_HELP = "Recipe: a YAML file, or the name of one that comes with llava. Flags override it."

# Flags of the family's scripts that have another name now.
RENAMED = {
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "mm_image_grid_pinpoints": "image_grid_pinpoints",
}
# Flags that ask for what is always so, or for nothing.
RETIRED = {
    "lazy_preprocess": "samples are always read when they are needed",
    "save_safetensors": "checkpoints are always safetensors",
    "is_multimodal": "a sample's own media decide",
}
# Switches of the family's scripts that are accepted only as what happens anyway: off.
ALWAYS_OFF = (
    "force_sample",
    "use_downsample_image",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "lora_bias",
)
GROUPING = ("group_by_modality_length", "group_by_length")
"""Switches of the family's scripts, values of ``--train_sampling_strategy`` now; the first that is on counts."""

_GROUPS = ("ModelArguments", "DataArguments", "TrainingArguments")


@dataclass(frozen=True)
class Flag:
    """One field of an argument group: its name, its type and default as the source has them, and its help."""

    name: str
    kind: str
    default: str | None
    help: str


def answer_at_once(words: Sequence[str]) -> int | None:
    """For a command line that asks for help or has an unknown flag: answer it, and give the exit status."""
    if "--" in words:
        return None
    if any(word in ("-h", "--help") for word in words):
        print(build_parser().format_help(), end="")
        return 0
    known = {*read_flags(), *RENAMED, *RETIRED, *ALWAYS_OFF, *GROUPING, "config"}
    known |= {f"no_{flag.name}" for flag in read_flags().values() if flag.kind == "bool" and flag.default == "True"}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:].replace("-", "_") not in known:
            print(f"error: {build_parser().explain_unknown(word)}", file=sys.stderr)
            return FAILED
    return None


def build_parser() -> CommandParser:
    """A parser that knows the flags, their types and their help, but reads none of their values."""
    parser = CommandParser(prog=PROGRAM, description=DESCRIPTION)
    parser.add_argument("--config", help=CONFIG_HELP)
    for flag in read_flags().values():
        default = "" if flag.default in (None, "None") else f" (default: {flag.default})"
        text = f"{flag.help}{default}".replace("%", "%%")
        parser.add_argument(f"--{flag.name}", metavar=flag.kind.removesuffix(" | None").upper(), help=text)
    return parser


@cache
def read_flags() -> dict[str, Flag]:
    """All flags by name, in the order of the groups."""
    arguments = _Source(Path(__file__).parent / "arguments.py")
    found: dict[str, Flag] = {}
    for group in _GROUPS:
        found |= arguments.fields_of(group)
    return found


class _Source:
    """A module as its source has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_bytes())
        self.imports = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self.values: dict[str, ast.expr] = {}
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                targets, values = node.targets[0], node.value
                names = targets.elts if isinstance(targets, ast.Tuple) else [targets]
                parts = values.elts if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple) else [values]
                self.values |= {ast.unparse(name): value for name, value in zip(names, parts, strict=False)}
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self.values[ast.unparse(node.target)] = node.value

    def fields_of(self, name: str) -> dict[str, Flag]:
        """The fields of a data class, those of its bases first, as ``dataclasses`` orders them."""
        found: dict[str, Flag] = {}
        node = self.classes[name]
        for base in reversed(node.bases):
            source, class_name = self._find_class(ast.unparse(base))
            found |= source.fields_of(class_name)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                flag = self._read_field(statement.target.id, statement)
                if flag is not None:
                    found[flag.name] = flag
        return found

    def _find_class(self, name: str) -> tuple[_Source, str]:
        if name in self.classes:
            return self, name
        if name == "transformers.TrainingArguments":
            return _source_of("transformers.training_args"), "TrainingArguments"
        module, original = self.imports[name]
        return _source_of(module), original

    def _read_field(self, name: str, node: ast.AnnAssign) -> Flag | None:
        kind = ast.unparse(node.annotation)
        value = node.value
        if "ClassVar" in kind:
            return None
        if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
            return Flag(name, kind, None if value is None else self._show(value), "")
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "init" in given and ast.unparse(given["init"]) == "False":
            return None
        default = given.get("default")
        text = ""
        if isinstance(metadata := given.get("metadata"), ast.Dict):
            entries = {
                ast.literal_eval(key): entry for key, entry in zip(metadata.keys, metadata.values, strict=True) if key
            }
            text = str(self.evaluate(entries["help"])) if "help" in entries else ""
        return Flag(name, kind, None if default is None else self._show(default), text)

    def _show(self, node: ast.expr) -> str:
        return str(self.evaluate(node))

    def evaluate(self, node: ast.expr) -> Any:
        """A constant expression: texts, numbers, tuples, names of such, and what joins them; else its source."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self._spread(node.elts))
        if isinstance(node, ast.Dict):
            return tuple(self.evaluate(key) for key in node.keys if key is not None)
        if isinstance(node, ast.Name):
            return self._look_up(node)
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self.evaluate(part)) for part in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.evaluate(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.evaluate(node.left) + self.evaluate(node.right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
            return str(self.evaluate(node.func.value)).join(map(str, self.evaluate(node.args[0])))
        return ast.unparse(node)

    def _spread(self, nodes: Sequence[ast.expr]) -> Iterator[Any]:
        for node in nodes:
            if isinstance(node, ast.Starred):
                yield from self.evaluate(node.value)
            else:
                yield self.evaluate(node)

    def _look_up(self, node: ast.Name) -> Any:
        if node.id in self.values:
            return self.evaluate(self.values[node.id])
        if node.id in self.imports:
            module, original = self.imports[node.id]
            return _source_of(module).evaluate(ast.Name(original))
        return node.id


@cache
def _source_of(module: str) -> _Source:
    """A module's source, found without importing it or its packages."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{first} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    return _Source(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
