"""``llava completion SHELL``: a script that has a shell complete commands, flags, values and files by TAB.

The script asks ``llava completion words ...`` at every TAB: what fits is told by the parsers themselves, which load
nothing large. Answers are lines of a word, a tab and what it is; the line ``:files`` has the shell offer files as well.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava.command import CommandParser, find_parser, run_command, started_as
from llava.commands import COMMANDS, PROGRAM, Command, find_command, load_start

WORDS = "words"
FILES = (":files", "")
_WIDTH = 70
_TRUTH = ("true", "false")
_WITH_TRAINING = ("alternating", "cache build", "inspect")
"""Commands that take the flags of training as well."""
VALUES = {
    "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "deepspeed": ("zero1", "zero2", "zero3", "zero3_offload"),
    "image_aspect_ratio": ("square", "pad", "anyres"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"),
    "milestones": ("strict_small", "strict", "none"),
    "mm_projector_type": ("linear", "mlp2x_gelu", "pooler", "identity"),
    "mm_resampler_type": ("fast_slow_resampler", "perceiver", "qformer", "spatial_pool", "masked_drop", "none"),
    "on_bad_sample": ("error", "skip"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
    "resume_from_checkpoint": ("auto",),
    "score_tasks": ("italian", "none"),
    "stage": ("1", "2", "3"),
    "tasks": ("italian",),
    "task": ("caption", "elc", "rec", "stvg", "svg", "tvg"),
}
"""Values that are no argparse choices: of flags that take others too, or that are checked later."""

_OPEN = ("config", "deepspeed", "report_to", "resume_from_checkpoint")
"""Flags that take a file or a folder as well as the values that are known."""

Candidate = tuple[str, str]
"""A word, and what it is."""

BASH = r"""
_llava_complete() {
    local word answer current=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=()
    [[ $current == "=" ]] && current=""
    while IFS= read -r answer; do
        word=${answer%%$'\t'*}
        if [[ $word == ":files" ]]; then
            compopt -o filenames 2>/dev/null
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current")
        else
            COMPREPLY+=("$word")
        fi
    done < <("${COMP_WORDS[0]}" completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _llava_complete llava
"""
ZSH = r"""
_llava_complete() {
    local answer files=0
    local -a described
    while IFS= read -r answer; do
        if [[ ${answer%%$'\t'*} == ":files" ]]; then
            files=1
        else
            described+=("${${answer%%$'\t'*}//:/\\:}:${answer#*$'\t'}")
        fi
    done < <("${words[1]}" completion words "${(@)words[2,CURRENT]}" 2>/dev/null)
    (( ${#described} )) && _describe llava described
    if (( files )); then
        compset -P '*='
        _files
    fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _llava_complete llava
"""
FISH = r"""
function __llava_complete
    set -l words (commandline -opc) (commandline -ct)
    for answer in ($words[1] completion words $words[2..-1] 2>/dev/null)
        if string match -q ':files*' -- $answer
            __fish_complete_path (commandline -ct)
        else
            echo $answer
        end
    end
end
complete -c llava -f -a '(__llava_complete)'
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def complete(words: Sequence[str]) -> list[Candidate]:
    """What the last of the words behind ``llava`` may become.

    Args:
        words: what stands behind ``llava``, up to the cursor; the last one may be empty.
    """
    *before, current = _join(words) or [""]
    # bash hands `--flag=value` over as three words, of which it completes the last.
    is_split = len(words) > 1 and "=" in words[-2:]
    candidates = [*_find_candidates(before, current)]
    prefix = "" if is_split or "=" not in current else current.partition("=")[0] + "="
    start = current.partition("=")[2] if prefix or is_split else current
    unique = dict.fromkeys(one for one in candidates if one == FILES or one[0].startswith(start))
    return [one if one == FILES else (prefix + one[0], one[1]) for one in unique]


def _join(words: Sequence[str]) -> list[str]:
    """Words with ``--flag``, ``=`` and a value as one."""
    joined: list[str] = []
    for word in words:
        if joined and (word == "=" or (joined[-1].endswith("=") and joined[-1].startswith("--"))):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _find_candidates(before: Sequence[str], current: str) -> Iterator[Candidate]:
    family = [command for command in COMMANDS if command.name.split()[:-1] == list(before)]
    yield from ((command.name.split()[-1], command.summary) for command in family)
    if not before:
        for command in COMMANDS:
            first, _, second = command.name.partition(" ")
            if second and first not in (one.name for one in COMMANDS):
                yield first, "several commands"
        yield from (("--help", "all commands"), ("--version", "the version that is installed"))
    if (found := find_command(before)) is not None:
        yield from _of_command(*found, current)


def _of_command(command: Command, words: list[str], current: str) -> Iterator[Candidate]:
    """What may come next of a command that stands there with some words."""
    if command.name == "launch" and PROGRAM in words:  # The words of the command that is started.
        yield from _find_candidates(words[words.index(PROGRAM) + 1 :], current)
        return
    parser = _parser_of(command, [])
    names = [command.name]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            if not (words and words[0] in action.choices):
                yield from ((one.dest, one.help or "") for one in action._choices_actions)
                return
            parser = _parser_of(command, words[:1])
            names.append(words.pop(0))
    parsers = [parser]
    if " ".join(names) in _WITH_TRAINING and (training := find_command(["train"])) is not None:
        parsers.append(_parser_of(training[0], []))
    flags = {name: action for one in reversed(parsers) for name, action in one._option_string_actions.items()}
    flag, _, _ = current.partition("=")
    if "=" in current and flag in flags:
        yield from _values(flags[flag])
        return
    last = next((place for place in reversed(range(len(words))) if words[place] in flags), None)
    if last is not None and not current.startswith("-"):
        action, given = flags[words[last]], len(words) - last - 1
        takes = {None: 1, "?": 1, "+": sys.maxsize, "*": sys.maxsize}
        many = sys.maxsize if str(action.metavar).startswith("LIST") else 0  # So the help of training has them.
        if given < max(many, action.nargs if isinstance(action.nargs, int) else takes.get(action.nargs, 0)):
            yield from _values(action)
            return
    places = [action for action in parser._actions if not action.option_strings and action.dest != argparse.SUPPRESS]
    if not current.startswith("-"):
        for action in places:
            yield from _values(action)
    if current.startswith("-") or not places:
        used = {id(flags[word]) for word in words if word in flags and flags[word].nargs not in ("+", "*")}
        for action in dict.fromkeys(flags.values()):
            if action.help is argparse.SUPPRESS:
                continue
            if id(action) not in used or isinstance(action, argparse._AppendAction):
                yield action.option_strings[-1], _describe(action)


def _parser_of(command: Command, words: Sequence[str]) -> CommandParser:
    with started_as(command.program, command.name):
        return find_parser(load_start(command), words)


def _values(action: argparse.Action) -> Iterator[Candidate]:
    """What may stand behind a flag, or at a place."""
    kind = str(action.metavar)
    names = action.choices or VALUES.get(action.dest) or (_TRUTH if kind == "BOOL" or action.type is bool else ())
    if action.metavar == "NAME" and action.dest == "recipe":
        names = [path.stem for path in _recipes()]
    yield from ((str(name), "") for name in names)
    if action.dest == "config":
        yield from ((path.name, "recipe of llava") for path in _recipes())
    is_number = action.type in (int, float) or kind in ("INT", "FLOAT")
    if not (is_number or names) or action.dest in _OPEN:
        yield FILES


def _recipes() -> list[Path]:
    return sorted((Path(__file__).parent / "recipes").glob("*.yaml"))


def _describe(action: argparse.Action) -> str:
    text = " ".join((action.help or "").replace("%%", "%").split())
    text = re.split(r"[.;:] |\(default", text, maxsplit=1)[0].strip()
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3].rsplit(' ', 1)[0]}..."


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.completion",
        description=f"Print a script that has a shell complete the words behind {PROGRAM} by TAB.",
        epilog='In bash and zsh: eval "$(llava completion bash)"; in fish: llava completion fish | source.',
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script of a shell, or what completes some words; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [WORDS]:
        print(*("\t".join(candidate) for candidate in complete(words[1:])), sep="\n")
        return 0

    def run() -> None:
        print(SHELLS[build_parser().parse_args(words).shell].strip())

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
