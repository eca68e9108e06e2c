"""A study as a Slurm array: a script with a task for each cell, one for the table behind it, and ``sbatch``."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.study.plan import Cell, Study
from llava.io import write_text
from llava.messages import shorten_text

ARRAY, TABLE = "study.sbatch", "table.sbatch"
_OF_TABLE = ("account", "partition", "qos", "reservation", "mail-user", "mail-type")
"""Options of ``slurm`` that the table's job has as well: it needs no GPU, and minutes."""


def write_scripts(study: Study, cells: Sequence[Cell], named: bool, changed: Sequence[str], submit: bool) -> None:
    """Write the scripts, and say or do what starts them.

    Args:
        named: whether ``--output_dir`` was given.
        changed: what ``--set`` was given.
        submit: whether to hand them to ``sbatch``.

    Raises:
        ValueError: the options make no sense for an array of cells, or ``sbatch`` refuses.
    """
    if study.slurm.get("nodes", "1") != "1":
        raise ValueError(
            f"{study.path}: slurm: nodes is {study.slurm['nodes']}, but a cell is trained on one node; leave it out, "
            "and give its number of ranks by 'processes'"
        )
    words = [sys.executable, "-m", "llava.eval.study", str(study.path)]
    words += ["--output_dir", str(study.output_dir)] if named else []
    words += ["--set", *changed] if changed else []
    array, table = study.output_dir / ARRAY, study.output_dir / TABLE
    array.parent.mkdir(parents=True, exist_ok=True)
    # Training saves a checkpoint on SIGUSR1 and leaves with 85; the task is requeued and goes on with it.
    options = {"job-name": study.path.stem, "signal": "B:USR1@120", "requeue": "", "open-mode": "append", **study.slurm}
    options["array"] = ",".join(str(cell.number) for cell in cells)
    logs = str(study.output_dir).replace("%", "%%")  # Behind a single one Slurm reads a letter of its own.
    options.setdefault("output", f"{logs}/slurm-%A_%a.out")
    task = [words[0], "-m", "llava.train.slurm", *words[1:]]
    write_text(array, _script(options, f'exec {shlex.join(task)} --cell "$SLURM_ARRAY_TASK_ID"'))
    options = {"job-name": f"{study.path.stem}-table", "time": "00:15:00"}
    options |= {name: study.slurm[name] for name in _OF_TABLE if name in study.slurm}
    options["output"] = f"{logs}/slurm-table-%j.out"
    write_text(table, _script(options, f"exec {shlex.join(words)} --table --over"))
    if not submit:
        of_array, of_table = (shlex.quote(str(script)) for script in (array, table))
        print(f"array=$(sbatch --parsable {of_array}) && sbatch --dependency=afterany:$array {of_table}")
        return
    number = _sbatch("--parsable", str(array)).partition(";")[0]  # Behind it a cluster may be named.
    last = _sbatch("--parsable", f"--dependency=afterany:{number}", str(table)).partition(";")[0]
    told = f"{study.output_dir}/slurm-table-{last}.out"
    print(f"job {number}: {len(cells)} cells; job {last}: the table behind them, in {told}")


def _script(options: dict[str, str], command: str) -> str:
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={_quote(value)}" if value else f"#SBATCH --{name}" for name, value in options.items()]
    return "\n".join([*lines, f"cd {shlex.quote(str(Path.cwd()))}", command]) + "\n"


def _quote(value: str) -> str:
    """A value as sbatch reads it in a script: a blank would end it, and what is behind # would be left out."""
    if not re.search(r"""[\s#"'\\]""", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _sbatch(*words: str) -> str:
    """What ``sbatch`` says, the number of the job."""
    try:
        told = subprocess.run(["sbatch", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"--submit: sbatch cannot be started: {error}; --sbatch writes the scripts alone") from error
    if told.returncode or not told.stdout.strip():
        raise ValueError(
            f"sbatch {shlex.join(words)}: {shorten_text(told.stderr.strip() or 'no number of a job', 300)}"
        )
    return told.stdout.strip().splitlines()[-1]
