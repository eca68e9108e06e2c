"""``python -m llava.serve.cli``: describe a video or an image, point at things in it, or continue a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.command import CommandParser, check_at_least, run_command
from llava.messages import escape_controls
from llava.serve.decoding import MAX_NEW_TOKENS, add_model_flags, decoding_options, describe_decoding

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava.config import VisionConfig
    from llava.serve.generate import Answer
    from llava.types import Media


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.serve.cli",
        description="Print what a trained model says about images and videos, or how it continues a text.",
        may_be_empty=("prompt", "system"),
    )
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="a video; may be given several times"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be given several times"
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="the question, or the text that the answer continues"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system text before the question (default: none)")
    add_model_flags(parser, MAX_NEW_TOKENS)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: text (with bins), boxes and spans of time"
    )
    parser.add_argument("--draw", metavar="FILE", help="write a PNG of the image or video with the answer's boxes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print one answer; returns the exit status, 2 with one line on standard error for a user's mistake."""
    return run_command(lambda: describe(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong, or that need others."""
    args = build_parser().parse_args(argv)
    check_at_least(args, {"seed": 0})
    decoding_options(args, MAX_NEW_TOKENS)
    if not (args.video or args.image or args.prompt):
        raise ValueError("nothing to describe or to continue; give --video, --image or --prompt")
    if args.draw and not (args.video or args.image):
        raise ValueError("--draw has nothing to draw on; give --video or --image")
    return args


def describe(args: argparse.Namespace) -> None:
    """Print an answer and, where it was asked for, draw it.

    Raises:
        ValueError: a file, the checkpoint or the device is not as it must be.
    """
    from transformers import logging, set_seed

    from llava.registry import import_plugins
    from llava.serve.generate import Captioner, Request
    from llava.types import Media

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # For sampling; greedy and beam search draw nothing.
    set_seed(args.seed)
    # Images before videos, whatever the order of the flags.
    media = [Media("image", path) for path in args.image] + [Media("video", path) for path in args.video]
    options = decoding_options(args, MAX_NEW_TOKENS)
    import_plugins(args.plugins)
    captioner = Captioner.from_checkpoint(
        args.model_path,
        args.vision_tower,
        args.device,
        model_base=args.model_base,
        bits=args.bits,
        feature_cache=args.feature_cache,
        feature_cache_strict=args.feature_cache_strict,
    )
    # Not on standard output, which is the answer's alone.
    print(describe_decoding(options, args.model_path), file=sys.stderr)
    (answer,) = captioner.answer([Request(media, args.prompt, args.system)], sub_bin=args.sub_bin, **options)
    print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) if args.json else escape_controls(str(answer)))
    if args.draw:
        assert captioner.vision is not None
        picture = draw_answer(answer, media[-1], captioner.vision)
        try:
            picture.save(args.draw, format="PNG")
        except OSError as error:
            raise ValueError(f"--draw {args.draw!r} cannot be written: {error.strerror or error}") from error


def draw_answer(answer: Answer, media: Media, vision: VisionConfig) -> Image:
    """An image with the boxes of an answer, or the sampled frames of a video side by side, each with its own.

    The boxes of a video are taken as a tube: evenly spaced in time over the answer's first span, or over the
    clip if it has none; each is drawn on the frame that is nearest in time.

    Raises:
        ValueError: the file cannot be read.
    """
    from PIL import Image

    from llava.data.media import load_image, load_media
    from llava.draw import side_by_side
    from llava.serve.explain import draw_boxes, restore_frames
    from llava.serve.generate import DECODE_TIMEOUT

    if media.kind == "image":
        frames = [Image.fromarray(load_image(media.path).numpy())]
    else:
        frames = restore_frames(load_media(media, vision, timeout=DECODE_TIMEOUT), vision)
    draw_boxes(frames, answer, media.kind)
    return side_by_side(frames)


if __name__ == "__main__":
    sys.exit(main())
