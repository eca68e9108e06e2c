"""``python -m llava.eval.run``: ask a model about every sample of a file, and score what it says.

parse_arguments           this file
read_annotations          annotations/     files -> samples
PredictionStore           store.py         the folder: what is done, and with which settings
run_shares                engine.py        one process or several, each with a device
  answer_batches          engine.py        samples -> questions -> the model -> rows on disk
    task.ask              tasks.py
score_all                 tasks.py         rows -> scores, with llava.eval.metrics
check_blind               this file        once more with other samples' media: does the score fall?
write_report              report.py        scores.json
write_pictures            report.py        the best and the worst answers, drawn
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from llava.command import INTERRUPTED, CommandParser, check_at_least, run_command
from llava.eval.annotations import BOX_FORMATS, MediaFolders, read_annotations
from llava.eval.store import BLIND, PICTURES, SCORES, SETTINGS, EvalSample, Prediction, PredictionStore, Row, Settings
from llava.eval.tasks import EXPRESSION, TASKS, Task
from llava.io import hash_json, num_cores
from llava.serve.decoding import add_model_flags, decoding_options, describe_decoding
from llava.types import ERROR, ON_BAD_SAMPLE, BadSample

if TYPE_CHECKING:
    from llava.config import VisionConfig
    from llava.eval.blind import BlindCheck
    from llava.eval.engine import AnswererSource
    from llava.eval.report import Report

_NUM_RESAMPLES = 1000
_MAX_NEW_TOKENS = 128
_DIGITS = 16
_LEAST = {"batch_size": 1, "num_processes": 1, "num_pictures": 0, "limit": 1, "decode_timeout": 0, "seed": 0}
"""Flags with a number, and the least it may be."""


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m llava.eval.run",
        description="Ask a model about every sample of annotation files, and score its answers.",
        epilog="The same command goes on where it was interrupted. Exit status: 0, 2 for a user's mistake, 130 for ^C.",
    )
    parser.add_argument("--task", required=True, metavar="NAME", help=f"{', '.join(TASKS)} (docs/evaluation.md)")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="annotation files or data files")
    parser.add_argument("--out", required=True, metavar="DIR", help="where predictions, scores and pictures go")
    parser.add_argument(
        "--image_folder", metavar="DIR", help="what image paths start from (default: the file's folder)"
    )
    parser.add_argument("--video_folder", metavar="DIR", help="the same for videos")
    parser.add_argument("--allow_outside_paths", action="store_true", help="let paths lead out of these folders")
    parser.add_argument("--split", metavar="NAME", help="only entries of this split, such as testA (rec)")
    parser.add_argument(
        "--box_format", default=BOX_FORMATS[0], choices=BOX_FORMATS, help="what four numbers of a row tell (rec)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    parser.add_argument("--prompt", metavar="TEMPLATE", help="the question, with {expression}, {span}, {box}")
    add_model_flags(parser, _MAX_NEW_TOKENS)
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="answered together (default 16)")
    parser.add_argument(
        "--num_processes", type=int, default=1, metavar="N", help="on the CPU, or each with a GPU (default 1)"
    )
    parser.add_argument(
        "--decode_timeout", metavar="X", type=float, default=60.0, help="seconds a video may take (default 60)"
    )
    parser.add_argument(
        "--on_bad_sample", default=ERROR, choices=ON_BAD_SAMPLE, help="stop, or count it 0 and go on (default error)"
    )
    parser.add_argument("--num_pictures", type=int, default=8, metavar="N", help="best and worst to draw (default 8)")
    parser.add_argument(
        "--no_blind_check", action="store_true", help="do not ask once more with other samples' images or videos"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what another evaluation left in --out")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a ValueError for flags that are wrong."""
    args = build_parser().parse_args(argv)
    check_at_least(args, _LEAST)
    decoding_options(args, _MAX_NEW_TOKENS)
    return args


def evaluate(args: argparse.Namespace, source: AnswererSource | None = None) -> Report:
    """Answer what is not answered yet, score everything and write it down.

    Args:
        args: the command line.
        source: makes what is asked, on a device; by default a ``CaptionerSource`` of the checkpoint.

    Returns:
        What ``scores.json`` holds.

    Raises:
        ValueError: a user's mistake, in one line.
    """
    from llava.eval.report import write_pictures, write_report
    from llava.eval.tasks import score_all
    from llava.registry import import_plugins

    import_plugins(args.plugins)
    task = TASKS.get(args.task)
    # In this order: annotations are checked, then the folder is taken, then the model is loaded.
    samples = read_samples(args, task)
    settings = describe(args, task, samples)
    store = PredictionStore(args.out, settings, args.overwrite)
    rows = answer_all(args, samples, store, source)
    # From the rows, not from what was just said: a run that goes on scores in the same way.
    predictions = [Prediction.from_row(row) for row in rows]
    scored = score_all(task, predictions, samples, _NUM_RESAMPLES, args.seed)
    rows = [
        {**row, "reference": sample.reference.to_row(), "scores": scores}
        for row, sample, scores in zip(rows, samples, scored.rows, strict=True)
    ]
    store.finish(rows)
    blind = None if args.no_blind_check else check_blind(args, task, samples, settings, rows, source)
    content = write_report(
        store.folder / SCORES, settings, scored.report, rows, blind, seed=args.seed, num_resamples=_NUM_RESAMPLES,
        level=0.95,
    )  # fmt: skip
    vision = read_vision(args.model_path)
    write_pictures(store.folder / PICTURES, samples, rows, task, args.num_pictures, vision)
    return content


