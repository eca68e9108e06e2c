"""How much memory a step will take at most: told before the first one, and compared with what is there.

A row of a few short lengths goes through the language model, and what autograd keeps of it is counted; of the vision
modules, one image and one clip. From these follow the activations of the largest batch that the data can make.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.data.dataset import SupervisedDataset
from llava.data.dataset_stats import count_media
from llava.data.module import RunDataset
from llava.messages import explain_error
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.base import VisionTower
from llava.types import MediaKind

if TYPE_CHECKING:
    from llava.train.arguments import TrainingArguments
    from llava.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

_GIB = 2**30
_LENGTHS = (32, 64, 96)
"""Tokens of the rows that are tried: three, as what is kept grows by the length and by its square."""
_MOST_FRAMES = 16
"""Frames of the clip that is tried; of longer ones more is kept in proportion."""
_OPTIMIZER_COPIES = {"sgd": 0.0, "adafactor": 0.05, "lion": 1.0, "rmsprop": 1.0, "adagrad": 1.0}
"""State of an optimizer in copies of what it trains, by the beginning of its name; Adam and others hold two."""
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Variables of the environment by which a user tells glibc what to keep."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As malloc.h of glibc has them."""
_FAILURES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, OSError, AssertionError)
"""What a trial of parts may fail with."""
_CGROUP_LIMIT, _CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


class Precision(Protocol):
    """What says in which precision a run computes, which is accelerate's ``Accelerator``."""

    def autocast(self) -> AbstractContextManager[Any]: ...


class MeasuredRun(Protocol):
    """What an estimate asks a run for, which a ``LlavaTrainer`` has."""

    model: LlavaMetaForCausalLM
    args: TrainingArguments
    train_dataset: Any

    @property
    def accelerator(self) -> Precision: ...


class LargestBatch(NamedTuple):
    """The most that a batch of one process holds."""

    rows: int
    length: int  # tokens of a row
    sample: int  # tokens of the longest sample, which attention looks at
    targets: int  # tokens that are predicted
    images: float
    videos: float


class MemoryEstimate(NamedTuple):
    """Bytes of a process on its device, at the most memory-hungry moment of a step."""

    held: int  # weights, and what else is there before the first step
    gradients: int
    optimizer: int
    activations: int

    @property
    def to_come(self) -> int:
        return self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        return self.held + self.to_come


class Kept(NamedTuple):
    """What autograd keeps of a forward pass, in bytes."""

    total: float
    largest: float  # of one tensor


def report_memory(trainer: LlavaTrainer) -> None:
    """Print what a step is estimated to take at most, and warn where there is less.

    Nothing is said with DeepSpeed, which holds weights and states in ways of its own, and for data sets of a program's
    own. Random states stay as they are. What cannot be estimated, such as parts of a program's own that are not made
    for a trial, is said, and trained all the same.
    """
    if trainer.is_deepspeed_enabled or trainer.args.process_index:
        return
    try:
        batch = find_largest_batch(trainer)
        if batch is None:
            return
        estimate = estimate_memory(trainer, batch)
        available = available_memory(trainer.args.device)
    except _FAILURES as error:
        logger.warning("how much memory a step takes cannot be told beforehand: %s", explain_error(error))
        return
    print(f"{describe_memory(estimate, batch, 'held now')}; free: {show_bytes(available)}", flush=True)
    if estimate.to_come > available:
        logger.warning(
            "a step may need %.1f GiB more than are free (%.1f of %.1f GiB): lower --per_device_train_batch_size and "
            "raise --gradient_accumulation_steps, or give --gradient_checkpointing true, a smaller --model_max_length, "
            "or --max_tokens_per_batch",
            (estimate.to_come - available) / _GIB, available / _GIB, estimate.to_come / _GIB,
        )  # fmt: skip


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on a CPU have freed for the next ones, in place of returning it to the system.

    From 32 MiB on each tensor is otherwise mapped anew, and the system clears all of its pages: a step of 8 rows spends
    14 to 19 % of its time on it (``benchmarks/growth.json``). ``ALLOCATOR_VARIABLES`` of the environment say otherwise.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Another system, or another C library.
        return
    mallopt(_M_MMAP_THRESHOLD, _GIB)
    mallopt(_M_TRIM_THRESHOLD, 2 * _GIB - 1)


