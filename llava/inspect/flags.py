"""``python -m llava.inspect.flags``: what each flag of transformers does here, as tables in Markdown.

``docs/flags.md`` is its output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.train.flags import FLAGS, NO_EFFECT, REFUSED, WORKS, Flag
from llava.train.optimizers import OPTIMIZERS, OptimizerRule

HEAD = """\
# Flags of transformers

What each field of transformers' `TrainingArguments` does in `python -m llava.train.train`, for every release that this
library is tested with. `make docs` writes this page from the table that the flags are checked with, by
`python -m llava.inspect.flags`. The library's own flags are in `--help`.
"""


def describe_flags() -> str:
    """All tables, as one page."""
    return "\n".join([HEAD, describe_working(), describe_refused(), describe_idle(), describe_optimizers()])


def describe_working() -> str:
    """The flags that work, with the values that are refused."""
    rows = [(name(flag), flag.note, bounds(flag)) for flag in FLAGS.values() if flag.effect == WORKS]
    return f"## That work\n\n{table(('flag', 'what', 'refused otherwise'), rows)}"


def describe_refused() -> str:
    """The flags that may only have their default."""
    rows = [(name(flag), flag.note) for flag in FLAGS.values() if flag.effect == REFUSED]
    return f"## That are refused\n\nAny value but the default is an error.\n\n{table(('flag', 'because'), rows)}"


def describe_idle() -> str:
    """The flags without effect."""
    rows = [(name(flag), flag.note) for flag in FLAGS.values() if flag.effect == NO_EFFECT]
    return f"## Without effect\n\nA warning says so where one is given.\n\n{table(('flag', 'because'), rows)}"


def describe_optimizers() -> str:
    """Every optimizer that ``--optim`` names."""
    together: dict[OptimizerRule, list[str]] = {}
    for optimizer, rule in OPTIMIZERS.items():
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


def name(flag: Flag) -> str:
    """A flag as the tables give it."""
    return f"`--{flag.name}`" + (f" (from transformers {flag.since})" if flag.since else "")


def bounds(flag: Flag) -> str:
    """What values of a flag must be."""
    return "; ".join(refusal.reason for refusal in flag.refusals)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(describe_flags())
