"""Likelihood scores of every task but BLiMP, on made-up items in the official layout, against each candidate alone.

    python benchmarks/likelihood_tasks.py --tokenizer DIR --parity [MODEL_FOLDER ...]
    python benchmarks/likelihood_tasks.py --tokenizer DIR --speed

``--parity``: winners of all items, against a model in float64 that reads one candidate after the other. For tasks
with pictures, a language model stands behind a tower and a projector of random weights.
``--speed``: tasks with pictures, with a random model of 12 x 768 behind a random DINOv2-base, in float32, against
scoring each candidate alone: its picture decoded and encoded for it, and full logits of a forward pass of its own. The
two take turns on parts of the same items; times are those of the processor that this process used.

Each adds its figures to the file beside this one. Pictures are read from ``LLAVA_SHARED_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.constants import IMAGE_END, IMAGE_PATCH, IMAGE_START
from llava.data.media import load_media
from llava.eval.babylm.pairs import PairColumns, build_pair_tasks
from llava.eval.babylm.tasks import TASKS, find_tasks, read_items, read_sizes
from llava.eval.choices import Choice
from llava.eval.likelihood import LikelihoodScorer
from llava.eval.token_batches import count_positions
from llava.eval.token_rows import TextEncoder
from llava.eval.visual_rows import VisualEncoder
from llava.io import write_json
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import LoadedModel, load_model

RESULT = Path(__file__).with_suffix(".json")
PICTURES = Path(os.environ.get("LLAVA_SHARED_DATA", "../shared/data"), "image", "coco_boxes")
DISTRACTORS = 7
"""Wrong answers of an item of VQA in the official data."""

# Made-up items.


def split_words(text: str) -> list[str]:
    return text.split()


NOUNS = split_words("dog cat child teacher farmer doctor bird horse nurse painter driver singer baker sailor lawyer")
VERBS = split_words("sees likes follows helps finds calls knows hears paints pushes carries greets visits")
ADJECTIVES = split_words("small red happy tired old green quiet young brown tall clever hungry")
THINGS = split_words("book cup key hat ball map coat ring box pen bell shoe plate clock spoon")
WUGS = split_words("wug dax blick fep tove zug lorp kiv morf pleb glim snib")
DOMAINS = (
    "agent-properties", "material-dynamics", "material-properties", "physical-dynamics", "physical-interactions",
    "physical-relations", "quantitative-properties", "social-interactions", "social-properties", "social-relations",
    "spatial-relations",
)  # fmt: skip
COMPS = ("comps_base", "comps_wugs", "comps_wugs_dist-before", "comps_wugs_dist-in-between")
Row = dict[str, object]
Scores = tuple[float, ...]


def write_items(folder: Path, pictures: Sequence[Path], count: int) -> None:
    """``count`` items of every task in the official layout, and as many pairs in a table of columns with names."""
    draw = random.Random(0)
    files: dict[str, list[Row]] = {}
    for number in range(count):
        for name, row in make_rows(draw, number):
            files.setdefault(name, []).append(row)
    pairs = files.pop("pairs.tsv")
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = ["\t".join(pairs[0]), *("\t".join(map(str, row.values())) for row in pairs)]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for task, names in (("winoground", "ex_{}_img_{}"), ("vqa", "{}")):
        images = folder / f"{task}_filtered" / "images"
        images.mkdir()
        for number in range(count):
            picture = pictures[number % len(pictures)]
            name = names.format(number // 2, number % 2) if task == "winoground" else names.format(number)
            (images / f"{name}{picture.suffix}").symlink_to(picture.resolve())


def make_rows(draw: random.Random, number: int) -> Iterator[tuple[str, Row]]:
    """A row of each task: the file that it stands in, and its columns."""
    one, other, third = draw.sample(NOUNS, 3)
    verb, second = draw.sample(VERBS, 2)
    adjective, contrary = draw.sample(ADJECTIVES, 2)
    things = draw.sample(THINGS, DISTRACTORS + 1)
    wug, dax = draw.sample(WUGS, 2)
    sentence = f"The {adjective} {one} {verb} the {other}"
    yield (
        f"supplement_filtered/{('hypernym', 'turn_taking', 'qa_congruence_easy')[number % 3]}",
        {"sentence_good": f"{sentence}.", "sentence_bad": f"The {adjective} {other} {verb} the {one}."},
    )
    yield (
        f"ewok_filtered/{DOMAINS[number % len(DOMAINS)]}",
        {
            "Context1": f"{sentence}.", "Context2": f"The {one} {second} the {other}.",
            "Target1": f"The {one} is {adjective}.", "Target2": f"The {other} is {adjective}.",
            "Domain": DOMAINS[number % len(DOMAINS)], "ContextType": "direct", "ContextDiff": "antonym",
            "TargetDiff": "concept swap",
        },
    )  # fmt: skip
    boxes = "".join(f"Box {place} contains the {thing}, " for place, thing in enumerate(things[:3]))
    moved = "".join(f" Move the {things[step]} to Box {step + 1}." for step in range(number % 3))
    yield (
        f"entity_tracking/{('regular', 'ambiref', 'move_contents')[number % 3]}",
        {
            "input_prefix": f"{boxes}Box 3 contains nothing.{moved} Box {number % 4} contains",
            "options": [f" the {thing}." for thing in things[:5]], "numops": number % 3,
        },
    )  # fmt: skip
    prefix = "A {0}" if number % 4 == 0 else "A {1} is a kind of {0}. Therefore, a {1}"
    yield (
        f"comps/{COMPS[number % 4]}",
        {
            "prefix_acceptable": prefix.format(one, wug), "prefix_unacceptable": prefix.format(other, wug),
            "property_phrase": f"{verb} the {third}.",
        },
    )  # fmt: skip
    nominal = f"{wug}{number}able".replace("0", "o")
    yield (
        "wug_adj_nominalization/wug_adj",
        {"sentences": f"The {nominal}ity of the {one}.\tThe {nominal}ness of the {one}.", "ratio": draw.random()},
    )
    yield (
        "wug_past_tense/wug_past",
        {"sentences": f"The {one} {wug}{dax}ed the {other}.\tThe {one} {wug}{dax}t the {other}.", "ratio": 0.5},
    )
    yield (
        "winoground_filtered/winoground",
        {
            "caption_0": f"a {adjective} {one} and a {contrary} {other}",
            "caption_1": f"a {contrary} {one} and a {adjective} {other}",
            "image_idx": number // 2, "image_key": f"image_{number % 2}", "tag": "Adjective", "collapsed_tag": "Object",
        },
    )  # fmt: skip
    yield (
        "vqa_filtered/vqa_distractors_info",
        {
            "question": f"What is the {adjective} {one} behind the {third} holding?", "target_ans": things[0],
            "distractors": [*things[1:-1], f"a {contrary} {things[-1]}"], "idx_in_hf_dataset": number,
        },
    )  # fmt: skip
    yield ("pairs.tsv", {"sen": f"{sentence}.", "wrong_sen": f"The {adjective} {one} {verb} {other} the."})


def read_tasks(folder: Path, count: int) -> dict[str, list[Choice]]:
    """The first items of each task but BLiMP, as the command reads them."""
    found = find_tasks([str(folder)], [name for name in TASKS if name != "blimp"])
    assert not found.missing, found.missing
    tasks = [*found.tasks, *build_pair_tasks([str(folder / "pairs.tsv")], PairColumns())]
    return {data.name: [item.choice for item in read_items(data)[:count]] for data in tasks}


# Models.


@dataclass(frozen=True)
class Size:
    """Of a model with random weights; its tower takes ``side`` pixels, in patches of 14."""

    width: int
    layers: int
    tower_width: int
    tower_layers: int
    side: int


SPEED = Size(768, 12, 768, 12, 224)  # The tower is DINOv2-base.
PARITY = Size(256, 4, 128, 3, 56)


def save_tower(folder: Path, size: Size) -> str:
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=size.tower_width, num_hidden_layers=size.tower_layers, num_attention_heads=size.tower_width // 16,
        image_size=size.side, patch_size=14,
    )  # fmt: skip
    if size is SPEED:
        config.num_attention_heads = 12
    Dinov2Model(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": size.side * 8 // 7},
        "do_center_crop": True, "crop_size": {"height": size.side, "width": size.side},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def save_random_model(folder: Path, size: Size, tokenizer: PreTrainedTokenizerBase) -> str:
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = max(size.width // 64, 2)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=size.width, n_layer=size.layers, n_head=heads, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def add_vision(folder: str, tower: str) -> LoadedModel:
    """A language model behind a tower and a projector with random weights; each patch of an image is a token."""
    torch.manual_seed(2)
    loaded = load_model(folder, vision_tower=tower)
    loaded.model.eval()  # type: ignore[attr-defined]
    return loaded


def score_alone(model: LlavaMetaForCausalLM, tokenizer: PreTrainedTokenizerBase, choice: Choice) -> Scores:
    """Each candidate in a forward pass of its own, its image decoded and encoded for it."""
    assert model.vision is not None
    start, patch, end = map(tokenizer.convert_tokens_to_ids, (IMAGE_START, IMAGE_PATCH, IMAGE_END))
    scores = []
    for candidate in choice.candidates:
        inputs: dict[str, object] = {}
        before, space = tokenizer("").input_ids, ""
        if choice.media:
            inputs["images"] = [load_media(one, model.vision).frames for one in choice.media]
            inputs["modalities"] = ["image"] * len(choice.media)
            before = [*before, *[start, *[patch] * (model.vision.patches_per_side**2 - 2), end] * len(choice.media)]
            space = " "
        encoded = tokenizer(space + candidate.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([[*before, *encoded.input_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits  # type: ignore[operator]
        first = candidate.start + len(space) if candidate.start else 0
        places = [place + len(before) for place, (_, stop) in enumerate(encoded.offset_mapping) if stop > first]
        scored = torch.tensor([place for place in places if place])  # Nothing predicts the first token of all.
        log_probs = logits[0, scored - 1].log_softmax(-1).gather(1, ids[0, scored, None])
        scores.append(math.fsum(log_probs[:, 0].tolist()))
    return tuple(scores)


# What is measured.


def check_parity(loaded: LoadedModel, choices: Sequence[Choice]) -> dict[str, object]:
    """Winners of the items of a task, against float64 and one candidate at a time."""
    scorer = LikelihoodScorer(loaded.model, loaded.tokenizer)  # type: ignore[arg-type]
    exact = copy.deepcopy(loaded.model).double()  # type: ignore[attr-defined]
    found = scorer.score(choices)
    expected = [score_alone(exact, loaded.tokenizer, choice) for choice in choices]
    both = list(zip(found, expected, strict=True))
    told: dict[str, object] = {
        "items": len(choices),
        "same_winner": sum(winners(one) == winners(other) for one, other in both),
        "won_by_the_right_candidate": sum(scores.index(max(scores)) == 0 for scores in found),
        "smallest_lead_in_float64": min(sorted(scores)[-1] - sorted(scores)[-2] for scores in expected),
        "largest_difference_of_scores": max(abs(a - b) for one, other in both for a, b in zip(one, other, strict=True)),
    }
    if choices[0].media:
        pictures = [choice.media for choice in choices]
        shown = [replace(one, media=media) for one, media in zip(choices, pictures[1:] + pictures[:1], strict=True)]
        changes = [abs(changed[0] - own[0]) for changed, own in zip(scorer.score(shown), found, strict=True)]
        # Nothing would be proved of pictures that change nothing.
        told["median_change_of_a_score_by_another_picture"] = statistics.median(changes)
    return told


def winners(scores: Sequence[float]) -> list[int]:
    """The candidates that no other one is ahead of by more than float64's rounding."""
    return [place for place, score in enumerate(scores) if max(scores) - score <= 2.0**-40 * abs(score)]


