"""Rows in the shape of Localized Narratives, made from photographs with boxes: somebody names the objects, pointing.

Stands in for Localized Narratives where only boxes are at hand. For each image the pointer waits below the picture
while "In this image" is said, then goes to one object after another, is round and over it while it is named, a little
late or early, and hovers over a place on the way. The same boxes and seed give the same rows.

    python benchmarks/coco_narratives.py BOXES.json ROWS.jsonl

``BOXES.json`` is a list of ``{"image": "000000000009.jpg", "objects": [{"category": "bowl", "box": [...]}]}``; a box
is x1, y1, x2, y2, from 0 to 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DATASET = "mscoco_train2017"
SECONDS_A_WORD = 0.4
SECONDS_BETWEEN_POINTS = 0.025
TRAVEL = 0.5
"""Seconds from one object to the next, while nothing is said."""
MOST_LAG = 0.2
"""Seconds by which the pointer is behind the voice, or before it."""
ROUNDS = 3
"""How often the pointer goes round an object, the last time half as far from its middle."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("boxes", type=Path, metavar="BOXES", help="JSON list of images with their objects")
    parser.add_argument("rows", type=Path, metavar="ROWS", help="JSONL file to write")
    parser.add_argument("--most_objects", type=int, default=5, help="most objects that are named (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args(argv)
    images = json.loads(args.boxes.read_text(encoding="utf-8"))
    with args.rows.open("w", encoding="utf-8") as file:
        for image in images:
            if image["objects"]:
                file.write(json.dumps(build_row(image, args.most_objects, args.seed)) + "\n")


def build_row(image: dict[str, Any], most_objects: int, seed: int) -> dict[str, Any]:
    """The row of an image: its largest objects are named, from left to right."""
    rng = random.Random(f"{seed} {image['image']}")
    largest = sorted(image["objects"], key=lambda thing: -area(thing["box"]))[:most_objects]
    objects = sorted(largest, key=lambda thing: thing["box"][0] + thing["box"][2])
    utterances, traces, clock = [], [list(wait(0.0, 3 * SECONDS_A_WORD + TRAVEL - MOST_LAG, rng))], 0.0
    words = ["In this image", *name_objects(objects)]
    for number, text in enumerate(words):
        end = clock + SECONDS_A_WORD * len(text.split())
        utterances.append({"utterance": text, "start_time": round(clock, 3), "end_time": round(end, 3)})
        if number:
            lag = rng.uniform(-MOST_LAG, MOST_LAG)
            traces.append(list(go_round(objects[number - 1]["box"], clock + lag, end + lag, rng)))
        clock = end + TRAVEL
    return {
        "dataset_id": DATASET,
        "image_id": Path(image["image"]).stem.lstrip("0") or "0",
        "annotator_id": rng.randrange(100),
        "caption": " ".join(words),
        "timed_caption": utterances,
        "traces": [join(traces)],
    }


def name_objects(objects: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What is said of each object, punctuation included."""
    for number, thing in enumerate(objects):
        middle = (thing["box"][0] + thing["box"][2]) / 2
        side = "on the left" if middle < 1 / 3 else "on the right" if middle > 2 / 3 else "in the middle"
        article = "an" if thing["category"][0] in "aeiou" else "a"
        opening = "there is " if number == 0 else "and " if number == len(objects) - 1 else ""
        yield f"{opening}{article} {thing['category']} {side}{'.' if number == len(objects) - 1 else ','}"


def area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def wait(start: float, end: float, rng: random.Random) -> Iterator[dict[str, float]]:
    """A pointer that waits below the picture."""
    for time in moments(start, end):
        yield point(0.5 + rng.gauss(0, 0.01), 1.04 + rng.gauss(0, 0.005), time)


def go_round(box: Sequence[float], start: float, end: float, rng: random.Random) -> Iterator[dict[str, float]]:
    """A pointer that goes round an object near its edges, and once over its middle."""
    middle_x, middle_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    phase = rng.uniform(0, 2 * math.pi)
    for time in moments(start, end):
        done = (time - start) / (end - start)
        reach = 0.5 if done < 1 - 1 / ROUNDS else 0.25
        angle = phase + 2 * math.pi * ROUNDS * done
        x = middle_x + reach * (box[2] - box[0]) * (math.cos(angle) + rng.gauss(0, 0.05))
        y = middle_y + reach * (box[3] - box[1]) * (math.sin(angle) + rng.gauss(0, 0.05))
        yield point(x, y, time)


def join(traces: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """One trace: straight from the end of each part to the beginning of the next."""
    joined = list(traces[0])
    for trace in traces[1:]:
        before, after = joined[-1], trace[0]
        for time in moments(before["t"] + SECONDS_BETWEEN_POINTS, after["t"]):
            share = (time - before["t"]) / (after["t"] - before["t"])
            place = {axis: before[axis] + share * (after[axis] - before[axis]) for axis in "xy"}
            joined.append(point(place["x"], place["y"], time))
        joined += trace
    return joined


def moments(start: float, end: float) -> Iterator[float]:
    """Times from start to end, the end left out, as far apart as a pointer is asked where it is."""
    for number in range(max(math.ceil((end - start) / SECONDS_BETWEEN_POINTS - 1e-9), 0)):
        yield start + number * SECONDS_BETWEEN_POINTS


def point(x: float, y: float, time: float) -> dict[str, float]:
    return {"x": round(x, 4), "y": round(y, 4), "t": round(time, 3)}


if __name__ == "__main__":
    main()
