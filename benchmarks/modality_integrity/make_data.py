"""The data of the black-image question: one text, and captioned pictures, in the forms that the five arms need.

python benchmarks/modality_integrity/make_data.py --shared ../shared/data --text_words 200000 --out DIR

Text is drawn from novels, in chunks. Pictures are stills of the demo's generator with English captions, and real
photographs; for every text chunk there are about two pictures, so that 32 % of all samples are text. Files:

    text.jsonl        the text alone
    text_black.jsonl  the same, each chunk behind a black picture
    captions.jsonl    captions behind their pictures
    captions_text.jsonl  the same captions without pictures
    held_out.jsonl    other text from the same novels, to evaluate on
    black_features.safetensors  what the tower sees in the black picture, for zero_black.py
    data.json         how much of everything
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from llava.demo.scenes import FRAME_SIZE, Scene, composite, render_background, render_coverage, sample_scene  # noqa: E402
from llava.demo.sentences import COLOURS, SHAPES  # noqa: E402

TEXT_SHARE = 0.32
"""Of all samples: what it was in the data that the question comes from."""
PHOTOGRAPH_SHARE = 0.2
"""Of the captions."""
TOWER = ROOT / "llava" / "demo" / "tower"
ENGLISH = {
    "cerchio": "circle", "quadrato": "square", "triangolo": "triangle", "stella": "star", "croce": "cross",
    "luna": "moon", "rosso": "red", "giallo": "yellow", "bianco": "white", "verde": "green", "blu": "blue",
    "viola": "purple", "rosa": "pink", "arancione": "orange",
}  # fmt: skip
SCENES = (
    "a {colour} {shape} {place} of the picture", "there is a {colour} {shape} {place}",
    "the picture shows a {colour} {shape} on a {light} background", "{place} we see a {shape}, and it is {colour}",
    "the {shape} that lies {place} of this picture is {colour}", "a {light} background with a {colour} {shape} {place}",
    "what stands {place} is a {colour} {shape}", "a {shape} is {place}, and its colour is {colour}",
)  # fmt: skip
PHOTOGRAPHS = (
    "a photograph of {all}", "this photograph shows {all}", "there {be} {all} in the photograph",
    "we see {all} in this picture", "the picture was taken of {all}",
    "{first} can be seen on the {side} of the photograph",
)  # fmt: skip
BY_HAND = {
    "astronaut.png": ["an astronaut in an orange suit smiles in front of a flag", "a woman in a space suit"],
    "chelsea.png": ["a ginger cat looks past the camera", "the face of a cat with green eyes"],
    "china.jpg": ["an old palace stands among trees under a cloudy sky", "roofs of a palace behind some trees"],
    "coffee.png": ["a cup of coffee with a spoon stands on a wooden table", "somebody has poured a cup of coffee"],
    "flower.jpg": ["a large flower in bloom", "the petals of a flower from very near"],
    "hubble_deep_field.jpg": ["many galaxies shine in the dark sky", "stars and galaxies as a telescope sees them"],
    "rocket.jpg": ["a rocket takes off in the evening", "fire and smoke lie below a rocket that rises"],
}
PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice", "scissors": "scissors",
           "skis": "skis", "broccoli": "broccoli", "bus": "buses", "bench": "benches", "sandwich": "sandwiches",
           "toothbrush": "toothbrushes", "wine glass": "wine glasses", "couch": "couches"}  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with text_en and image")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text_words", type=int, default=200_000)
    parser.add_argument("--held_out_words", type=int, default=10_000)
    parser.add_argument("--words_per_chunk", type=int, default=80)
    parser.add_argument("--num_scenes", type=int, default=2000, help="pictures of the generator, each used again")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    folder = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)  # Of a call that was cut off.
    (folder / "pictures").mkdir(parents=True)
    train, held_out = draw_text(args.shared, args.text_words, args.held_out_words, args.words_per_chunk, rng)
    Image.new("RGB", (FRAME_SIZE, FRAME_SIZE)).save(folder / "pictures" / "black.png")
    num_captions = round(len(train) * (1 - TEXT_SHARE) / TEXT_SHARE)
    photographs = read_photographs(args.shared / "image", folder / "pictures", rng)
    scenes = draw_scenes(folder / "pictures", args.num_scenes, args.seed, args.num_processes)
    captions = [
        (name, rng.choice(texts))
        for name, texts in (
            rng.choice(photographs if rng.random() < PHOTOGRAPH_SHARE else scenes) for _ in range(num_captions)
        )
    ]
    files = {
        "text": [sample(f"text-{i}", text) for i, text in enumerate(train)],
        "text_black": [sample(f"text-{i}", text, "pictures/black.png") for i, text in enumerate(train)],
        "captions": [sample(f"caption-{i}", text, f"pictures/{name}") for i, (name, text) in enumerate(captions)],
        "captions_text": [sample(f"caption-{i}", text) for i, (_, text) in enumerate(captions)],
        "held_out": [sample(f"held-{i}", text) for i, text in enumerate(held_out)],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    distance = write_black_features(folder)
    summary = {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "shared")},
        "text_samples": len(train),
        "text_words": count_words(train),
        "caption_samples": len(captions),
        "caption_words": count_words(text for _, text in captions),
        "photographs": len(photographs),
        "held_out_words": count_words(held_out),
        "least_distance_from_black": distance,
    }
    summary["arguments"].pop("num_processes")
    (folder / "data.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    folder.rename(args.out)
    print(json.dumps(summary))


def sample(name: str, text: str, image: str | None = None) -> dict[str, object]:
    """A line of a data file; with an image it comes before the text."""
    turns = [{"from": "human", "value": "" if image is None else "<image>"}, {"from": "gpt", "value": text}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def count_words(texts: object) -> int:
    return sum(len(text.split()) for text in texts)  # type: ignore[attr-defined]


# Text.


def draw_text(
    shared: Path, num_words: int, num_held_out: int, words_per_chunk: int, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Chunks to train on and chunks to evaluate on, from all novels, each chunk once."""
    with gzip.open(shared / "text_en" / "eltec_eng.txt.gz", "rt", encoding="utf-8") as lines:
        chunks = list(join_paragraphs(lines, words_per_chunk))
    rng.shuffle(chunks)
    found: tuple[list[str], list[str]] = ([], [])
    for texts, wanted in zip(found, (num_words, num_held_out), strict=True):
        words = 0
        while words < wanted:
            texts.append(chunks.pop())
            words += len(texts[-1].split())
    return found