def check_blind(
    args: argparse.Namespace,
    task: Task,
    samples: Sequence[EvalSample],
    settings: Settings,
    rows: Sequence[Row],
    source: AnswererSource | None,
) -> BlindCheck | None:
    """Ask about all samples once more, each with another one's image or video, and see whether the score falls.

    Returns:
        None where nothing else can be shown.
    """
    import numpy as np

    from llava.eval.blind import check_blindness
    from llava.eval.tasks import score_all

    chosen, swapped = swap_samples(samples, [index for index, row in enumerate(rows) if "bad" not in row], args.seed)
    if not chosen:
        print("no blind check: all samples are shown the same, or nothing", file=sys.stderr)
        return None
    # A folder of its own: it goes on where it was interrupted as the other one does.
    told = settings | {"samples": hash_json([asdict(sample) for sample in swapped], _DIGITS)}
    store = PredictionStore(os.path.join(args.out, BLIND), told, overwrite=_is_other(args, told))
    answered = answer_all(args, swapped, store, source)
    # The own answers of the same samples anew: CIDEr weighs words by how many of all references have them.
    own, other = (
        score_all(task, [Prediction.from_row(row) for row in table], asked, 1, args.seed).rows
        for table, asked in (
            ([rows[index] for index in chosen], [samples[index] for index in chosen]),
            (answered, swapped),
        )
    )
    store.finish([{**row, "scores": scores} for row, scores in zip(answered, other, strict=True)])
    outcomes = [np.array([100 * scores[task.main_score] for scores in table]) for table in (own, other)]
    check = check_blindness(outcomes[0], outcomes[1], args.seed)
    if check.is_blind:
        print(f"warning: {check.describe(f'{args.task}, {task.main_score}')}", file=sys.stderr)
    return check


def _is_other(args: argparse.Namespace, settings: Mapping[str, object]) -> bool:
    """Whether the blind check in the folder is of other settings: the folder is this evaluation's, so it is stale."""
    path = Path(args.out, BLIND, SETTINGS)
    try:
        return bool(path.read_bytes()) and json.loads(path.read_bytes()) != settings
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def swap_samples(samples: Sequence[EvalSample], usable: Sequence[int], seed: int) -> tuple[list[int], list[EvalSample]]:
    """Samples with the media of others of the same kinds, of which there may be as many in a question.

    Args:
        samples: of the evaluation.
        usable: indices of those that were answered.
        seed: of the choice.

    Returns:
        The indices of those that can be shown something else, and the samples as they are then.
    """
    from llava.eval.blind import media_key, swap

    kinds: dict[tuple[str, ...], list[int]] = {}
    for index in usable:
        if samples[index].media:
            kinds.setdefault(tuple(media.kind for media in samples[index].media), []).append(index)
    swapped: dict[int, EvalSample] = {}
    for indices in kinds.values():
        shown = swap([(samples[i].media, samples[i].split) for i in indices], lambda one: media_key(one[0]), seed)
        for index, (media, split) in zip(indices, shown or (), strict=shown is not None):
            swapped[index] = replace(samples[index], media=media, split=split)
    return sorted(swapped), [swapped[index] for index in sorted(swapped)]


def read_samples(args: argparse.Namespace, task: Task) -> list[EvalSample]:
    """The samples to ask about, each with all that the task needs."""
    folders = MediaFolders(args.image_folder, args.video_folder, args.allow_outside_paths)
    samples = read_annotations(task.layout, args.data, folders, args.box_format, args.split)[: args.limit]
    if args.prompt is not None:
        # Before a model is loaded, which may take minutes.
        task.check_template(args.prompt)
    for sample in samples:
        task.check_reference(sample)
        if sample.fault is not None and args.on_bad_sample == ERROR:
            raise ValueError(f"{sample}: {sample.fault}; go on without such samples with --on_bad_sample skip")
    return samples


