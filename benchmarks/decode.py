"""What decoding costs: a clip, in this process and in a second one that can be ended, and a clip with five captions.

    python benchmarks/decode.py --output benchmarks/decode.json [CLIP...]

Both processes decode the same clips with the same settings, in turns, in one run; reported are milliseconds a clip (of
the fastest repeat, which other work of the machine disturbs least) and their ratio, for each kind of clip, and what it
takes to start the second process and the memory it holds. ``five_captions`` are the samples of a batch that share a
clip, each made alone and all of them as a batch, which decodes it once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from train_step import RECIPE, build_tokenizer, build_vision, describe_machine

from llava.data import decoding as decoder_process
from llava.data.dataset import SupervisedDataset
from llava.data.media import sample_video
from llava.types import Media, Record, Turn

SIZES = {"64x48": (64, 48, 12), "320x240": (320, 240, 75), "640x480": (640, 480, 75), "1280x720": (1280, 720, 75)}
"""Width, height and number of frames of the clips that are made here."""
LIMIT = 600.0


def write_clip(path: Path, width: int, height: int, num_frames: int) -> Path:
    """An H.264 clip of smooth noise that scrolls."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def measure(path: Path, num_frames: int, repeats: int) -> dict[str, float]:
    """Decode a clip here and there in turns."""
    seconds: dict[str, list[float]] = {"here": [], "there": []}
    for repeat in range(repeats + 1):
        for where in ("here", "there") if repeat % 2 else ("there", "here"):
            start = time.perf_counter()
            sample_video(str(path), num_frames, timeout=LIMIT if where == "there" else 0.0)
            if repeat:  # the first round warms up
                seconds[where].append(time.perf_counter() - start)
    here, there = (min(seconds[where]) * 1000 for where in ("here", "there"))
    return {"here_ms": round(here, 2), "there_ms": round(there, 2), "ratio": round(there / here, 3)}


def measure_batch(path: Path, num_frames: int, repeats: int) -> dict[str, float]:
    """Five samples of a clip, one by one and as a batch, in turns."""
    sizes = replace(RECIPE, num_frames=num_frames)
    tokenizer = build_tokenizer(replace(sizes, vocabulary=200))
    turns = (Turn("user", "<video>"), Turn("assistant", "parola1 parola2"))
    records = [Record(str(i), turns, (Media("video", str(path)),)) for i in range(5)]
    dataset = SupervisedDataset(records, tokenizer, build_vision(sizes, tokenizer), sizes.context)
    ways = {"alone": lambda: [dataset[i] for i in range(5)], "batch": lambda: dataset.__getitems__(range(5))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in ways if repeat % 2 else reversed(ways):
            start = time.perf_counter()
            ways[name]()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    alone, batch = (min(seconds[name]) * 1000 for name in ("alone", "batch"))
    return {"alone_ms": round(alone, 2), "batch_ms": round(batch, 2), "ratio": round(alone / batch, 2)}


def start() -> dict[str, float]:
    """Seconds from nothing to a process that is ready, and its memory in MiB then."""
    begin = time.perf_counter()
    process = decoder_process.DecoderProcess()
    seconds = time.perf_counter() - begin
    status = Path(f"/proc/{process._process.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    process.end()
    return {"start_seconds": round(seconds, 2), "resident_mib": round(resident / 1024, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path, help="clips of your own, beside those made here")
    parser.add_argument("--num_frames", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clips = {name: write_clip(Path(folder) / f"{name}.mp4", *size) for name, size in SIZES.items()}
        clips |= {path.name: path for path in args.clips}
        result = {
            "machine": describe_machine(),
            "num_frames": args.num_frames,
            "process": start(),
            "clips": {name: measure(path, args.num_frames, args.repeats) for name, path in clips.items()},
            "five_captions": {name: measure_batch(path, args.num_frames, args.repeats) for name, path in clips.items()},
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
