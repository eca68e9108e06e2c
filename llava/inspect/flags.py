"""``python -m llava.inspect.flags``: what each flag of transformers, and of the LLaVA family, does here, in Markdown.

``docs/flags.md`` is its output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.command import CommandParser, run_command
from llava.inspect import table
from llava.train import family_flags as family
from llava.train.flag_tests import TESTS
from llava.train.transformers_flags import FLAGS, NO_EFFECT, REFUSED, TOPICS, WORKS

HEAD = """\
# Flags of transformers

What each field of transformers' `TrainingArguments` does in `python -m llava.train.train`, for every release that this
library is tested with. `make docs` writes this page from the table that the flags are checked with, by
`python -m llava.inspect.flags`. The library's own flags are in `--help`.
"""


def describe_flags() -> str:
    """All tables, as one page."""
    sections = [HEAD, "## Flags that work\n"]
    for topic, flags in TOPICS.items():
        works = [
            (show(name), flag.note, "; ".join(refusal.reason for refusal in flag.refusals), f"`{TESTS[name]}`")
            for name, flag in flags.items()
            if flag.effect == WORKS
        ]
        sections.append(f"### {topic.capitalize()}\n\n{table(('flag', 'what', 'refused otherwise', 'test'), works)}")
    for title, effect, meaning in (
        ("Flags that are refused", REFUSED, "Any value but the default is an error."),
        ("Flags without effect", NO_EFFECT, "A warning says so where one is given."),
    ):
        rows = [(show(name), flag.note) for name, flag in FLAGS.items() if flag.effect == effect]
        sections.append(f"## {title}\n\n{meaning}\n\n{table(('flag', 'because'), rows)}")
    return "\n".join([*sections, describe_optimizers(), describe_family()])


def show(name: str) -> str:
    """A flag as the tables give it."""
    since = FLAGS[name].since
    return f"`--{name}`" + (f" (from transformers {since})" if since else "")


def describe_optimizers() -> str:
    """Every optimizer that ``--optim`` names."""
    from llava.train.engines import OPTIMIZERS, OptimizerRule

    together: dict[OptimizerRule, list[str]] = {}
    for optimizer, rule in OPTIMIZERS.items():
        # Optimizers with the same rules share a line.
        together.setdefault(rule, []).append(f"`{optimizer}`")
    rows = []
    for rule, names in together.items():
        needs = f"needs `{rule.package[0]}`" if rule.package else "works"
        arguments = ", ".join(f"`{argument}`" for argument in rule.arguments)
        rows.append((", ".join(names), f"refused: {rule.refused}" if rule.refused else needs, arguments))
    return f"""\
## `--optim`

All that work run over the same groups: a learning rate for each part, weight decay for matrices alone. Those of 8 bits
keep the state of embeddings in 32.

{table(("optimizer", "", "`--optim_args`"), rows)}"""


def describe_family() -> str:
    """What becomes of the flags and variables of LLaVA, LLaVA-NeXT, LLaVA-ST and its fork for BabyLM."""
    rows = [(f"`--{name}`", f"`--{new}`") for name, new in family.RENAMED.items()]
    rows += [(f"`--{name} {old}`", f"`{new}`") for name, known in family.VALUES.items() for old, new in known.items()]
    rows += [(f"`--{name}`", f"`--mm_tunable_parts` {what}") for name, what in family.PARTS_SWITCHES.items()]
    rows += [(f"`--{name}`", f"`--train_sampling_strategy {value}`") for name, value in family.GROUPING.items()]
    rows += [(f"`--{name}`", what) for name, what in family.FRAMES.items()]
    rows += [(f"`--deepspeed .../{name}.json`", f"`--deepspeed {ours}`") for name, ours in family.DEEPSPEED.items()]
    gone = [
        (
            f"`--{name}`",
            "all" if flag.accepted is None else ", ".join(filter(None, flag.accepted)),
            flag.note,
            flag.instead,
        )
        for name, flag in family.WITHOUT_EFFECT.items()
    ]
    variables = [(f"`{name}`", what) for name, what in family.ENVIRONMENT.items()]
    return f"""
## Flags of the LLaVA family

Those of LLaVA, LLaVA-NeXT, LLaVA-ST and its fork for BabyLM, and of transformers 4, that this library does not have.
What became of each is said once, before the run.

{table(("there", "here"), rows)}

These change nothing at the values that are accepted; another value is an error:

{table(("flag", "accepted", "because", "instead"), gone)}

## Variables of the environment

{table(("there", "here"), variables)}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page; there are no flags."""
    return run_command(lambda: print_flags(argv))


def print_flags(argv: Sequence[str] | None) -> None:
    """Print the page, where the command line asks for nothing else."""
    CommandParser(
        prog="python -m llava.inspect.flags", description="Print what each flag of transformers does, as Markdown."
    ).parse_args(argv)
    sys.stdout.write(describe_flags())


if __name__ == "__main__":
    sys.exit(main())