def describe_memory(estimate: MemoryEstimate, batch: LargestBatch, held: str) -> str:
    """One line for people; ``held`` says behind its size what is there before the first step."""
    parts = {
        held: estimate.held,
        "of gradients": estimate.gradients,
        "of the optimizer": estimate.optimizer,
        f"of activations, of {batch.rows} x {batch.length} tokens": estimate.activations,
    }
    listed = " + ".join(f"{show_bytes(size)} {name}" for name, size in parts.items())
    return f"memory of a step, at most: about {show_bytes(estimate.total)} ({listed})"


def show_bytes(size: float) -> str:
    """A size in the unit that suits it."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"


def find_largest_batch(trainer: MeasuredRun) -> LargestBatch | None:
    """The largest batch that the data can make; None where the data do not tell."""
    args, dataset = trainer.args, trainer.train_dataset
    documents = getattr(dataset, "documents", dataset)
    if not isinstance(documents, SupervisedDataset):
        return None
    lengths = np.clip(np.abs(cast("RunDataset", dataset).lengths), 1, documents.max_length)  # (samples,)
    # The same for the texts that a chunked text is of; what is chunked has no media.
    whole = np.clip(np.abs(documents.lengths), 1, documents.max_length)
    counts = count_media(documents.records)  # (2, samples): images, videos
    texts = np.clip(whole - positions_of_media(documents, counts), 1, None)  # (samples,)
    rows, longest = args.per_device_train_batch_size, int(lengths.max())
    if args.max_tokens_per_batch is not None:
        rows = min(max(args.max_tokens_per_batch // longest, 1), len(lengths))
    width = documents.max_length if args.packing else longest
    if not args.packing and args.max_tokens_per_batch is None:
        targets, *media = rows * texts.max(), *(rows * count.max() for count in counts)
    else:
        # Samples of all kinds come together: as many media and targets as so many tokens have on average.
        share = rows * width / whole.sum()
        targets, *media = (max(each.sum() * share, each.max()) for each in (texts, *counts))
    return LargestBatch(rows, width, longest, int(targets), *map(float, media))


def positions_of_media(dataset: SupervisedDataset, counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Visual positions that samples have at least, int32 (samples,), where their number is known beforehand."""
    vision = dataset.vision
    if vision is None:
        return np.zeros_like(counts[0])
    image = 0 if vision.anyres is not None else vision.layout.num_tokens("image", 1)
    video = 0 if vision.video_fps > 0 else vision.layout.num_tokens("video", vision.num_frames)
    return image * counts[0] + video * counts[1]


def estimate_memory(trainer: MeasuredRun, batch: LargestBatch) -> MemoryEstimate:
    """What a step on a batch takes at most."""
    model, args = trainer.model, trainer.args
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    copies = next((n for name, n in _OPTIMIZER_COPIES.items() if str(args.optim).startswith(name)), 2.0)
    if "8bit" in str(args.optim):
        copies /= 4
    with trying(trainer):
        activations = language_model_bytes(model, batch, bool(args.gradient_checkpointing))
        activations += vision_bytes(model, batch)
        activations = max(activations, tower_workspace(model))
    return MemoryEstimate(held_memory(args.device), trained, int(copies * trained), int(activations))


@contextmanager
def trying(trainer: MeasuredRun) -> Iterator[None]:
    """Forward passes as training has them, which leave random states and the model's mode as they were."""
    device, was_training = trainer.args.device, trainer.model.training
    devices = [] if device.type == "cpu" else [device]
    trainer.model.train()
    try:
        fork = torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type)
        with fork, trainer.accelerator.autocast():
            yield
    finally:
        trainer.model.train(was_training)