def join_paragraphs(lines: object, most_words: int) -> object:
    """Sentences of consecutive paragraphs, joined up to a number of words; a longer sentence is cut."""
    held: list[str] = []
    for line in lines:  # type: ignore[attr-defined]
        for sentence in re.split(r"(?<=[.!?][\"']) |(?<=[.!?]) ", line.strip()):
            words = sentence.split()[:most_words]
            if len(held) + len(words) > most_words:
                yield " ".join(held)
                held = []
            held += words
    if held:
        yield " ".join(held)


# Pictures.


def draw_scenes(folder: Path, number: int, seed: int, num_processes: int) -> list[tuple[str, list[str]]]:
    """Stills of the demo's generator, with a caption from each pattern."""
    draw = partial(draw_scene, folder, seed)
    if num_processes == 1:
        return [draw(index) for index in range(number)]
    with ProcessPoolExecutor(num_processes) as pool:
        return list(pool.map(draw, range(number), chunksize=64))


def draw_scene(folder: Path, seed: int, index: int) -> tuple[str, list[str]]:
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng, [(shape, colour) for shape in SHAPES for colour in COLOURS])
    frame = int(rng.integers(len(scene.centres)))
    pixels = composite(render_background(scene.background), render_coverage(scene, frame), scene.rgb)
    name = f"scene-{index:05d}.png"
    Image.fromarray(pixels).save(folder / name)
    return name, [pattern.format(**describe_scene(scene, frame)) for pattern in SCENES]


