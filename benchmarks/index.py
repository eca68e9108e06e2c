"""What it takes to read a million samples for the first time, beside ``json.load`` of the same file.

    python benchmarks/index.py --output benchmarks/index.json

Captions of images are written as ``.json`` and as ``.jsonl``. Each file is read in processes that are started anew:
with ``json`` alone, which is what a list in memory costs; cold, which parses, checks and indexes it, on one core and
on two; and warm. "parent" and "children" are CPU seconds, which other work on a machine changes less than those of the
clock; "cpu_ratio" is all of them over those of ``json``. Beside "clock", which is what this machine took with
everything else that ran on it, stands "on_free_cores": what the busiest process has to do, but no less than all CPU
seconds shared among the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = ["il", "la", "un", "una", "gatto", "cane", "stella", "bambina", "strada", "mare", "sole", "verde", "rosso",
         "grande", "piccolo", "corre", "dorme", "guarda", "mangia", "gioca", "salta", "apre", "verso", "sopra",
         "sotto", "dentro", "davanti", "dietro", "con", "per", "è", "città"]  # fmt: skip


def write_files(folder: Path, num_samples: int) -> None:
    rng = random.Random(0)
    with (folder / "captions.jsonl").open("w") as lines, (folder / "captions.json").open("w") as file:
        file.write("[")
        for number in range(num_samples):
            sample = {
                "id": f"{number:08d}",
                "image": f"{number % 1000:04d}/{number:09d}.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescrivi l'immagine."},
                    {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(5, 25)))},
                ],
            }
            line = json.dumps(sample, ensure_ascii=False)
            lines.write(line + "\n")
            file.write((",\n" if number else "") + line)
        file.write("]\n")


def read(path: Path, how: str) -> dict[str, Any]:
    """In a process of its own: read a file with ``json``, or through the index in the folder beside it."""
    from llava.data.records import read_records

    if how != "json":
        import datasets  # noqa: F401

    clock, start = time.perf_counter(), time.process_time()
    if how == "json":
        with path.open() as file:
            found = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]
    else:
        found = read_records(str(path), cache_dir=str(path.parent / "cache"))
    parent = time.process_time() - start
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "samples": len(found),
        "clock": time.perf_counter() - clock,
        "parent": parent,
        "children": children.ru_utime + children.ru_stime,
        "parent_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "child_mb": children.ru_maxrss / 1024,
    }
    return {name: round(value, 3) for name, value in result.items()}


def measure(path: Path, how: str, num_cores: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--read", str(path), "--how", how, "--cores", str(num_cores)]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)


def compare(path: Path, repeats: int) -> dict[str, Any]:
    """The best of each of some ways to read a file, in alternation."""
    rounds: dict[str, list[dict[str, Any]]] = {"json": [], "cold, 1 core": [], "cold, 2 cores": [], "warm": []}
    for _ in range(repeats):
        for name, found in rounds.items():
            if name.startswith("cold"):
                for old in (path.parent / "cache").glob("*"):
                    old.unlink()
            found.append(measure(path, name.split(",")[0], 1 if name != "cold, 2 cores" else 2))
    best = {name: min(found, key=lambda one: one["parent"] + one["children"]) for name, found in rounds.items()}
    plain = best["json"]["parent"]
    for name, one in best.items():
        total = one["parent"] + one["children"]
        free = max(one["parent"], total / (2 if name == "cold, 2 cores" else 1))
        one |= {
            "cpu_ratio": round(total / plain, 2),
            "on_free_cores": round(free, 2),
            "ratio_on_free_cores": round(free / plain, 2),
        }
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
        print(json.dumps(read(args.read, args.how)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, args.samples)
        (folder / "cache").mkdir(mode=0o700)
        result = {
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "load": round(os.getloadavg()[0], 1),
            "files": {
                kind: {"mb": round((folder / f"captions{kind}").stat().st_size / 2**20)}
                | compare(folder / f"captions{kind}", args.repeats)
                for kind in (".jsonl", ".json")
            },
        }
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
