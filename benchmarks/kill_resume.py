"""Kill -9 at random moments, and what `--resume_from_checkpoint auto` makes of it, on 1 and on 2 ranks.

A run without interruption comes first. Then one run a moment: all its processes are killed at a random
time between its first step and its end, it is started again, and its samples, its losses and its weights
are compared with those of the first, bit for bit. A save every other step takes a good part of that time;
the result names the folders that each kill left, a `tmp-` among them where it fell into a save.

    python benchmarks/kill_resume.py --output benchmarks/kill_resume.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from llava.demo.common import TOWER_FOLDER, write_base_model
from llava.demo.dataset import read_captions, write_dataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from runs import losses, read_record, trained_on  # noqa: E402

STEPS = 24


def start(flags: Sequence[str], output: Path, ranks: int) -> subprocess.Popen[bytes]:
    """Start a recorded run, in a session of its own."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    output.mkdir(parents=True, exist_ok=True)
    command = [*launcher, str(ROOT / "tests" / "faults" / "runs.py"), str(output), *flags, "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (output / "said").open("ab") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    if process.wait(timeout=600):
        raise RuntimeError(f"the run ended with {process.returncode}:\n{(output / 'said').read_text()[-3000:]}")


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill every process of a run at once; torchrun gives its ranks sessions of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, children), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def duration(output: Path) -> float:
    """Seconds from a run's first step to its end."""
    return (output / "trainer_state.json").stat().st_mtime - first_step(output)


def first_step(output: Path) -> float:
    return read_record(output)[-1][0]["time"]


def await_first_step(output: Path, process: subprocess.Popen[bytes], before: int) -> None:
    while process.poll() is None:
        starts = read_record(output)
        if len(starts) > before and starts[-1]:
            return
        time.sleep(0.01)
    raise RuntimeError(f"the run ended before its first step:\n{(output / 'said').read_text()[-3000:]}")


def interrupt(flags: Sequence[str], output: Path, ranks: int, delay: float) -> dict[str, Any]:
    """Run, kill after ``delay`` seconds from the first step, and run again."""
    process = start(flags, output, ranks)
    await_first_step(output, process, before=0)
    time.sleep(delay)
    kill_all(process)
    left = {
        "seconds": round(delay, 3),
        "steps_begun": read_record(output)[0][-1]["step"] + 1,
        "folders": sorted(path.name for path in output.iterdir() if path.is_dir()),
    }
    finish(start(flags, output, ranks), output)
    resumed = read_record(output)[1]
    return left | {"resumed_at": resumed[0]["step"] if resumed else STEPS}


def compare(output: Path, whole: Path, ranks: int) -> dict[str, bool]:
    one, other = (load_file(folder / "model.safetensors") for folder in (output, whole))
    return {
        "same_samples": all(trained_on(output, rank) == trained_on(whole, rank) for rank in range(ranks)),
        "same_losses": losses(output) == losses(whole),
        "same_weights": all(torch.equal(one[name], other[name]) for name in one),
    }


def make_run(folder: Path, ranks: int) -> list[str]:
    """The command line of a small run on clips and texts, without its output folder."""
    data = write_dataset(folder, seed=0, num_train_clips=12, num_held_out_clips=1)
    write_base_model(folder / "base_model", read_captions(data.text), seed=0)
    texts, clips = (json.loads(path.read_text(encoding="utf-8")) for path in (data.text, data.train))
    mixed = folder / "mixed.json"
    mixed.write_text(json.dumps(texts[:15] + clips), encoding="utf-8")
    values = {
        "config": "demo_video.yaml", "model_name_or_path": folder / "base_model", "vision_tower": TOWER_FOLDER,
        "save_vision_tower": "false", "data_path": mixed, "max_steps": STEPS, "logging_steps": 3,
        "per_device_train_batch_size": 4 // ranks, "dataloader_num_workers": 0, "save_strategy": "steps",
        "save_steps": 2, "save_total_limit": 2, "use_cpu": "true", "disable_tqdm": "true",
        "resume_from_checkpoint": "auto",
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def measure(folder: Path, ranks: Sequence[int], kills: int, seed: int) -> dict[str, Any]:
    """Interrupt a run on each number of ranks, so often."""
    report: dict[str, Any] = {
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()},
        "transformers": transformers.__version__,
        "steps": STEPS,
        "kills": {},
    }
    moments = random.Random(seed)
    for count in ranks:
        place = folder / str(count)
        flags, whole = make_run(place, count), place / "whole"
        finish(start(flags, whole, count), whole)
        results = report["kills"][f"{count} ranks"] = []
        for number in range(kills):
            output = place / str(number)
            result = interrupt(flags, output, count, moments.uniform(0, duration(whole)))
            results.append(result | compare(output, whole, count))
            print(f"{count} ranks, kill {number + 1}: {results[-1]}", flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="moments for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), args.ranks, args.kills, args.seed)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    good = all(
        run[name] for runs in report["kills"].values() for run in runs for name in run if name.startswith("same")
    )
    print("every resumed run equals the whole one" if good else "a resumed run DIFFERS")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