def describe_scene(scene: Scene, frame: int) -> dict[str, str]:
    """The words of a caption: what can be seen in the still."""
    x, y = (2.0 * part / FRAME_SIZE - 1 for part in scene.centres[frame])
    level = np.mean([scene.background.first, scene.background.last])
    if max(abs(x), abs(y)) < 0.15:
        place = "in the middle"
    elif abs(x) > abs(y):
        place = "on the left" if x < 0 else "on the right"
    else:
        place = "at the top" if y < 0 else "at the bottom"
    return {
        "shape": ENGLISH[scene.shape], "colour": ENGLISH[scene.colour], "place": place,
        "light": "dark" if level < 78 else "grey",
    }  # fmt: skip


def read_photographs(images: Path, folder: Path, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Photographs with captions made from the things in them, or written by hand; at the tower's size."""
    found = []
    for entry in json.loads((images / "coco_boxes" / "boxes.json").read_text()):
        texts = describe_things(entry["objects"])
        if texts:
            shrink(images / "coco_boxes" / entry["image"], folder / f"{Path(entry['image']).stem}.png")
            found.append((f"{Path(entry['image']).stem}.png", texts))
    for name, texts in BY_HAND.items():
        shrink(images / "photos" / name, folder / f"{Path(name).stem}.png")
        found.append((f"{Path(name).stem}.png", texts))
    return found


def describe_things(things: list[dict[str, object]]) -> list[str]:
    """Sentences about the categories of the boxes in a photograph, most frequent first, three at most."""
    counts = Counter(str(thing["category"]) for thing in things).most_common(3)
    if not counts:
        return []
    names = [count_things(category, number) for category, number in counts]
    told = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    box = next(thing["box"] for thing in things if thing["category"] == counts[0][0])
    words = {
        "all": told, "first": names[0], "be": "is" if counts[0][1] == 1 else "are",
        "side": "left" if box[0] + box[2] < 1 else "right",  # type: ignore[index]
    }  # fmt: skip
    # Where one thing is can be told of one thing alone.
    patterns = PHOTOGRAPHS if counts[0][1] == 1 else PHOTOGRAPHS[:-1]
    return [pattern.format(**words) for pattern in patterns]


def count_things(category: str, number: int) -> str:
    """ "two people", "an orange", "some broccoli"."""
    if category in ("broccoli", "scissors", "skis"):
        return f"some {category}"
    if number == 1:
        return f"{'an' if category[0] in 'aeiou' else 'a'} {category}"
    plural = PLURALS.get(category, f"{category}s")
    return f"{NUMBERS[number - 2] if number - 2 < len(NUMBERS) else 'many'} {plural}"


def shrink(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        image.convert("RGB").resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.BICUBIC).save(target)


def write_black_features(folder: Path) -> float:
    """Store what the tower makes of the black picture; returns how near any other picture comes to it, relatively."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Model

    tower = Dinov2Model.from_pretrained(TOWER).eval()
    told = json.loads((TOWER / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(told[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))

    def encode(path: Path) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255
        with torch.no_grad():
            states = tower(((pixels - mean) / std)[None], output_hidden_states=True).hidden_states
        return states[-1][0, 1:]  # As layer -1 is taken: before the last norm, without the class token.

    black = encode(folder / "pictures" / "black.png")
    others = [path for path in sorted((folder / "pictures").glob("*.png")) if path.stem != "black"][:400]
    nearest = min(float((encode(path) - black).norm() / black.norm()) for path in others)
    if nearest < 0.3:
        raise SystemExit(f"a picture is nearly black to the tower (distance {nearest:.2f}), as zero_black.py sees it")
    save_file({"black": black.contiguous()}, folder / "black_features.safetensors")
    return round(nearest, 3)


if __name__ == "__main__":
    main()
