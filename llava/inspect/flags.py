"""``python -m llava.inspect.flags``: what each flag of transformers does here, as tables in Markdown.

``docs/flags.md`` is its output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llava.train.engines import OPTIMIZERS, OptimizerRule
from llava.train.transformers_flags import FLAGS, NO_EFFECT, REFUSED, WORKS, Flag

HEAD = """\
# Flags of transformers

What each field of transformers' `TrainingArguments` does in `python -m llava.train.train`, for every release that this
library is tested with. `make docs` writes this page from the table that the flags are checked with, by
`python -m llava.inspect.flags`. The library's own flags are in `--help`.
"""


def describe_flags() -> str:
    """All tables, as one page."""
    works = [(show(name), flag.note, "; ".join(r.reason for r in flag.refusals)) for name, flag in that(WORKS)]
    refused = [(show(name), flag.note) for name, flag in that(REFUSED)]
    idle = [(show(name), flag.note) for name, flag in that(NO_EFFECT)]
    sections = [
        HEAD,
        f"## That work\n\n{table(('flag', 'what', 'refused otherwise'), works)}",
        f"## That are refused\n\nAny value but the default is an error.\n\n{table(('flag', 'because'), refused)}",
        f"## Without effect\n\nA warning says so where one is given.\n\n{table(('flag', 'because'), idle)}",
        describe_optimizers(),
    ]
    return "\n".join(sections)


def that(effect: str) -> list[tuple[str, Flag]]:
    """The flags of an effect, with their names."""
    return [(name, flag) for name, flag in FLAGS.items() if flag.effect == effect]


def show(name: str) -> str:
    """A flag as the tables give it."""
    since = FLAGS[name].since
    return f"`--{name}`" + (f" (from transformers {since})" if since else "")


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


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(describe_flags())
