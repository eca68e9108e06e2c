"""The command `llava`, also `python -m llava`: finds the command that is meant, and hands it the words behind it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from llava.commands import COMMANDS, PROGRAM, find_command, load_start

_ABOUT = "Train, look at, score and use small vision- and video-language models."
_FAILED = 2
"""Exit status of a mistake, as that of all commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, or 2 with one line on standard error where there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(describe_commands(), end="", file=sys.stderr)
        return _FAILED
    if words[0] == "help":  # `llava help train` is `llava train --help`.
        words = [*words[1:], "--help"]
    if words[0] in ("-h", "--help"):
        print(describe_commands(), end="")
        return 0
    if words[0] in ("-V", "--version"):
        return print_version()
    found = find_command(words)
    if found is None:
        return answer_family(words)
    command, rest = found
    # Not before it is known what is asked for: it takes its time, and `llava --help` needs none of it.
    from llava.command import run_command, started_as

    with started_as(command.program, command.name):
        return run_command(lambda: load_start(command)(rest))


def describe_commands() -> str:
    """What `llava --help` prints: all commands, by groups."""
    lines = [f"usage: {PROGRAM} COMMAND [WORDS ...]", "", _ABOUT]
    width = max(len(command.name) for command in COMMANDS)
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines += ["", f"{group}:"]
        lines += [f"  {one.name:{width}}  {one.summary}" for one in COMMANDS if one.group == group]
    lines += [
        "",
        f"`{PROGRAM} COMMAND --help` has the flags of a command, and examples. Completion by TAB, in bash:",
        f'  eval "$({PROGRAM} completion bash)"',
    ]
    return "\n".join(lines) + "\n"


def print_version() -> int:
    """Print the version that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"{PROGRAM} {version('llava-babylm')}")
    except PackageNotFoundError:
        print(f"{PROGRAM}, not installed: run from its source")
    return 0


def answer_family(words: Sequence[str]) -> int:
    """For words that are no command, but may be the first of one: what there is, or what comes near it."""
    family = [command for command in COMMANDS if command.name.startswith(f"{words[0].replace('_', '-')} ")]
    names = [command.name for command in family or COMMANDS]
    if family and (len(words) == 1 or words[1] in ("-h", "--help")):
        asked = len(words) > 1
        lines = [f"usage: {PROGRAM} {words[0]} COMMAND [WORDS ...]", ""]
        lines += [f"  {command.name}  {command.summary}" for command in family]
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else _FAILED
    meant = " ".join(words[:2]) if family else words[0]
    near = difflib.get_close_matches(meant, names, n=1, cutoff=0.5) or difflib.get_close_matches(
        words[0], [name.split()[0] for name in names], n=1, cutoff=0.5
    )
    what = f"did you mean {near[0]}?" if near else f"see {PROGRAM} --help"
    print(f"error: unknown command {meant!r}; {what}", file=sys.stderr)
    return _FAILED


if __name__ == "__main__":
    sys.exit(main())
