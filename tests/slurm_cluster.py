"""A cluster of this machine alone: ``srun``, ``scontrol`` and ``sbatch`` as far as the scripts here use them.

``srun`` starts a process a node and hands SIGUSR1 on to all of them; ``scontrol`` tells host names and notes what is
requeued; ``sbatch`` runs a script at once, each task of an array after the other, and again what was requeued.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = """#!/bin/bash
echo "srun $*" >> "$CLUSTER/calls"
while [[ $1 == -* ]]; do
    case $1 in
        --nodes) nodes=$2; shift 2 ;;
        --*=*) shift ;;
        *) shift 2 ;;
    esac
done
pids=()
hand_on() { echo "signal" >> "$CLUSTER/calls"; kill -USR1 "${pids[@]}"; }
trap hand_on USR1
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    while kill -0 "$pid" 2>/dev/null; do status=0; wait "$pid" || status=$?; done
    ((status <= highest)) || highest=$status
done
exit $highest
"""

SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CLUSTER/calls"
if [[ $1 == requeue ]]; then exit "${REQUEUE_STATUS:-0}"; fi
[[ $3 == "node[0-1]" ]] || { echo "Invalid hostlist $3" >&2; exit 1; }
printf 'localhost\\n127.0.0.1\\n'
"""

SBATCH = """#!{python} -IS
import os, re, shlex, subprocess, sys

cluster = os.environ["CLUSTER"]
words = sys.argv[1:]
with open(cluster + "/calls", "a") as calls:
    print("sbatch", *words, file=calls)
while words[0].startswith("-"):
    words.pop(0)
given = re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", open(words[0]).read(), re.M)
# As sbatch reads it: a blank ends a value, and behind # is a comment, but for what is quoted.
options = {{name: shlex.split(value, comments=True)[0] for name, value in given}}
number = 100 + sum(line.startswith("sbatch") for line in open(cluster + "/calls"))
for task in options["array"].split(",") if "array" in options else [None]:
    environment = {{**os.environ, "SLURM_JOB_ID": str(number * 10 + int(task or 0)), "SLURM_JOB_NUM_NODES": "1"}}
    name = str(number)
    if task is not None:
        environment |= {{"SLURM_ARRAY_JOB_ID": name, "SLURM_ARRAY_TASK_ID": task}}
        name += "_" + task
    named = {{"%A": str(number), "%a": str(task), "%j": str(number), "%%": "%"}}
    log = re.sub("%[Aaj%]", lambda found: named[found[0]], options["output"])
    for restart in range(3):
        before = open(cluster + "/calls").read().count("requeue " + name + "\\n")
        with open(log, "a" if options.get("open-mode") == "append" else "w") as file:
            subprocess.run(["bash", *words], stdout=file, stderr=file,
                           env={{**environment, "SLURM_RESTART_COUNT": str(restart)}})
        if open(cluster + "/calls").read().count("requeue " + name + "\\n") == before:
            break
print(number)
"""


class Cluster:
    """The programs in a folder, and what they were called with.

    Attributes:
        folder: of the programs.
        environment: with which scripts find these programs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls = folder, folder / "calls"
        self._calls.touch()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH.format(python=sys.executable))):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = {**kept, "CLUSTER": str(folder), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

    def job(self, number: int, restart: int = 0) -> dict[str, str]:
        """The environment of a job on two nodes."""
        return {
            **self.environment, "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_RESTART_COUNT": str(restart),
        }  # fmt: skip

    @property
    def calls(self) -> list[str]:
        """A line for each call of a program, and ``signal`` for one that srun has handed on."""
        return self._calls.read_text().splitlines()