def measure(work: Callable[[], list[Scores]]) -> tuple[float, list[Scores]]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure_speed(
    loaded: LoadedModel, tasks: dict[str, list[Choice]], turns: int, each: dict[str, int]
) -> dict[str, object]:
    """CPU seconds of both ways, in turns, on ``each`` so many items of a task a turn."""
    model, tokenizer = loaded.model, loaded.tokenizer
    scorer = LikelihoodScorer(model, tokenizer)  # type: ignore[arg-type]
    first = tasks["winoground"][-2:]
    scorer.score(first)  # Which ways the model allows, and how exact it is, are found once a model.
    score_alone(model, tokenizer, first[0])

    def alone(part: Sequence[Choice]) -> list[Scores]:
        return [score_alone(model, tokenizer, choice) for choice in part]

    report: dict[str, object] = {}
    a_candidate = {}
    for task, count in each.items():
        seconds: dict[str, list[float]] = {"alone": [], "ours": []}
        same, largest = 0, 0.0
        choices = tasks[task][: turns * count]
        for start in range(0, len(choices), count):
            part = choices[start : start + count]
            took, expected = measure(partial(alone, part))
            seconds["alone"].append(took)
            took, found = measure(partial(scorer.score, part))
            seconds["ours"].append(took)
            for one, other in zip(found, expected, strict=True):
                same += one.index(max(one)) == other.index(max(other))
                largest = max(largest, *(abs(a - b) for a, b in zip(one, other, strict=True)))
        candidates = len(choices[0].candidates)
        ratios = [slow / fast for slow, fast in zip(seconds["alone"], seconds["ours"], strict=True)]
        a_candidate[task] = {way: statistics.median(took) / count / candidates for way, took in seconds.items()}
        report[task] = {
            "items": len(choices),
            "candidates_of_an_item": candidates,
            "turns": len(ratios),
            "cpu_seconds_a_candidate": {way: round(took, 3) for way, took in a_candidate[task].items()},
            "times_as_fast": round(statistics.median(ratios), 2),
            "lowest_and_highest_turn": [round(min(ratios), 2), round(max(ratios), 2)],
            **count_distinct(loaded, choices[:count]),
            "same_winner": same,
            "largest_difference_of_scores": largest,
        }
        print(task, report[task], flush=True)
    sizes = {task: read_sizes()["full"][task][task] * len(tasks[task][0].candidates) for task in each}
    total = {way: sum(sizes[task] * a_candidate[task][way] for task in each) for way in ("alone", "ours")}
    report["both_at_official_sizes"] = {"candidates": sizes, "times_as_fast": round(total["alone"] / total["ours"], 2)}
    return report


