"""``python -m llava.inspect.models``: everything that is registered, as tables in Markdown.

``docs/models.md`` is its output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence

from llava.command import CommandParser, run_command
from llava.config import VisionConfig
from llava.geometry import ANYRES, ASPECT_RATIOS, PATCH_MERGE_TYPES
from llava.inspect import table
from llava.registry import import_plugins

PAGE = """\
# Models

Everything that has a name, and what it is. `make docs` writes this page from the registries, by
`python -m llava.inspect.models`; parts of your own join with `--plugins` (`docs/extending.md`).

## Language models

A checkpoint is recognised by the `model_type` of its `config.json`, a plain one or one of this library; its folder may
have any name.

{backbones}
Each exists with alternating attention too (sdpa or eager, where it has them): {variants}.
`train_alternating.py --help` says how to begin.

## Vision towers

`--vision_tower` takes a folder or a hub name; the vision model's own `model_type` chooses the tower. Of a model of
images and text the vision half is used. The grid and the width come from the model; `--mm_vision_select_layer` picks a
hidden state, and class and register tokens are dropped.

{towers}
## Projectors

`--mm_projector_type`, from the tower's width to the language model's (default `{default_projector}`).

{projectors}
## Resamplers

`--mm_resampler_type`. Tokens are those of a 16 x 16 grid under the default settings, markers included: of an image with
`--mm_resample_images` (without it an image keeps its patches), and of a video of {num_frames} frames. A fast span
stands before a slow one.

{resamplers}
## Images

`--image_aspect_ratio`: {aspect_ratios}. The tiles of `anyres` are joined as
`--mm_patch_merge_type` says: {merge_types}. See `docs/data.md`.

## Formats

`--version`: {formats}. See `docs/data.md`.
"""
EXAMPLE_FRAMES = 4


def describe_models() -> str:
    """The whole page."""
    from llava.compat import supports_sdpa
    from llava.data.formats import FORMATS
    from llava.model.backbones import AVAILABLE_MODELS, PLAIN_TYPES, VARIANTS, find_class, plain_class, variant_type
    from llava.model.multimodal_encoder.base import TOWERS
    from llava.model.multimodal_projector.projectors import MLP_NAMES, PROJECTORS, build_mlp
    from llava.model.multimodal_resampler import RESAMPLERS

    backbones = []
    # Sorted: the page must not change with the order in which parts were registered.
    for plain, backbone in sorted(PLAIN_TYPES.items(), key=lambda item: item[1]):
        model_class = find_class(AVAILABLE_MODELS[backbone][2])
        attention = "eager, flash_attention_2" if model_class.decoder_class.has_attention_interface else "eager"
        if supports_sdpa(model_class):
            attention = f"sdpa, {attention}"
        backbones.append((f"`{backbone}`", f"`{plain}`", f"`{plain_class(model_class).__name__}`", attention))
    projectors = [(f"`{name}`", first_line(PROJECTORS.get(name))) for name in PROJECTORS]
    resamplers = [(f"`{name}`", first_line(RESAMPLERS.get(name)), *count_tokens(name)) for name in RESAMPLERS]
    return PAGE.format(
        backbones=table(("model type", "loads", "made from", "attention"), backbones),
        variants=both(variant_type("<model type>", name) for name in VARIANTS if name != "base"),
        towers=table(("model type", "what it is"), [(f"`{name}`", first_line(TOWERS.get(name))) for name in TOWERS]),
        default_projector=VisionConfig.projector_type,
        projectors=table(("name", "what it is"), [*projectors, (", ".join(MLP_NAMES), first_line(build_mlp))]),
        num_frames=EXAMPLE_FRAMES,
        resamplers=table(
            ("name", "what it is", "image", "video"), [("none", "Keeps every patch.", *count_tokens(None)), *resamplers]
        ),
        aspect_ratios=both([*ASPECT_RATIOS, ANYRES, f"{ANYRES}_max_N"]),
        merge_types=both(PATCH_MERGE_TYPES),
        formats=both(FORMATS),
    )


def count_tokens(resampler: str | None) -> tuple[str, str]:
    """Tokens of an image and of a video behind a resampler, span by span."""
    # A 16 x 16 grid is that of CLIP ViT-L/14 at 224 pixels, the family's smallest tower.
    vision = VisionConfig(
        vision_tower="",
        vision_config={},
        hidden_size=1024,
        image_size=224,
        patches_per_side=16,
        resampler_type=resampler,
        resample_images=resampler is not None,
    )
    media = (vision.layout.spans("image"), vision.layout.spans("video", EXAMPLE_FRAMES))
    image, video = (" + ".join(str(span.length) for span in spans) for spans in media)
    return image, video


def first_line(part: object) -> str:
    """The first sentence of a part's documentation, in one line."""
    paragraph = " ".join((inspect.getdoc(part) or "").partition("\n\n")[0].split())
    return paragraph.replace("``", "`")


def both(names: Iterable[str]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m llava.inspect.models", description="Print everything that is registered, as Markdown."
    )
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", help="modules to import first (docs/extending.md)")

    def run() -> None:
        args = parser.parse_args(argv)
        import_plugins(args.plugins)
        sys.stdout.write(describe_models())

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
