"""``python -m llava.data.feature_cache build``: the features of all images and clips of data files, ahead of training.

parse_build      this file         its own flags and the trainer's, of which those count that the features depend on
prepare          this file         model, data and cache, as a training run makes them
make_plan        feature_plan.py   every image and clip once, in shards that are always cut alike
build_share      this file         the shards of one process: decoded, run through the tower, written
storage_table    feature_errors.py what each form of keeping features costs
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import set_seed

from llava.command import check_at_least
from llava.data.dataset import SupervisedDataset
from llava.data.feature_cache.cache import FLAG
from llava.data.feature_cache.flags import STORAGES, build_parser
from llava.data.feature_cache.keys import frames_at_most
from llava.data.feature_cache.run import RunFeatures
from llava.data.feature_cache.shards import SUFFIX, Kept, remove_unfinished
from llava.data.feature_cache.storage import Storage
from llava.data.media_files import check_media_folders
from llava.data.module import documents_of, make_supervised_data_module
from llava.io import num_cores
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.command_line import build_group, parse_values, read_array_task
from llava.train.feature_cache import check_feature_cache, set_up_features
from llava.train.feature_errors import storage_table
from llava.train.feature_plan import Item, ItemMedia, Plan, Share, make_plan
from llava.train.parts import set_up_parts
from llava.train.train import choose_format, choose_max_length, load_from_arguments
from llava.types import ERROR, BadSample, VisualInput

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import Queue

FRAMES_AT_ONCE = 8
"""Frames of a call of the tower."""
_TIMED = 4
"""Images and clips that an estimate is made of."""
_COUNTING = (
    "bf16", "fp16", "tf32", "use_cpu", "seed", "data_seed", "dataloader_num_workers", "attn_implementation",
    "model_max_length", "lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_weight_path", "bits",
    "quant_type", "double_quant",
)  # fmt: skip
"""Flags that say which model is run, and how; the others of their group, of steps, logs and saving, have no effect."""


@dataclass(frozen=True)
class BuildOptions:
    """What a command line asks for."""

    model_args: ModelArguments
    data_args: DataArguments
    training_args: TrainingArguments
    storage: Storage | None
    processes: int
    share: Share


def parse_build(words: Sequence[str]) -> BuildOptions:
    """Read the flags of a build; a ValueError for those that are wrong."""
    parser = build_parser()
    own, rest = parser.parse_known_args(words)
    check_at_least(own, {"processes": 1})
    values = parse_values(rest, optional=("output_dir", "learning_rate"), also=parser.flags)
    if not values["feature_cache"]:
        raise ValueError(f"{FLAG} is missing: give the folder that the features go to")
    values |= {"feature_cache_fill": True, "feature_cache_strict": False, "feature_cache_storage": None}
    model_args, data_args = build_group(ModelArguments, values), build_group(DataArguments, values)
    args = TrainingArguments(**{name: values[name] for name in _COUNTING if name in values}, report_to=["none"])
    args.deepspeed = values["deepspeed"]  # It is not started; it says in what precision the tower runs.
    asked = own.storage is not None or own.pool != 1
    storage = Storage(own.storage or (STORAGES[1] if args.bf16 else STORAGES[0]), own.pool) if asked else None
    task = read_array_task()
    share = read_share(own.shard) if own.shard else task or (0, 1)
    if args.world_size > 1:
        share = (share[0] * args.world_size + args.process_index, share[1] * args.world_size)
    return BuildOptions(model_args, data_args, args, storage, own.processes, share)


def read_share(text: str) -> Share:
    """The share that ``I/N`` names, counted from 0."""
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard is {text!r}; expected I/N, part I of N, such as 1/8 and up to 8/8")
    return int(first) - 1, int(second)


@dataclass
class Prepared:
    """All that a process needs."""

    options: BuildOptions
    model: LlavaMetaForCausalLM
    datasets: list[SupervisedDataset]
    features: RunFeatures
    plan: Plan

    def autocast(self) -> AbstractContextManager[Any]:
        """What the tower computes in, as in training."""
        args = self.options.training_args
        if args.deepspeed or not (args.bf16 or args.fp16):
            return nullcontext()
        return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)


def prepare(options: BuildOptions) -> Prepared:
    """Model, data and cache, as a training run makes them."""
    model_args, data_args, args = options.model_args, options.data_args, options.training_args
    check_media_folders(data_args.image_folder, data_args.video_folder)
    check_feature_cache(model_args, data_args)
    set_seed(
        args.seed
    )  # Of modules that are new: the loss that the table of forms tells is that of a run's first step.
    loaded = load_from_arguments(model_args, data_args, args)
    set_up_parts(loaded, model_args, args)
    if args.deepspeed and (args.bf16 or args.fp16):
        loaded.model.to(torch.bfloat16 if args.bf16 else torch.float16)
    features = set_up_features(loaded, data_args, args, options.storage)
    length = choose_max_length(args.model_max_length, loaded.model)
    text_format = choose_format(data_args.format_name, loaded.tokenizer, loaded.model.config)
    seed = args.seed if args.data_seed is None else args.data_seed
    made = make_supervised_data_module(
        loaded.tokenizer, data_args, loaded.vision, length, text_format, seed, loaded.model.grounding
    )
    given = [made["train_dataset"], made["eval_dataset"]]
    datasets = [documents_of(dataset) for dataset in given if dataset is not None]
    plan = make_plan(datasets, features)
    if plan.unreadable and data_args.on_bad_sample == ERROR:
        datasets[0].load_media(plan.unreadable[0][0])  # It says what is wrong with the file.
    return Prepared(options, loaded.model.eval(), datasets, features, plan)


# One process.


def encode(prepared: Prepared, items: Sequence[Item]) -> Iterator[tuple[Item, VisualInput, Tensor] | BadSample]:
    """Decode items and run them through the tower: each with its features, (frames, patches, width), in order."""
    args, tower = prepared.options.training_args, prepared.model.get_vision_tower()
    assert tower is not None
    tower.to(args.device)
    media = ItemMedia(items, prepared.datasets[0], prepared.features)
    loader = DataLoader(media, batch_size=None, shuffle=False, num_workers=args.dataloader_num_workers)
    waiting: list[tuple[Item, VisualInput]] = []

    def run() -> Iterator[tuple[Item, VisualInput, Tensor]]:
        frames = torch.cat([decoded.frames for _, decoded in waiting])
        with torch.inference_mode(), prepared.autocast():
            parts = [tower(part.to(args.device)).cpu() for part in frames.split(FRAMES_AT_ONCE)]
        lengths = [len(decoded.frames) for _, decoded in waiting]
        for (item, decoded), features in zip(waiting, torch.cat(parts).split(lengths), strict=True):
            yield item, decoded, features
        waiting.clear()

    for item, decoded in zip(items, loader, strict=True):
        if isinstance(decoded, BadSample):
            yield decoded
            continue
        waiting.append((item, decoded))
        if sum(len(one.frames) for _, one in waiting) >= FRAMES_AT_ONCE:
            yield from run()
    if waiting:
        yield from run()


def build_share(prepared: Prepared, share: Share, on_item: Callable[[BadSample | None], None]) -> None:
    """Make the shards of a share that are not there.

    Raises:
        ValueError: an image or a clip is bad, and bad samples are an error.
        OSError: a shard cannot be written; those that are there stay.
    """
    features = prepared.features
    cache = features.cache
    shards = prepared.plan.missing(cache, share)
    # Two builds at once begin at different places, and meet.
    begin = os.getpid() % len(shards) if shards else 0
    for shard in [*shards[begin:], *shards[:begin]]:
        if (cache.folder / f"{shard.name}{SUFFIX}").exists():
            for _ in shard.items:
                on_item(None)
            continue
        kept: list[Kept] = []
        for found in encode(prepared, shard.items):
            if isinstance(found, BadSample):
                if prepared.options.data_args.on_bad_sample == ERROR:
                    raise ValueError(f"{found}; go on without such samples with --on_bad_sample skip")
                on_item(found)
                continue
            item, decoded, own = found
            kept.append(Kept.of(features.entry_of(item.key, decoded), own, cache.storage))
            on_item(None)
        if kept:
            cache.add(shard.name, kept, features.keys.contexts)


# The command.


def build(words: Sequence[str]) -> None:
    """Build the features that a command line asks for, and say what came of it."""
    options = parse_build(words)
    prepared = prepare(options)
    features, share = prepared.features, options.share
    cache = features.cache
    remove_unfinished(cache.folder)
    for name in [f"{shard.name}{SUFFIX}" for shard in prepared.plan.shards]:
        if name in cache.damaged:
            cache.remove(name)  # It is made anew.
    left = [item for shard in prepared.plan.missing(cache, share) for item in shard.items]
    say = print if options.training_args.process_index == 0 else _say_nothing
    of_all = "" if share[1] == 1 else f"; part {share[0] + 1} of {share[1]} is made here"
    say(f"{len(prepared.plan.items)} images and clips in {len(prepared.plan.shards)} shards{of_all}; "
        f"{len(left)} are to be made, kept as {cache.storage}", flush=True)  # fmt: skip
    bad: list[BadSample] = []
    if left:
        say(estimate(prepared, left), flush=True)
        progress = tqdm(total=len(left), unit="file", disable=None, position=0)

        def on_item(found: BadSample | None) -> None:
            progress.update()
            if found is not None:
                bad.append(found)

        try:
            with progress:
                if options.processes == 1:
                    build_share(prepared, share, on_item)
                else:
                    build_in_processes(words, options, on_item)
        except OSError as error:
            cache.look()
            done = sum(item.key in cache for item in prepared.plan.items)
            raise ValueError(
                f"{FLAG} {cache.folder}: cannot be written: {error.strerror or error}; the {done} images and clips of "
                f"{len(prepared.plan.items)} that are in it stay: make room, and give the same command again"
            ) from error
    finish(prepared, bad, say)
    if left:
        with torch.random.fork_rng(devices=[]):
            prepared.model.to(options.training_args.device)
            say(storage_table(prepared.model, prepared.datasets[0], cache.storage, prepared.autocast()), flush=True)


def _say_nothing(*_: object, **__: object) -> None:
    pass


def estimate(prepared: Prepared, left: Sequence[Item]) -> str:
    """How large the features will be and how long they take, by the first few; the disk must have room."""
    features, options = prepared.features, prepared.options
    vision, storage = features.keys.vision, features.cache.storage
    for _ in encode(prepared, left[:1]):  # What is read and set up once counts for nothing.
        pass
    start = time.perf_counter()
    frames = sum(
        len(found[2]) for found in islice(encode(prepared, left[:_TIMED]), _TIMED) if not isinstance(found, BadSample)
    )
    seconds = (time.perf_counter() - start) / min(_TIMED, len(left)) * len(left) / options.processes
    total = sum(frames_at_most(vision, item.media.kind) for item in left)
    size = storage.num_bytes(total, vision.patches_per_side**2, vision.hidden_size)
    free = shutil.disk_usage(features.cache.folder).free
    text = (
        f"at most {total} frames, {size / 2**30:.2f} GiB ({free / 2**30:.1f} GiB are free); about "
        f"{describe_seconds(seconds)} by the first {min(_TIMED, len(left))} of them ({frames} frames)"
    )
    return text if size <= free else f"{text}. WARNING: the disk has no room for all of it"


def describe_seconds(seconds: float) -> str:
    """Such as "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def finish(prepared: Prepared, bad: Sequence[BadSample], say: Callable[..., None]) -> None:
    """Say what is there now."""
    cache, plan = prepared.features.cache, prepared.plan
    cache.look()
    done = sum(item.key in cache for item in plan.items)
    size = sum(shard.size for shard in cache.shards.values())
    for sample in bad:
        say(f"bad: {sample}")
    for record, media in plan.unreadable:
        say(f"bad: {record}: {media.path}: cannot be read")
    rest = len(plan.items) - done
    still = f"; {rest} have none (bad, or the other parts')" if rest else ""
    say(f"{done} of {len(plan.items)} images and clips have features{still}; {cache.folder} has {size / 2**30:.2f} GiB")