def describe(args: argparse.Namespace, task: Task, samples: Sequence[EvalSample]) -> Settings:
    """What the answers depend on: a run with other settings does not go on with them.

    References may be corrected behind a run, which then scores again, where no question tells a part of them.
    """
    from llava.model.pretrained import locate_model

    model = Path(locate_model(args.model_path, "--model_path"))
    if not model.is_dir():
        raise ValueError(f"--model_path {args.model_path!r} is no folder; give that of a checkpoint")
    # Sorted: the order of a folder differs from one file system to the next.
    weights = sorted(file for file in model.iterdir() if file.suffix in (".safetensors", ".json", ".bin"))
    # Where a sample stands and whether its file is there may change; what is asked may not.
    aside = {"source": None, "fault": None} | ({"reference": None} if task.fields == (EXPRESSION,) else {})
    decoding = decoding_options(args, _MAX_NEW_TOKENS)
    settings: Settings = {
        "task": args.task,
        "model": os.path.abspath(model),
        # A checkpoint that was trained on, or another in its place, has files of another size or time.
        "model_files": hash_json(
            [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights], _DIGITS
        ),
        "model_base": args.model_base and os.path.abspath(args.model_base),
        # As given, not resolved: the samples' hash tells whether they are the same.
        "data": list(args.data),
        "limit": args.limit,
        "prompt": args.prompt,
        "bits": args.bits,
        "sub_bin": args.sub_bin,
        "max_new_tokens": decoding["max_new_tokens"],
        "num_beams": decoding["num_beams"],
        "decoding": decoding | ({"seed": args.seed} if decoding["do_sample"] else {}),
        "samples": hash_json([asdict(sample) | aside for sample in samples], _DIGITS),
    }
    if args.feature_cache:
        import torch

        from llava.data.feature_cache.cache import FeatureCache

        # Answers depend on the form of features that is not the one in which the tower gives them.
        storage = FeatureCache(args.feature_cache).storage
        if not storage.is_exact(torch.float32):
            settings["features"] = str(storage)
    return settings


def read_vision(model_path: str) -> VisionConfig | None:
    """The visual settings that a checkpoint's ``config.json`` tells; None where it has none."""
    from llava.config import VisionConfig

    config = Path(model_path, "config.json")
    if not config.is_file():
        return None
    # No model is loaded for it: only which frames it saw is of interest here.
    return VisionConfig.from_model_config(SimpleNamespace(**json.loads(config.read_bytes())))


def answer_all(
    args: argparse.Namespace, samples: Sequence[EvalSample], store: PredictionStore, source: AnswererSource | None
) -> list[Row]:
    """The rows of all samples: those of the store, and where there is none, or a bad one is an error, new ones."""
    rows = store.read()
    # Without skip, bad samples are asked again: their files may have been mended meanwhile.
    done = {index for index, row in rows.items() if "bad" not in row or args.on_bad_sample != ERROR}
    if len(done) < len(samples):
        _answer_missing(args, samples, done, store, source)
        rows = store.read()
    found = [rows[index] for index in range(len(samples))]
    bad = [row for row in found if "bad" in row]
    if bad and args.on_bad_sample == ERROR:
        first = BadSample(bad[0]["id"], bad[0]["source"], **bad[0]["bad"])
        raise ValueError(
            f"{len(bad)} of {len(found)} samples have no answer, all others have; the first: {first}; count them 0 "
            "with --on_bad_sample skip"
        )
    if len(bad) == len(found):
        raise ValueError(
            f"all {len(found)} samples are bad; the first: {found[0]['id']!r}: {found[0]['bad']['reason']}"
        )
    return found


def _answer_missing(
    args: argparse.Namespace,
    samples: Sequence[EvalSample],
    done: set[int],
    store: PredictionStore,
    source: AnswererSource | None,
) -> None:
    """Ask about the samples that are not done, with a progress bar where somebody watches."""
    from tqdm import tqdm

    from llava.eval.engine import Asking, CaptionerSource, Share, choose_devices, find_batches, run_shares

    batches = find_batches(len(samples), args.batch_size, done)
    devices = choose_devices(args.device, args.num_processes)[: len(batches)]
    asking = Asking(
        task=args.task,
        template=args.prompt,
        batch_size=args.batch_size,
        sub_bin=args.sub_bin,
        on_bad_sample=args.on_bad_sample,
        decode_timeout=args.decode_timeout,
        options=decoding_options(args, _MAX_NEW_TOKENS),
        seed=args.seed,
    )
    source = source or CaptionerSource(
        args.model_path, args.vision_tower, args.model_base, args.bits, args.feature_cache, args.feature_cache_strict
    )
    # Processes on one CPU would each start as many threads as it has cores.
    threads = max(num_cores() // len(devices), 1) if len(devices) > 1 else 0
    shares = [
        Share(
            source, samples, batches[number :: len(devices)], asking, device, store.part(number),
            tuple(args.plugins or ()), threads,
        )
        for number, device in enumerate(devices)
    ]  # fmt: skip
    waiting = sum(map(len, batches))
    with tqdm(total=len(samples), initial=len(samples) - waiting, unit="sample", disable=None) as bar:
        run_shares(shares, bar.update)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print the scores; returns the exit status, 2 with one line for a user's mistake."""
    status = run_command(lambda: _evaluate_and_print(parse_arguments(argv)))
    if status == INTERRUPTED:
        print("the same command goes on where it stopped", file=sys.stderr)
    return status


def _evaluate_and_print(args: argparse.Namespace) -> None:
    from transformers import logging

    from llava.eval.report import format_report

    # Standard output is the table's alone.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    content = evaluate(args)
    print(format_report(content))
    print(describe_decoding(content["settings"]["decoding"], args.model_path))


if __name__ == "__main__":
    sys.exit(main())
