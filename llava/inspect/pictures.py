"""``python -m llava.inspect.pictures OUT``: the pictures of the documents, drawn from the code that they show.

Windows, spans and masks are those that the library computes, so that a picture cannot say something else than it does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.command import CommandParser, check_output_folder, run_command
from llava.draw import FAINT, INK, Colour, blank_page, choose_colour, load_font, side_by_side, stack

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SIDE, SLOW, FAST, FRAMES = 16, 9, 3, 4
"""The Italian recipe: patches a side, slow and fast tokens a side, frames."""
TEXT, SLOW_COLOUR, FAST_COLOUR, MARKER, HIDDEN = (
    (66, 133, 244), (0, 150, 110), (240, 140, 20), (90, 92, 98), (232, 230, 224),
)  # fmt: skip
_CELL = 18


def draw_windows() -> Image:
    """Which patches of a frame each token of the packer looks at, and which of them tokens share."""
    from llava.model.multimodal_resampler.token_packer import grid_windows

    pages = []
    for side, name, colour in ((SLOW, "slow", SLOW_COLOUR), (FAST, "fast", FAST_COLOUR)):
        windows = grid_windows(SIDE, side)
        seen = [sum(patch in window for window in windows) for patch in range(SIDE * SIDE)]
        shown = windows[len(windows) // 2]
        page, draw = blank_page(SIDE * _CELL + 1, SIDE * _CELL + 1)
        for patch in range(SIDE * SIDE):
            left, top = patch % SIDE * _CELL, patch // SIDE * _CELL
            # The darker, the more windows share the patch.
            shade = 248 - 18 * seen[patch]
            fill: Colour = colour if patch in shown else (shade, shade, shade)
            draw.rectangle((left, top, left + _CELL, top + _CELL), fill, (200, 198, 192))
        said = f"{name}: {side} x {side} tokens of {SIDE} x {SIDE} patches; in colour what the middle one reads"
        pages.append(_titled(page, said))
    return _page("TokenPacker: each token reads the patches of its own window", [side_by_side(pages, 40)])


def draw_layout() -> Image:
    """The positions of one clip with its caption, in the order in which the language model reads them."""
    from llava.token_layout import build_layout

    layout = build_layout(_settings())
    fast, slow = layout.spans("video", FRAMES)
    caption = ["Un", "uomo", "apre", "una", "porta", ".", "</s>"]
    kinds: list[tuple[Colour, int]] = []
    for span, colour in ((fast, FAST_COLOUR), (slow, SLOW_COLOUR)):
        kinds += [(MARKER, 1), (colour, span.length - 2), (MARKER, 1)]
    kinds.append((TEXT, len(caption)))
    cells = [colour for colour, number in kinds for _ in range(number)]
    columns, size = 62, 13
    page, draw = blank_page(columns * size + 1, -(-len(cells) // columns) * size + 1)
    for place, colour in enumerate(cells):
        left, top = place % columns * size, place // columns * size
        draw.rectangle((left, top, left + size - 2, top + size - 2), colour)
    legend: list[tuple[str, Colour]] = [
        (f"fast span: {fast.length} positions, {FAST * FAST} tokens of each of {FRAMES} frames", FAST_COLOUR),
        (f"slow span: {slow.length} positions, {SLOW * SLOW} tokens of each frame", SLOW_COLOUR),
        ("the first and the last position of a span are its markers", MARKER),
        (f"text: {len(caption)} tokens; they alone are supervised", TEXT),
    ]
    return _page(f"A clip of {FRAMES} frames and its caption: {len(cells)} positions", [page, _legend(legend)])


def draw_masks() -> Image:
    """Who sees whom: a causal layer, a pack of three samples, and the two kinds of restricted layers."""
    import torch

    from llava.model.language_model.alternating import forbidden_keys
    from llava.model.packing import PackLayout

    length = 20
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    pack = PackLayout([[6, 9, 5]], length, torch.device("cpu")).block_mask(torch.float32)[0, 0] == 0
    # Text, a clip, text.
    modality = torch.tensor([[4 <= place < 12 for place in range(length)]])
    pages = [
        _titled(_mask(causal, modality[0]), "causal: layers of a plain model"),
        _titled(_mask(pack, None), "packing: three samples in one row"),
    ]
    for variant in ("alternating", "alternating_cross"):
        seen = causal & ~forbidden_keys(variant, modality, length)[0, 0]
        pages.append(_titled(_mask(seen, modality[0]), f"{variant}: every other layer"))
    legend: list[tuple[str, Colour]] = [
        ("text", TEXT), ("an image or a clip", SLOW_COLOUR), ("samples of a pack", choose_colour(0)),
        ("a row is a position that looks, a column one that is looked at; pale is hidden", HIDDEN),
    ]  # fmt: skip
    rows = [side_by_side(pages[:2], 40), side_by_side(pages[2:], 40), _legend(legend)]
    return _page("Attention: who sees whom", rows)


def _mask(seen: Tensor, modality: Tensor | None) -> Image:
    length, size = len(seen), 15
    page, draw = blank_page(length * size + 1, length * size + 1)
    starts = [int(row.nonzero()[0]) for row in seen]
    for query in range(length):
        for key in range(length):
            if not seen[query, key]:
                colour = HIDDEN
            elif modality is None:
                colour = choose_colour(sorted(set(starts)).index(starts[query]))
            else:
                colour = SLOW_COLOUR if modality[key] else TEXT
            left, top = key * size, query * size
            draw.rectangle((left, top, left + size - 2, top + size - 2), colour)
    return page


def draw_losses(run: Path) -> Image:
    """The loss of a run beside that of a blind guess, from its folder.

    Raises:
        ValueError: the folder has no log of losses.
    """
    from llava.chart import Line, Point, draw_chart

    try:
        history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        vocabulary = json.loads((run / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--run {run}: no run with trainer_state.json and config.json ({error})") from error
    points = [Point(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not points:
        raise ValueError(f"--run {run}: its log has no loss; lower --logging_steps")
    chance = math.log(vocabulary)
    return draw_chart(
        [Line("training", points)], f"Loss of {run.resolve().name}", "step", "nats a token",
        levels=[(chance, f"a blind guess: ln {vocabulary:,} = {chance:.2f}")],
    )  # fmt: skip


def _settings() -> dict[str, object]:
    from llava.config import VisionConfig

    config = VisionConfig(
        vision_tower="dinov2", vision_config={}, hidden_size=1024, image_size=224, patches_per_side=SIDE,
        resampler_type="fast_slow_resampler", perceiver_latents=SLOW * SLOW, perceiver_latents_fast=FAST * FAST,
        num_frames=FRAMES,
    )  # fmt: skip
    return dict(vars(config))


def _titled(page: Image, title: str) -> Image:
    return stack([_text(title, 14, FAINT), page], gap=6)


def _page(title: str, parts: Sequence[Image]) -> Image:
    return stack([_text(title, 20, INK), *parts], gap=14, margin=20)


def _text(text: str, size: int, colour: Colour) -> Image:
    page, draw = blank_page(math.ceil(load_font(size).getlength(text)) + 2, size + 8)
    draw.text((0, 0), text, colour, load_font(size))
    return page


def _legend(entries: Sequence[tuple[str, Colour]]) -> Image:
    lines = []
    for text, colour in entries:
        square, draw = blank_page(16, 16)
        draw.rectangle((0, 0, 15, 15), colour)
        lines.append(side_by_side([square, _text(text, 14, INK)], 8))
    return stack(lines, gap=4)


PICTURES: dict[str, Callable[[], Image]] = {
    "packer_windows": draw_windows,
    "token_layout": draw_layout,
    "attention_masks": draw_masks,
}


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.inspect.pictures", description="Draw the pictures of the documents, as PNG files."
    )
    parser.add_argument("out", metavar="OUT", help="folder to write to, such as docs/pictures")
    parser.add_argument("--run", metavar="DIR", type=Path, help="a run, whose losses are drawn too, as loss.png")
    return parser


def draw_all(out: str, run: Path | None) -> list[Path]:
    """Draw the pictures; where they are.

    Raises:
        ValueError: the folder cannot be written to, or the run has no losses.
    """
    check_output_folder(out, "OUT")
    drawn = {name: draw() for name, draw in PICTURES.items()}
    if run is not None:
        drawn["loss"] = draw_losses(run)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        # A few plain colours: a palette holds them in a fraction of the bytes.
        picture.quantize(64).save(folder / f"{name}.png", optimize=True)
    return [folder / f"{name}.png" for name in drawn]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit status, 2 with one line for a user's mistake."""

    def run() -> None:
        args = build_parser().parse_args(argv)
        for path in draw_all(args.out, args.run):
            print(f"{path}: {path.stat().st_size:,} bytes")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
