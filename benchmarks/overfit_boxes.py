"""Real photographs: a tiny model learns the boxes of 40 of them by heart, and `llava.eval.run` scores it.

Every object whose category occurs once in its photograph is asked for ("where is the bowl?"). The tower is the
demo's, the language model a tiny one from random weights; nothing is held out. It shows
that a box survives the whole way: data file, padded square, tables, loss, generation, parsing, score.

    python benchmarks/overfit_boxes.py ../shared/data/image/coco_boxes --output benchmarks/overfit_boxes.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llava.demo.common import TOWER_FOLDER, write_tokenizer
from llava.eval.run import main as evaluate
from llava.grounding.syntax import box_text
from llava.train.train import main as train

WANTED_MIOU = 0.7


def build_samples(boxes: Path, num_images: int) -> list[dict[str, Any]]:
    """One sample for each object that its category names, of the first photographs that have such objects."""
    samples, used = [], 0
    for image in json.loads(boxes.read_text(encoding="utf-8")):
        counts = Counter(thing["category"] for thing in image["objects"])
        named = [thing for thing in image["objects"] if counts[thing["category"]] == 1]
        if not named or used == num_images:
            continue
        used += 1
        for thing in named:
            x1, y1, x2, y2 = thing["box"]
            samples.append(
                {
                    "id": f"{Path(image['image']).stem} {thing['category']}",
                    "image": image["image"],
                    "conversations": [
                        {"from": "human", "value": f"<image> where is the {thing['category']}?"},
                        {"from": "gpt", "value": box_text()},
                    ],
                    "variables": {
                        "spatial_width_output_locations": [x1, x2],
                        "spatial_height_output_locations": [y1, y2],
                    },
                }
            )
    return samples


def write_model(folder: Path, texts: Sequence[str]) -> None:
    """A GPT-2 of 4 x 128 with random weights and without dropout, and a tokenizer for the questions."""
    vocab_size = write_tokenizer(folder, texts)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=128, n_embd=128, n_layer=4, n_head=4, initializer_range=0.06,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def measure(images: Path, folder: Path, num_images: int, steps: int, pictures: Path | None) -> dict[str, Any]:
    """Train, evaluate, and say what came out."""
    samples = build_samples(images / "boxes.json", num_images)
    data = folder / "boxes.json"
    data.write_text(json.dumps(samples), encoding="utf-8")
    write_model(folder / "model", [turn["value"] for sample in samples for turn in sample["conversations"]])
    start = time.perf_counter()
    values = {
        "model_name_or_path": folder / "model", "vision_tower": TOWER_FOLDER, "data_path": data, "image_folder": images,
        "output_dir": folder / "checkpoint", "stage": "2", "image_aspect_ratio": "pad",
        "mm_vision_select_layer": -1, "num_frames": 1, "max_steps": steps, "per_device_train_batch_size": 16,
        "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 50, "save_strategy": "no",
        "logging_steps": 100, "report_to": "none", "use_cpu": "true", "disable_tqdm": "true",
        "dataloader_num_workers": 1, "dataloader_pin_memory": "false",
    }  # fmt: skip
    trainer = train([word for name, value in values.items() for word in (f"--{name}", str(value))])
    seconds = time.perf_counter() - start
    out = pictures or folder / "evaluation"
    asked = {"task": "rec", "model_path": folder / "checkpoint", "data": data, "image_folder": images, "out": out}
    status = evaluate(["--overwrite", *(word for name, value in asked.items() for word in (f"--{name}", str(value)))])
    if status:
        raise RuntimeError(f"llava.eval.run ended with {status}")
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "images": num_images, "questions": len(samples), "steps": steps, "seconds": round(seconds),
        "first_loss": losses[0], "last_loss": losses[-1], "scores": scores["scores"],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs with boxes.json")
    parser.add_argument("--num_images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pictures", type=Path, help="folder to keep the evaluation in, with its pictures")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args.images.resolve(), Path(folder), args.num_images, args.steps, args.pictures)
    report |= {package: version(package) for package in ("torch", "transformers")}
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(report["scores"]["mIoU"]["value"] < WANTED_MIOU)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
