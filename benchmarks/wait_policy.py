"""What it costs and saves that torch's threads sleep while they wait for each other (``OMP_WAIT_POLICY=passive``).

    python benchmarks/wait_policy.py --output benchmarks/wait_policy.json

Without the variable the threads of GNU OpenMP spin for a while before they sleep. On a machine of their own that saves
a few microseconds at each parallel part; where another process wants a core, threads spin for one that cannot run.

A process for each policy works a moment at a time, in turns with the others, which sleep: alone on the machine, and
beside one process that does nothing but count. Figures are medians over rounds, ratios those within a round. Three
kinds of work:

- products: 40 products of small matrices,
- demo: a training step (forward, backward, AdamW) of a language model of the demos' size,
- recipe: the same of a GPT-2 of 12 layers x 768.

``others`` is how many cores processes beside ours used meanwhile. Moments of the idle half in which it is above
``--most_others`` say nothing and are left out: on a machine that others use too it waits for quiet ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

POLICIES: dict[str, dict[str, str]] = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
WORK = ("products", "demo", "recipe")
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
Round = dict[str, tuple[float, float]]
"""Milliseconds by policy, and the cores that other processes used meanwhile."""


def build_work(name: str) -> Callable[[], object]:
    """A piece of work to repeat."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if name == "products":
        a, b = torch.randn(192, 192), torch.randn(192, 192)
        return lambda: [a @ b for _ in range(40)]
    if name == "demo":
        sizes, rows, length = {"vocab_size": 512, "n_embd": 128, "n_layer": 4, "n_head": 4}, 16, 64
    else:
        sizes, rows, length = {"vocab_size": 30_000, "n_embd": 768, "n_layer": 12, "n_head": 12}, 1, 64
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(sizes["vocab_size"], (rows, length))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve() -> None:
    """In a process of its own: answer each line, a kind of work and seconds, with the milliseconds of every repeat."""
    works = {name: build_work(name) for name in WORK}
    for run in works.values():
        for _ in range(3):
            run()
    print("ready", flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while time.perf_counter() < end or len(times) < 2:
            start = time.perf_counter()
            works[name]()
            times.append(1000 * (time.perf_counter() - start))
        print(json.dumps(times), flush=True)


class Worker:
    """A process with a policy, which works when it is told to and sleeps meanwhile."""

    def __init__(self, policy: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | POLICIES[policy]
        words = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._reply() == "ready"

    def _reply(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def measure(self, name: str, seconds: float) -> tuple[float, float]:
        """Median milliseconds of a kind of work, and the cores that other processes used meanwhile."""
        assert self.process.stdin is not None
        time.sleep(0.05)
        mine = psutil.Process(self.process.pid)
        start, busy, own = time.perf_counter(), busy_seconds(), sum(mine.cpu_times()[:2])
        self.process.stdin.write(f"{name} {seconds}\n")
        times = json.loads(self._reply())
        elapsed = time.perf_counter() - start
        others = busy_seconds() - busy - (sum(mine.cpu_times()[:2]) - own)
        return statistics.median(times), max(others, 0.0) / elapsed


def busy_seconds() -> float:
    """Seconds that all cores have worked since the machine was started."""
    times = psutil.cpu_times()
    return sum(times[:7]) - times.idle - getattr(times, "iowait", 0.0)


def measure_round(workers: dict[str, Worker], order: Sequence[str], name: str, args: argparse.Namespace) -> Round:
    """A kind of work with every policy, one right behind the other."""
    return {policy: workers[policy].measure(name, args.seconds) for policy in order}


def measure_all(workers: dict[str, Worker], beside: bool, args: argparse.Namespace) -> dict[str, list[Round]]:
    """Rounds of each kind of work that nothing else disturbed, as many as are wanted or the patience allows."""
    kept: dict[str, list[Round]] = {name: [] for name in WORK}
    counting = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
    most = float("inf") if beside else args.most_others  # Busier than busy is busy all the same.
    end, turn = time.monotonic() + args.patience, 0
    try:
        while time.monotonic() < end and (wanted := [name for name in WORK if len(kept[name]) < args.rounds]):
            name, turn = wanted[turn % len(wanted)], turn + 1
            if not beside and cores_used(0.2) > args.most_others:  # Not worth a try.
                continue
            one = measure_round(workers, list(workers)[:: 1 if turn % 2 else -1], name, args)
            if max(others for _, others in one.values()) <= most:
                kept[name].append(one)
                print(
                    name, {policy: round(value, 2) for policy, (value, _) in one.items()}, file=sys.stderr, flush=True
                )
    finally:
        if counting is not None:
            counting.kill()
            counting.wait()
    return kept


def cores_used(seconds: float) -> float:
    """Cores that all processes use at the moment."""
    busy = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - busy) / seconds


def summarise(kept: dict[str, list[Round]]) -> dict[str, Any]:
    """Medians, and each policy over the default within a round."""
    result: dict[str, Any] = {}
    for name, rounds in kept.items():
        others = [used for one in rounds for _, used in one.values()]
        result[name] = {"rounds": len(rounds), "others": round(statistics.median(others), 2) if others else None}
        for policy in rounds[0] if rounds else ():
            ratios = [one[policy][0] / one["default"][0] for one in rounds]
            result[name][policy] = {
                "ms": round(statistics.median(one[policy][0] for one in rounds), 3),
                "over_default": round(statistics.median(ratios), 3),
            }
    return result


def describe_machine() -> dict[str, object]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else "", "cores": os.cpu_count(), "torch": torch.__version__}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each kind of work in a round")
    parser.add_argument("--most_others", type=float, default=0.1)
    parser.add_argument(
        "--patience", type=float, default=600.0, help="seconds to wait for quiet moments, for each half"
    )
    parser.add_argument("--half", choices=["beside", "idle"], help="measure this one alone, and keep the file's other")
    parser.add_argument("--spin", nargs="*", default=[], metavar="N", help="also with GOMP_SPINCOUNT=N")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    if args.serve:
        serve()
        return
    POLICIES.update({f"spin{count}": {"GOMP_SPINCOUNT": count} for count in args.spin})
    workers = {policy: Worker(policy) for policy in POLICIES}
    report: dict[str, Any] = {"machine": describe_machine(), "seconds": args.seconds, "most_others": args.most_others}
    if args.output is not None and args.output.is_file():  # The other half, from an earlier run.
        report = json.loads(args.output.read_text()) | report
    for kind, beside in (("beside a busy process", True), ("idle", False)):
        if args.half not in (None, kind.split()[0]):
            continue
        report[kind] = summarise(measure_all(workers, beside, args))
        print(f"{kind}: {json.dumps(report[kind])}", flush=True)
    for worker in workers.values():
        worker.process.kill()
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