def language_model_bytes(model: LlavaMetaForCausalLM, batch: LargestBatch, checkpointing: bool) -> float:
    """Bytes of activations of the language model and its head."""
    steps = sorted(
        {max(batch.length * i // 3, 2) if batch.length < _LENGTHS[-1] else _LENGTHS[i - 1] for i in (1, 2, 3)}
    )
    kept = [count_kept(model, partial(run_text, model, n, 0)) for n in steps]
    # What does not grow (weights that autocast has cast, for one) is there once; the rest for each row. Attention looks
    # at samples, not at the rows that they share.
    powers = np.polyfit(steps, [k.total for k in kept], len(steps) - 1)[::-1]
    fixed, linear, square, *_ = (*(max(float(power), 0.0) for power in powers), 0.0, 0.0)
    of_rows = batch.rows * batch.length * (linear + square * batch.sample)
    if checkpointing:
        # The inputs of all layers, in the embeddings' type, and the inside of the one that is computed again.
        layers = model.config.num_hidden_layers
        of_rows = batch.rows * batch.length * embeddings_of(model)[:1].nbytes * layers + of_rows / layers
    # The head runs where something is predicted; the gradient of its logits is there while they still are.
    with_head = count_kept(model, partial(run_text, model, steps[-1], steps[-1]))
    of_head = batch.targets * (with_head.total - kept[-1].total + with_head.largest) / steps[-1]
    # So it is with the largest tensor of a layer.
    return fixed + of_rows + max(of_head, batch.rows * batch.length * kept[-1].largest / steps[-1])


def run_text(model: LlavaMetaForCausalLM, length: int, targets: int) -> Any:
    """The loss of one row of text at its last positions."""
    device = embeddings_of(model).device
    ids = torch.full((1, length), find_plain_token(model), device=device)  # (1, length)
    labels = ids.masked_fill(torch.arange(length, device=device) < length - targets, IGNORE_INDEX)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, return_logits=False)


def embeddings_of(model: LlavaMetaForCausalLM) -> Tensor:
    """The table of a language model's token embeddings, (vocabulary, width)."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def find_plain_token(model: LlavaMetaForCausalLM) -> int:
    """A token that is neither visual nor a coordinate."""
    visual = set() if model.vision is None else set(model.vision.token_ids.values())
    return next(i for i in range(model.config.vocab_size) if i not in visual)


def vision_bytes(model: LlavaMetaForCausalLM, batch: LargestBatch) -> float:
    """Bytes of activations of projector and resampler, and of a tower that trains."""
    vision, decoder = model.vision, model.get_model()
    if vision is None:
        return 0.0
    tower: VisionTower = decoder.vision_tower
    views = 1 if vision.anyres is None else vision.anyres.most_views
    total, device = 0.0, embeddings_of(model).device
    clip = min(vision.max_frames, _MOST_FRAMES)
    kinds: dict[MediaKind, tuple[float, int]] = {"image": (batch.images, views), "video": (batch.videos, clip)}
    for kind, (number, frames) in kinds.items():
        if not number:
            continue
        if kind == "video" and vision.is_bounded:
            number *= vision.max_frames / frames
        features = torch.zeros(frames, vision.patches_per_side**2, vision.hidden_size, device=device, dtype=tower.dtype)

        def run(kind: MediaKind = kind, features: Tensor = features) -> Any:
            projected = decoder.mm_projector(features)  # (frames, patches, width)
            group = projected.unsqueeze(1 if kind == "image" else 0)  # (media, frames, patches, width)
            return projected if decoder.vision_resampler is None else decoder.vision_resampler(group, kind)

        total += number * count_kept(model, run).total
        if tower.trainable:
            pixels = torch.zeros(1, 3, vision.image_size, vision.image_size, dtype=torch.uint8, device=device)
            total += number * frames * count_kept(model, partial(tower, pixels)).total
    return total


def tower_workspace(model: LlavaMetaForCausalLM) -> float:
    """Bytes that a frozen tower works with: a few of its widest activations, of the frames of one call."""
    vision, tower = model.vision, model.get_vision_tower()
    if vision is None or tower is None or tower.trainable:
        return 0.0
    tokens = vision.patches_per_side**2 + 1
    # Input and output of a layer's inner product of four times the width, and what stands around them.
    device = embeddings_of(model).device
    return float(tower.frames_at_once(device) * tokens * vision.hidden_size * 16 * tower.dtype.itemsize)


def count_kept(model: nn.Module, run: Callable[[], Any]) -> Kept:
    """What autograd keeps of a forward pass, the model's own weights aside."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = run()  # noqa: F841  Held, so that no memory is freed and given out again while it is counted.
    return Kept(float(sum(kept.values())), float(max(kept.values(), default=0)))


# The machine.


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds now on its device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def available_memory(device: torch.device) -> int:
    """Bytes that are free: of the GPU, or of the machine within the limit of the process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
        return free if limit == "max" else max(min(free, int(limit) - int(_CGROUP_USED.read_text())), 0)
    except (OSError, ValueError):  # No such file system, or another version of it.
        return free