def count_distinct(loaded: LoadedModel, choices: Sequence[Choice]) -> dict[str, float]:
    """What limits the gain: positions of the language model, and images, of which each candidate alone has its own."""
    encoder = VisualEncoder(loaded.model, TextEncoder(loaded.tokenizer, None, "the model"))  # type: ignore[arg-type]
    with torch.no_grad():
        rows, _ = encoder.read(choices, lambda function, *values: function(loaded.model, *values))
    total, distinct = count_positions([row for of_choice in rows for row in of_choice])
    images = len({media for choice in choices for media in choice.media})
    candidates = sum(len(choice.candidates) for choice in choices)
    return {
        "share_of_distinct_positions": round(distinct / total, 4),
        "share_of_distinct_images": round(images / candidates, 4),
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a folder with a fast tokenizer")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument(
        "--parity", nargs="*", metavar="DIR", help="language models; by default a random one of 4 x 256"
    )
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="DIR", help="a folder of *.jpg")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    versions = {
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    add_result(args.out, {"versions": versions})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_items(folder / "data", sorted(args.pictures.glob("*.jpg")), args.items)
        tasks = read_tasks(folder / "data", args.items)
        if args.speed:
            base = save_random_model(folder / "12x768", SPEED, tokenizer)
            loaded = add_vision(base, save_tower(folder / "base_tower", SPEED))
            found = measure_speed(loaded, tasks, args.turns, {"winoground": 2, "vqa": 1})
            add_result(args.out, {"speed": found})
            del loaded
        if args.parity is not None:
            tower = save_tower(folder / "tower", PARITY)
            for base in args.parity or [save_random_model(folder / "random_4x256", PARITY, tokenizer)]:
                loaded, found = add_vision(base, tower), {}
                for task, choices in tasks.items():
                    found[task] = check_parity(loaded, choices)
                    print(base, task, found[task], flush=True)
                    # After each task, as a real model takes an hour for all of them.
                    add_result(args.out, {"parity": {Path(base).name: found}})


def add_result(path: Path, found: dict[str, object]) -> None:
    """Put figures among those that are there."""
    result = json.loads(path.read_text()) if path.exists() else {}
    for name, value in found.items():
        result[name] = result.get(name, {}) | value
    write_json(path, result)


if __name__ == "__main__":
    main()
