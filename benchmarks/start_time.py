"""CPU seconds that `llava` and each of its commands take to answer ``--help``, and of some other beginnings.

python benchmarks/start_time.py --out benchmarks/start_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from llava.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {
    "llava --help": ["llava", "--help"],
    "llava cache build --help": ["llava", "cache", "build", "--help"],
    "llava completion words train --": ["llava", "completion", "words", "train", "--"],
    "llava, an unknown command": ["llava", "trian"],
    "llava train, a wrong flag": ["llava", "train", "--leraning_rate", "1"],
    "python -m llava.train.train --help": ["llava.train.train", "--help"],
    "python -m llava.data.check --help": ["llava.data.check", "--help"],
    "import llava.model": ["-c", "import llava.model"],
}
MEASURED = OTHERS | {f"llava {one.name} --help": ["llava", *one.name.split(), "--help"] for one in COMMANDS}


def measure(words: list[str]) -> float:
    """CPU seconds of a command, its own and the system's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *(words if words[0] == "-c" else ["-m", *words])]
    subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the result, JSON")
    args = parser.parse_args()
    result = {name: round(min(measure(words) for _ in range(3)), 2) for name, words in MEASURED.items()}
    args.out.write_text(json.dumps({"cpu_seconds": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
