"""What all commands share: a parser, checks of values, and how a command ends.

What a user can cause is one line on standard error that names the flag, its value and what was expected.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from llava.command_help import by_topic, examples_text, short_usage
from llava.commands import MEANT, OTHER_NAMES, PLACES, PROGRAM
from llava.messages import explain_error, is_out_of_memory, print_anything, shorten, shorten_text

logger = logging.getLogger(__name__)

FAILED = 2
INTERRUPTED = 130
"""Exit statuses."""
_WORDS = dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "f", "n", "0"), False
)
_LARGEST = 2**63
"""Numbers from here on do not fit torch's int64."""


class CommandLineError(ValueError):
    """A command line that cannot be meant; the message is one line that names the flag."""


class CommandParser(argparse.ArgumentParser):
    """argparse with errors as ``CommandLineError``: no usage first, the nearest flags named for an unknown one.

    Numbers are finite and fit 64 bits; truth is told by true or false, yes or no, on or off, 1 or 0; a value that is
    empty is an error, as it comes of a variable that is not set; a flag that is given twice is named in a warning.
    A flag may have the name that other commands give it (``OTHER_NAMES``), and dashes for its underscores; what has its
    place on the command line may be given by its flag (``PLACES``).

    The help has the flags by topic, and the examples of the command (``llava.commands``).

    Args:
        may_be_empty: names of flags whose values may be empty.
        **kwargs: as for ``argparse.ArgumentParser``; ``allow_abbrev`` is False.
    """

    def __init__(self, *, may_be_empty: Collection[str] = (), **kwargs: Any) -> None:
        self.may_be_empty = frozenset(may_be_empty)
        self._required: list[argparse.Action] = []
        self._places: dict[str, argparse.Action] | None = None
        super().__init__(**{"allow_abbrev": False, "prog": _module_command(), **kwargs})
        self.prog = program_name(self.prog)
        # argparse takes -1 for a value, but -1e-4 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|nan|infinity)$", re.I)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> Namespace:
        """As argparse's; a word that no flag takes is a ``CommandLineError``."""
        return self.parse_words(list(sys.argv[1:] if args is None else args), namespace=namespace)

    def parse_words(
        self,
        words: Sequence[str],
        others: Sequence[str] = (),
        before: Sequence[str] = (),
        namespace: Namespace | None = None,
    ) -> Namespace:
        """As ``parse_args``.

        Args:
            words: of the command line.
            others: flags of the command that another parser reads, for the errors.
            before: words of a recipe, which the command line overrides without a warning.
            namespace: as for argparse.
        """
        words = self.rename(words)
        self.warn_of_repeats(words)
        missing, known, unknown = self._parse([*before, *words], namespace)
        if unknown:
            raise CommandLineError(self.explain_unknown(unknown[0], others))
        self._require(missing)
        return known

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """As argparse's: the values, and the words that no flag takes."""
        missing, known, unknown = self._parse(list(sys.argv[1:] if args is None else args), namespace)
        self._require(missing)
        return known, unknown

    def _parse(self, words: list[str], namespace: Namespace | None) -> tuple[list[str], Namespace, list[str]]:
        """Names of required flags that are not there, values, and unknown words: a flag may be missing by a typo."""
        places = self._add_flags_of_places()
        # argparse would name what is missing first, and not the misspelled flag that was meant to give it.
        required = self._required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            known, unknown = super().parse_known_args(self.rename(words), namespace)
        finally:
            for action in required:
                action.required = True
        for dest, action in places.items():
            if (value := vars(known).pop(action.dest, None)) is not None:
                if vars(known).get(dest):
                    raise CommandLineError(f"{_name(action)} is {shorten(value)}, but its place has a value already")
                setattr(known, dest, value)
        return [_name(action) for action in required if getattr(known, action.dest, None) is None], known, unknown

    def _add_flags_of_places(self) -> dict[str, argparse.Action]:
        """For each place that has a flag in other commands that flag, by the name of the place; made once."""
        if self._places is None:
            places = [action for action in self._actions if not action.option_strings and action.dest in PLACES]
            self._places = {
                action.dest: self.add_argument(
                    PLACES[action.dest],
                    dest=f"flag_of_{action.dest}",
                    nargs=None if action.nargs == "?" else action.nargs,
                    type=action.type or str,
                    metavar=action.metavar,
                    help=argparse.SUPPRESS,
                )
                for action in places
                if PLACES[action.dest] not in self._option_string_actions
            }
        return self._places

    def _require(self, missing: Sequence[str]) -> None:
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
            raise CommandLineError(f"{names} {verb} missing; see --help")

    def explain_unknown(self, word: str, others: Iterable[str] = ()) -> str:
        """What is wrong with a word that no flag takes; ``others`` are flags that another parser knows."""
        if not word.startswith("-"):
            return f"unexpected {shorten(word)} on the command line; values follow a flag"
        name = word.partition("=")[0]
        # A dash in place of an underscore is no difference.
        spelled = {flag.replace("-", "_"): flag for flag in [*self.flags, *others]}
        if meant := [flag for flag in MEANT.get(_with_underscores(name), ()) if flag in spelled.values()]:
            return f"unknown flag {name}; did you mean {' or '.join(meant)}?"
        names = [spelled[flag] for flag in difflib.get_close_matches(name.replace("-", "_"), spelled, n=2)]
        return f"unknown flag {name}" + (f"; did you mean {' or '.join(names)}?" if names else "; see --help")

    @property
    def flags(self) -> list[str]:
        """The names of all flags, each once."""
        return [_name(action) for action in self._actions if action.option_strings]

    def rename(self, words: Sequence[str]) -> list[str]:
        """Words with each flag under the name that this parser knows it by."""
        return rename_flags(words, self._option_string_actions)

    def format_help(self) -> str:
        """The help: flags by topic, and examples."""
        formatter = self._get_formatter()
        usage = self.usage or short_usage(self.prog, self._actions, self._required)
        formatter.add_usage(usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            parts: dict[Any, list[argparse.Action]] = {group.title: group._group_actions}
            if group is self._optionals:
                parts = by_topic(group._group_actions, self._required)
            for title, actions in parts.items():
                formatter.start_section(title)
                formatter.add_text(group.description)
                formatter.add_arguments(actions)
                formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help() + examples_text(self.prog)

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """As argparse's; within ``find_parser`` nothing is printed."""
        if _asked is not None:
            _asked.append(self)
        else:
            super().print_help(file)

    def warn_of_repeats(self, words: Sequence[str]) -> None:
        """A warning for each flag that is given several times, with other values, and of which only the last counts."""
        given: dict[str, list[list[str]]] = {}
        values: list[str] = []
        for word in words:
            name, _, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if action is None:  # A value of the flag before it.
                values.append(word)
            else:
                values = [value] if value else []
                if isinstance(action, argparse._StoreAction):  # Switches may well be repeated.
                    given.setdefault(_name(action), []).append(values)
        for name, told in given.items():
            if any(values != told[0] for values in told):
                action = self._option_string_actions[name]
                several = "; several values go behind one flag" if action.nargs in ("+", "*") else ""
                logger.warning("%s is given more than once: only the last one counts%s", name, several)

    def error(self, message: str) -> NoReturn:
        """Raises what argparse found wrong; the names of a flag are told once."""
        # "argument --lr/--learning_rate: expected one argument" is what argparse says.
        message = re.sub(r"^argument (--?[\w-]+)(/--?[\w-]+)*: ", r"\1: ", message)
        flag, _, reason = message.partition(": ")
        if reason.startswith("expected ") and "argument" in reason:
            raise CommandLineError(f"{flag} needs a value behind it")
        if match := re.match(r"ignored explicit argument (.*)", reason, re.DOTALL):
            raise CommandLineError(f"{flag} takes no value, but {shorten(match[1].strip(chr(39)))} was given")
        raise CommandLineError(message)

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        if arg_string == "" and action.dest not in self.may_be_empty and action.type in (None, str):
            raise CommandLineError(f"{_name(action)} is empty; give a value, or leave the flag out")
        kind: object = action.type
        if getattr(kind, "__name__", "") == "string_to_bool":  # What transformers makes of bool.
            kind = bool
        if kind in (int, float, bool):
            return read_number(kind, arg_string, _name(action))
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            raise CommandLineError(f"{_name(action)} is {shorten(arg_string)}: {error.message}") from error

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise CommandLineError(
                f"{_name(action)} is {shorten(value)}; known: {', '.join(str(choice) for choice in action.choices)}"
            )


# The command that a parser is of.

_asked: list[CommandParser] | None = None
_started: tuple[str, str] | None = None
"""Program and name of the command that `llava` runs."""


@contextmanager
def started_as(program: str, name: str) -> Iterator[None]:
    """Within it the parsers of ``python -m MODULE`` call themselves ``llava NAME``."""
    global _started
    before, _started = _started, (program, f"{PROGRAM} {name}")
    try:
        yield
    finally:
        _started = before


def program_name(program: str) -> str:
    """A program as it was called: ``python -m MODULE``, or the ``llava NAME`` that stands for it."""
    if _started is None:
        return program
    if program == _started[0] or program.startswith(f"{_started[0]} "):  # The second is a command within it.
        return _started[1] + program[len(_started[0]) :]
    return program if program.startswith(_started[1]) or program.startswith("python -m llava.") else _started[1]


def find_parser(run: Callable[[list[str]], object], words: Sequence[str] = ()) -> CommandParser:
    """The parser that a command has, of which nothing is run: that which ``--help`` is the help of.

    Args:
        run: the command's ``main``, which takes words.
        words: that stand before ``--help``, such as ``build``.
    """
    global _asked
    before, _asked = _asked, []
    try:
        with suppress(SystemExit):
            run([*words, "--help"])
        return _asked[0]
    finally:
        _asked = before


def rename_flags(words: Iterable[str], known: Collection[str]) -> list[str]:
    """Words with each flag under the name by which a command knows it.

    Args:
        words: of a command line; those behind ``--`` are no flags.
        known: the command's flags, such as ``--output_dir``.
    """
    renamed = list(words)
    for place, word in enumerate(renamed):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if word.startswith("--") and name not in known:
            plain = _with_underscores(name)
            spellings = [plain, *OTHER_NAMES.get(plain, ())]
            found = next((one for name in spellings for one in (name, _with_dashes(name)) if one in known), name)
            renamed[place] = found + equals + value
    return renamed


def _with_underscores(name: str) -> str:
    return f"--{name.removeprefix('--').replace('-', '_')}"


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")


def _module_command() -> str | None:
    """How this program was started, if by ``python -m``; argparse before Python 3.14 tells the file's name alone."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def _name(action: argparse.Action) -> str:
    """The flag of an action, or the name of its place."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def read_number(kind: object, text: str, name: str) -> int | float | bool:
    """The int, the finite float or the truth that a text is; ``name`` is what an error calls it."""
    expected: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    word = text.strip().lower()
    try:
        if kind is bool:
            return _WORDS[word]
        number = int(text) if kind is int else float(text)
    except (ValueError, KeyError) as error:
        raise CommandLineError(f"{name} is {shorten(text)}; expected {expected[kind]}") from error
    if kind is int and abs(number) >= _LARGEST:
        raise CommandLineError(f"{name} is {shorten(text)}; expected a whole number of at most 18 digits")
    if not math.isfinite(number):
        raise CommandLineError(f"{name} is {shorten(text)}; expected a finite number")
    return number


def read_json_object(text: str, name: str) -> dict[str, object]:
    """The JSON object that a text is, of finite numbers and with no key twice; an error calls it ``name``."""
    try:
        value = json.loads(text, object_pairs_hook=_read_pairs, parse_float=_read_finite, parse_constant=_read_finite)
    except (ValueError, RecursionError) as error:
        raise CommandLineError(f"{name} is {shorten(text)}, expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise CommandLineError(f'{name} is {shorten(text)}, expected a JSON object such as {{"key": 1}}')
    return value


def _read_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


def _read_finite(text: str) -> float:
    if not math.isfinite(number := float(text)):  # Python's JSON knows NaN and Infinity, and 1e999 is one.
        raise ValueError(f"{shorten(text)} is not a finite number")
    return number


def check_at_least(args: Namespace, least: Mapping[str, float]) -> None:
    """A ``CommandLineError`` for a number that is below what it must be at least; None is left be.

    Args:
        args: parsed values.
        least: the bounds, by name.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise CommandLineError(f"--{name} is {value}; it must be at least {bound}")


def check_output_folder(path: str, flag: str, empty: bool = False) -> None:
    """A ``CommandLineError`` for a folder that cannot be written to; it is not made.

    Args:
        path: of the folder.
        flag: its name, for the error.
        empty: whether it must hold nothing yet.
    """
    # The nearest folder that exists is the one that new ones would be made in.
    folder = Path(path)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir():
        what = "is a file" if existing == folder.absolute() else f"{existing} is a file"
        raise CommandLineError(f"{flag} {shorten_text(path)}: {what}; give another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CommandLineError(f"{flag} {shorten_text(path)}: {existing} cannot be written to; give another folder")
    if empty and existing == folder.absolute() and any(existing.iterdir()):
        raise CommandLineError(
            f"{flag} {shorten_text(path)}: exists and is not an empty folder; choose another or remove it"
        )


# How a command ends.


def errors_of_users() -> tuple[type[Exception], ...]:
    """What a mistake of the user, or a disk, server or device that fails, raises.

    A RuntimeError is one only if ``is_out_of_memory``. The HTTP libraries' errors, where loaded, are no OSError.
    """
    # Looked up, not imported: a command that never asks a server should not load a library for it.
    servers = (sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)
    return ValueError, OSError, RuntimeError, *servers


def run_command(run: Callable[[], int | None]) -> int:
    """Run a command for a shell: a mistake of the user is one line on standard error, not a traceback.

    Args:
        run: what to do; an int that it returns is the exit status.

    Returns:
        The exit status: that of ``run`` or 0, 2 after an error of a flag, a file or the system, 130 after ^C. Other
        errors are faults of the program, and go on.
    """
    print_anything()
    try:
        return run() or 0
    except BrokenPipeError:  # The reader of the output, such as head, has seen enough; Python would write once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except errors_of_users() as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print(f"error: {explain_error(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return FAILED
