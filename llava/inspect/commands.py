"""`python -m llava.inspect.commands`: all commands of `llava`, with their modules and examples, as tables in Markdown.

``docs/commands.md`` is its output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.command import CommandParser, run_command
from llava.command_help import wrap_command
from llava.commands import COMMANDS, OTHER_NAMES, PROGRAM
from llava.inspect import table

HEAD = """\
# Commands

`pip install` puts `llava` on the path. `llava COMMAND` is `python -m MODULE`, with the same flags, and each of both can
be used wherever the documents show the other. `llava --help` lists the commands, `llava COMMAND --help` has the flags
of one by topic, and examples; neither loads torch (`benchmarks/start_time.json`). An unknown command or flag is a line
that names what comes near it, and exit status 2. `make docs` writes this page, by `python -m llava.inspect.commands`.
"""
SAME = """
## The same flag under other names

A flag means the same in every command that has it. Where commands call one thing by several names, each takes all of
these, here with the name that `--help` of most has first; a dash in place of an underscore is no difference.

"""
BY_PLACE = """
What has its place on the command line may be given by its flag too: `llava check --data_path captions.json` is
`llava check captions.json`, `llava export --model_path output/run --output_dir output/exported --as text` is
`llava export output/run output/exported --as text`.
"""
TORCHRUN = """
Under torchrun a command is a module: `torchrun --nproc_per_node 4 -m llava train ...`, or with `llava launch`, whose
ranks can be asked to stop.
"""
COMPLETION = """
## Completion

TAB completes commands, flags, values and files. In bash or zsh, for this shell or in `~/.bashrc` or `~/.zshrc`:

```bash
eval "$(llava completion bash)"
```

```zsh
eval "$(llava completion zsh)"
```

In fish:

```fish
llava completion fish > ~/.config/fish/completions/llava.fish
```

The script asks the installed `llava` at every TAB, so that it is never older than the flags.
"""


def describe_commands() -> str:
    """The whole page."""
    parts = [HEAD]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        of_group = [command for command in COMMANDS if command.group == group]
        rows = [(f"`{PROGRAM} {one.name}`", f"`{one.module}`", one.summary) for one in of_group]
        parts.append(f"\n## {group}\n\n{table(('command', 'module', 'what it does'), rows)}\n```bash\n")
        parts += [
            f"{wrap_command(f'{PROGRAM} {one.name} {text}'.strip())}\n" for one in of_group for text in one.examples
        ]
        parts.append("```\n")
    groups = dict.fromkeys(tuple(sorted((name, *others))) for name, others in OTHER_NAMES.items())
    first = {group: next(name for name in OTHER_NAMES if name in group) for group in groups}
    rows = [
        (f"`{first[group]}`", ", ".join(f"`{name}`" for name in group if name != first[group]), "") for group in groups
    ]
    parts += [TORCHRUN, SAME, table(("flag", "also"), [row[:2] for row in rows]), BY_PLACE]
    parts.append(COMPLETION)
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; there are no flags."""
    return run_command(lambda: print_commands(argv))


def print_commands(argv: Sequence[str] | None) -> None:
    """Print the page, where the command line asks for nothing else."""
    CommandParser(
        prog="python -m llava.inspect.commands", description="Print all commands, with their modules, as Markdown."
    ).parse_args(argv)
    sys.stdout.write(describe_commands())


if __name__ == "__main__":
    sys.exit(main())
