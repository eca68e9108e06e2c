"""``llava init-recipe NAME``, or ``python -m llava.recipes``: a complete, commented recipe as a file of one's own."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.command import CommandLineError, CommandParser, check_output_folder, run_command
from llava.io import write_text
from llava.messages import shorten

RECIPES = Path(__file__).parent
MODELS = {"baby_llama_t": "baby_llama", "english_text": "english_gpt2"}
"""Folders beside recipes: the model that a recipe begins with, which has random weights."""
PLACES = {
    "model_name_or_path": "path/to/model",
    "vision_tower": "facebook/dinov2-large",
    "data_path": "captions.json",
    "image_folder": "images",
    "video_folder": "clips",
    "output_dir": "output/run",
}
"""What differs from machine to machine, with examples."""
_KEY = re.compile(r"([a-z_0-9]+): *(.*)")


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.recipes",
        description="Copy a recipe of this library, complete, with a comment on every setting, as a file to edit. "
        "Without NAME, list them.",
    )
    parser.add_argument("recipe", nargs="?", metavar="NAME", help="a recipe, such as italian_video")
    parser.add_argument(
        "--output", metavar="FILE", help="a .yaml file, or a folder to put it in (default: NAME.yaml, here)"
    )
    parser.add_argument("--force", "--overwrite", action="store_true", help="replace what is there already")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write a recipe, or list them; returns the exit status, 2 with one line on standard error for a mistake."""
    return run_command(lambda: run(build_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """What a command line asks for."""
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    if args.recipe is None:
        if args.output or args.force:
            raise CommandLineError(f"NAME is missing; known: {', '.join(recipes)}")
        width = max(map(len, recipes))
        for name, path in recipes.items():
            print(f"{name:{width}}  {path.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}")
        return
    name = args.recipe.removesuffix(".yaml")
    if name not in recipes:
        raise CommandLineError(f"NAME is {shorten(args.recipe)}; known: {', '.join(recipes)}")
    target = Path(args.output or ".")
    if target.suffix not in (".yaml", ".yml"):
        target /= f"{name}.yaml"
    model = MODELS.get(name)
    for path in (target, *([target.parent / model] if model else [])):
        if path.exists() and not args.force:
            raise CommandLineError(f"{path} exists already; give another --output, or --force to replace it")
    check_output_folder(str(target.parent), "--output")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, comment_recipe(recipes[name].read_text(encoding="utf-8"), name))
    print(f"{target}: written")
    if model:
        shutil.copytree(RECIPES / model, target.parent / model, dirs_exist_ok=True)
        print(f"{target.parent / model}: written, the shape of the model that the recipe begins with")
    print(next_steps(target, model))


def comment_recipe(text: str, name: str) -> str:
    """A recipe with what differs from machine to machine at its top, and a comment on every setting that has none."""
    from llava.train.flag_source import read_flags

    flags = read_flags()
    settings = {match[1] for line in text.splitlines() if (match := _KEY.match(line))}
    head, _, body = text.partition("\n\n")
    wanted = [flag for flag in PLACES if flag in head or flag in ("model_name_or_path", "data_path", "output_dir")]
    lines = [
        *(line for line in head.splitlines() if not re.match(r"# (Flags give the rest|--|`python -m)", line)),
        f"# A copy of the recipe {name}. Flags on the command line override it; llava train --help lists them.",
        "",
        "# Yours to fill in: take the # away, or give them as flags.",
        *(f"# {flag}: {PLACES[flag]} # {_first_sentence(flags[flag].help)}" for flag in wanted if flag not in settings),
        "# bf16: true # on a GPU that has it; fp16: true on an older one; neither on a CPU",
        "",
    ]
    for line in body.splitlines():
        match = _KEY.match(line)
        if match and "#" not in line and (flag := flags.get(match[1])) is not None and flag.help:
            line = f"{line} # {_first_sentence(flag.help)}"
        lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def _first_sentence(text: str) -> str:
    """The first sentence of a help, without its full stop."""
    whole = ""
    for part in re.split(r"(?<=\.) (?=[A-Z`-])|(?<=;) ", " ".join(text.replace("%%", "%").split())):
        whole = f"{whole} {part}".strip()
        if whole.count("(") == whole.count(")"):  # Not within parentheses.
            break
    return whole.rstrip(".;")


def next_steps(target: Path, model: str | None) -> str:
    """What to do with a recipe."""
    steps = [f"edit the top of {target}: model, data and output_dir"]
    if model:
        steps += [
            "make a tokenizer: llava tokenizer --data TEXT --output_dir output/tokenizer",
            f"make the model: llava init --model_path {target.parent / model} --tokenizer output/tokenizer "
            "--output_dir output/fresh",
        ]
    steps += [
        "look at the data: llava check DATA",
        f"look at the run: llava inspect --config {target}",
        f"train: llava train --config {target}",
    ]
    return "\n".join(["next:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))])


if __name__ == "__main__":
    sys.exit(main())
