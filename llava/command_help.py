"""The help of a command: its usage in one line, its flags by topic, and examples."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence

from llava.commands import TOPICS, find_program

MANY = 8
"""So many flags are too many for one line and one list."""
_WIDTH = 110


def short_usage(program: str, actions: Sequence[argparse.Action], required: Collection[argparse.Action]) -> str | None:
    """What must be given to a command, where all flags would fill a screen; None where they would not."""
    optional = [action for action in actions if action.option_strings and action not in required]
    if len(optional) < MANY:
        return None
    needed = [action for action in actions if action.option_strings and action in required]
    places = [action for action in actions if not action.option_strings]
    words = [program, *map(_show, needed), *map(_show, places), "[--FLAG VALUE ...]"]
    return " ".join(words).replace("%", "%%")


def _show(action: argparse.Action) -> str:
    """A flag or a place with its value."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    value = str(action.metavar or choices or (action.dest.upper() if action.option_strings else action.dest))
    value = {"+": f"{value} [{value} ...]", "*": f"[{value} ...]", "?": f"[{value}]", 0: ""}.get(
        action.nargs or 1, value
    )
    return f"{action.option_strings[0]} {value}".strip() if action.option_strings else value


def by_topic(
    actions: Sequence[argparse.Action], required: Collection[argparse.Action]
) -> dict[str, list[argparse.Action]]:
    """The flags of a command under headings; where they are few, under one."""
    if len(actions) < MANY:
        return {"options": list(actions)}
    parts: dict[str, list[argparse.Action]] = {title: [] for title in ("required", "options", *TOPICS)}
    topic_of = {name: title for title, names in TOPICS.items() for name in names}
    for action in actions:
        name = action.option_strings[0].lstrip("-")
        parts["required" if action in required else topic_of.get(name, "options")].append(action)
    return {title: part for title, part in parts.items() if part}


def find_examples(program: str) -> list[str]:
    """What stands behind a program in its examples; of a command within it, such as ``build``, behind that."""
    words = program.split(" ")
    for length in range(len(words), 1, -1):
        if (command := find_program(" ".join(words[:length]))) is not None:
            start = " ".join([*words[length:], ""])
            return [example[len(start) :] for example in command.examples if example.startswith(start)]
    return []


def wrap_command(line: str) -> str:
    """A long command line on several lines, broken before flags."""
    lines = [""]
    for part in re.split(r" (?=--?\w)", line):
        if lines[-1] and len(lines[-1]) + len(part) > _WIDTH:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


def examples_text(program: str) -> str:
    """The end of a command's help: its examples, or nothing."""
    lines = [f"  {wrap_command(f'{program} {example}'.strip())}\n" for example in find_examples(program)]
    return "\nexamples:\n" + "".join(lines) if lines else ""
