"""`python -m llava.demo`: a small GPT-2 learns to describe videos in Italian. Reads as the demo's table of contents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava.command import CommandParser, run_command
from llava.demo import common
from llava.demo.common import QUICK_STEPS, TOWER_FOLDER, phase
from llava.io import write_json

_QUICK_AMOUNTS = {"num_train_clips": 64, "num_held_out_clips": 12}
_ROWS_OF_TABLE = 12
_CLIPS_OF_PICTURE = 6


def build_parser() -> CommandParser:
    parser = common.build_parser(
        "python -m llava.demo",
        "Writes clips of moving shapes, trains a tiny GPT-2 to describe them in Italian, and shows what "
        "it says about clips whose shape and colour it has never seen together.",
        "demo_output",
        {
            "train_clips": (24000, "clips to train on, each once"),
            "held_out_clips": (256, "clips to caption at the end"),
        },
    )
    parser.add_argument("--vision_tower", type=Path, metavar="DIR", help="a tower other than the one that is shipped")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: run(build_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Write data, train on text and then on video, caption held-out clips, and report."""
    common.check_arguments(args, {"num_train_clips": 1, "num_held_out_clips": 2})
    if args.quick:
        vars(args).update(_QUICK_AMOUNTS)

    from llava.demo.dataset import read_captions, write_dataset
    from llava.demo.evaluation import caption_clips, caption_table, draw_captions, score, score_lines

    output, seconds = args.output_dir, dict[str, float]()
    max_steps = QUICK_STEPS if args.quick else None
    with phase("writing clips", seconds):
        data = write_dataset(
            output / "data",
            seed=args.seed,
            num_train_clips=args.num_train_clips,
            num_held_out_clips=args.num_held_out_clips,
        )
    with phase("tokenizer and model", seconds):
        common.write_base_model(output / "base_model", read_captions(data.text), seed=args.seed)
    with phase("training on text", seconds):  # The language model alone.
        common.train(
            "demo_text.yaml",
            seed=args.seed,
            max_steps=max_steps,
            model_name_or_path=output / "base_model",
            data_path=data.text,
            output_dir=output / "text_model",
        )
    with phase("training on video", seconds):  # Projector, resampler and language model, on top of the frozen tower.
        common.train(
            "demo_video.yaml",
            seed=args.seed,
            max_steps=max_steps,
            model_name_or_path=output / "text_model",
            vision_tower=args.vision_tower or TOWER_FOLDER,
            data_path=data.train,
            output_dir=output / "checkpoint",
        )
    with phase("captioning held-out clips", seconds):
        from llava.serve.generate import Captioner

        # Loaded afresh, as any user would.
        clips = caption_clips(Captioner.from_checkpoint(str(output / "checkpoint")), data.held_out)
    scores = score(clips)
    write_json(
        output / "captions.json",
        {
            "exact_match": asdict(scores),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "clips": [asdict(clip) for clip in clips],
        },
    )
    # By topic and not by score: what is shown is no selection of good ones.
    examples = common.choose_examples(clips, _ROWS_OF_TABLE, lambda clip: clip.topic)
    draw_captions(examples[:_CLIPS_OF_PICTURE]).save(output / "captions.png", optimize=True)
    print(f"\n{caption_table(examples)}\n\n{score_lines(scores, len(clips))}")
    print(common.time_lines(seconds))
    print(f"in {output}: data/, checkpoint/, captions.json, captions.png")
    print("describe a clip yourself:")
    print(f"  python -m llava.serve.cli --model_path {output / 'checkpoint'} --video {clips[0].video}")


if __name__ == "__main__":
    sys.exit(main())