# Several processes.


def build_in_processes(
    words: Sequence[str], options: BuildOptions, on_item: Callable[[BadSample | None], None]
) -> None:
    """Make a share in processes of their own, each with a part of it and a model."""
    context = multiprocessing.get_context("spawn")
    messages: Queue[object] = context.Queue()
    first, total = options.share
    shares = [(first * options.processes + i, total * options.processes) for i in range(options.processes)]
    threads = max(1, num_cores() // options.processes)
    workers: list[BaseProcess] = [
        context.Process(target=work, args=(list(words), share, threads, messages, os.getpid())) for share in shares
    ]
    try:
        for worker in workers:
            worker.start()
        running = len(workers)
        while running:
            try:
                message = messages.get(timeout=1.0)
            except queue.Empty:
                if dead := [w for w in workers if w.exitcode not in (None, 0)]:
                    status = dead[0].exitcode
                    raise ValueError(f"a process of the build ended with status {status}; what is made stays") from None
                continue
            if message == "done":
                running -= 1
            elif isinstance(message, ValueError | OSError):
                raise message
            else:
                assert message is None or isinstance(message, BadSample)
                on_item(message)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def work(words: list[str], share: Share, threads: int, messages: Queue[object], parent: int) -> None:
    """One of several processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The first one ends this one.
    torch.set_num_threads(threads)

    def on_item(found: BadSample | None) -> None:
        messages.put(found)
        if os.getppid() != parent:  # Nobody follows any more.
            os._exit(1)

    try:
        options = parse_build(words)
        prepared = prepare(dataclasses.replace(options, processes=1))
        build_share(prepared, share, on_item)
        messages.put("done")
    except OSError as error:
        messages.put(OSError(error.errno, error.strerror or str(error)))
    except ValueError as error:
        messages.put(ValueError(str(error)))
