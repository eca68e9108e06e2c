"""What workers gain ``python -m llava.data.check``: the same data with one, two, four ... of them, in turns.

The data are clips that are made here, or a data file's own, each repeated, and broken ones among them. Every
run must find the same bad samples. Reported are seconds (of the fastest round, which other work of the machine
disturbs least) and the speed-up against the first number of workers, beside the number of cores that there are.

    python benchmarks/check_workers.py --output benchmarks/check_workers.json [--data real_video_it.json]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from decode import SIZES, write_clip

from llava.data.check import MediaCheck, check_data
from llava.data.records import read_records

TURNS = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "un film"}]


def write_data(folder: Path, clips: Sequence[str], repeats: int) -> Path:
    """A data file of clips, each repeated, and of broken ones."""
    whole = Path(clips[0]).read_bytes()
    broken = {"empty.mp4": b"", "text.mp4": b"questo non e un video", "half.mp4": whole[: len(whole) // 2]}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    files = [*clips * repeats, *broken, "missing.mp4"]
    samples = [{"id": i, "video": str(file), "conversations": TURNS} for i, file in enumerate(files)]
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    return path


def measure(path: Path, workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Check the data with each number of workers, in turns."""
    # The clips of --data stay where they are, outside the folder of the data file that repeats them.
    records = read_records(str(path), allow_outside_paths=True)
    check = MediaCheck(records, num_frames=4, video_fps=0.0, frames_upbound=32, decode_timeout=60.0)
    seconds: dict[int, list[float]] = {number: [] for number in workers}
    found = set()
    for round_number in range(rounds):
        for number in workers if round_number % 2 else reversed(workers):
            rows = StringIO()
            seconds[number].append(check_data(check, number, rows).seconds)
            found.add(tuple(sorted(rows.getvalue().splitlines()[:-1])))
    if len(found) > 1:
        raise RuntimeError("runs found different bad samples")
    fastest = {number: min(times) for number, times in seconds.items()}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "samples": len(check),
        "bad": len(found.pop()),
        "seconds": {number: round(time, 2) for number, time in fastest.items()},
        "speed_up": {number: round(fastest[workers[0]] / time, 2) for number, time in fastest.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data file whose videos to take")
    parser.add_argument("--repeats", type=int, default=4, help="how often each clip stands in the data")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.data is None:
            clips = [str(write_clip(folder / f"{size}.mp4", *SIZES[size])) for size in ("320x240", "640x480")]
        else:
            clips = [media.path for record in read_records(str(args.data)) for media in record.media]
        result = measure(write_data(folder, clips, args.repeats), args.workers, args.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
