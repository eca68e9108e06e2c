"""What masking visual positions in the labels does, as measured.

Trains the same small run twice, from the same weights on the same clips in the same order: once with
the labels of `plain_lm`, where visual positions are ignored, and once with labels that equal the ids
everywhere, as in runs before the mask. Of both it reports, on clips that training never saw, the loss
on caption tokens alone and the share of captions that are exactly right, and the gradient norms of
training. The data, tower and recipe are those of the demo.

    python benchmarks/label_mask.py --output benchmarks/label_mask.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from llava.data.collator import model_inputs
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.demo.common import TOWER_FOLDER, train, write_base_model
from llava.demo.dataset import DemoData, read_captions, write_dataset
from llava.demo.evaluation import caption_clips, score
from llava.model.loading import LoadedModel
from llava.serve.generate import Captioner
from llava.train.train import build_trainer
from llava.train.trainer import LlavaTrainer
from llava.types import Example


class UnmaskedDataset(Dataset[Example]):
    """A dataset whose labels equal its ids, visual positions included."""

    def __init__(self, masked: SupervisedDataset) -> None:
        self.masked = masked

    def __len__(self) -> int:
        return len(self.masked)

    def __getitem__(self, index: int) -> Example:
        example = self.masked[index]
        return Example(example.id, example.input_ids, list(example.input_ids), example.media)


def measure(folder: Path, data: DemoData, masked: bool, seed: int, max_steps: int | None) -> dict[str, Any]:
    """Train one of the two runs and measure it."""
    name = "masked" if masked else "unmasked"
    trainer = build_trainer(
        [
            *("--config", "demo_video.yaml"),
            *("--model_name_or_path", str(folder / "text_model")),
            *("--vision_tower", str(TOWER_FOLDER)),
            *("--data_path", str(data.train)),
            *("--output_dir", str(folder / name)),
            *("--seed", str(seed), "--logging_steps", "1", "--disable_tqdm", "true"),
            *([] if max_steps is None else ["--max_steps", str(max_steps)]),
        ]
    )
    start = caption_loss(trainer, data)
    if not masked:
        trainer.train_dataset = UnmaskedDataset(trainer.train_dataset)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tenth = max(len(norms) // 10, 1)
    return {
        "labels": name,
        "steps": len(losses),
        "training_loss_last_tenth": statistics.mean(losses[-tenth:]),
        "gradient_norm_first_tenth": statistics.median(norms[:tenth]),
        "gradient_norm_all": statistics.median(norms),
        "gradient_norm_last_tenth": statistics.median(norms[-tenth:]),
        "caption_loss_before": start,
        "caption_loss_held_out": caption_loss(trainer, data),
        "exact_match_held_out": exact_match(trainer, data),
        "seconds": seconds,
    }


@torch.no_grad()
def caption_loss(trainer: LlavaTrainer, data: DemoData, batch_size: int = 32) -> float:
    """Mean cross entropy of caption and end-of-text tokens of the held-out clips."""
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    dataset = SupervisedDataset(
        read_records(str(data.held_out)), tokenizer, model.vision, model.config.max_position_embeddings
    )
    model.eval()
    total, predicted = 0.0, 0
    for begin in range(0, len(dataset), batch_size):
        batch = trainer.data_collator([dataset[i] for i in range(begin, min(begin + batch_size, len(dataset)))])
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**trainer._prepare_inputs(model_inputs(batch))).loss) * count
        predicted += count
    return total / predicted


def exact_match(trainer: LlavaTrainer, data: DemoData) -> float:
    """Share of held-out clips that are captioned word for word."""
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    captioner = Captioner(LoadedModel(model, tokenizer, model.vision, []), str(trainer.args.device))
    return score(caption_clips(captioner, data.held_out)).right_video


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Both runs side by side, a figure a line."""
    lines = [f"{'':<28}" + "".join(f"{row['labels']:>14}" for row in rows)]
    for key in rows[0]:
        if key != "labels":
            cells = "".join(f"{row[key]:>14.4g}" for row in rows)
            lines.append(f"{key.replace('_', ' '):<28}{cells}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--num_train_clips", type=int, default=6000, help="clips of each run (default 6000)")
    parser.add_argument("--num_held_out_clips", type=int, default=256, help="clips to measure on (default 256)")
    parser.add_argument("--max_steps", type=int, help="fewer steps, to try it out")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order (default 0)")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, how = Path(name), {"seed": args.seed, "max_steps": args.max_steps}
        data = write_dataset(
            folder / "data",
            seed=args.seed,
            num_train_clips=args.num_train_clips,
            num_held_out_clips=args.num_held_out_clips,
        )
        write_base_model(folder / "base_model", read_captions(data.text), seed=args.seed)
        train(
            "demo_text.yaml",
            **how,
            model_name_or_path=folder / "base_model",
            data_path=data.text,
            output_dir=folder / "text_model",
        )
        rows = [measure(folder, data, masked, **how) for masked in (True, False)]
    print(table(rows))
    if args.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        options = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(json.dumps({"options": options, "versions": versions, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
