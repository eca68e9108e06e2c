"""Two ranks with different modalities: what each engine makes of a schedule, beside one process.

    python benchmarks/mixed_ranks.py --output benchmarks/mixed_ranks.json

A schedule fixes the samples of every micro-batch of every rank. "tv i / t t" is one step: rank 0 has
a text and a video, then an image; rank 1 has two micro-batches of one text each. ``t`` is text, ``i``
an image, ``v`` and ``w`` are videos of three and of two frames, ``-`` is a batch without samples.

Each engine (DDP, ZeRO-1, ZeRO-2, ZeRO-3, FSDP2) trains a tiny model through 20 steps that are chosen to be
awkward, with some ways to build and to train a model; one process does the same over the same samples.
Reported are the largest difference of any final weight and how far training has moved the weights.

Weights are compared after AdamW with an epsilon of 1e-4. With the usual 1e-8, a gradient that is
rounding and nothing else (a key's bias in attention, for one) moves its weight as far as any other,
in whatever direction the rounding of the day points.

Tests run the same worker on shorter schedules: ``torchrun benchmarks/mixed_ranks.py --worker JOB.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from llava.config import GroundingConfig, VisionConfig
from llava.constants import VISUAL_TOKENS
from llava.data.collator import SupervisedCollator
from llava.grounding.syntax import span_text
from llava.train.distributed import leave_process_group
from llava.train.train import build_trainer
from llava.types import NO_COORDINATES, Batch, Coordinates, Example, VisualInput

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
RANKS = 2
ALLOWED_DIFFERENCE = 1e-5

AWKWARD = [
    "t t / v v",  # rank 0 has text alone, rank 1 video
    "t t / t t",  # nobody has media
    "v t / t w",  # the modality alternates between micro-batches, the length of videos between ranks
    "t v / v t",
    "wvi t / i t",  # one rank calls the resampler twice, the other not at all
    "t t / i -",  # images, which are not resampled; a batch without samples
    "t t / t t",
    "t vv / - wv",
]

VARIANTS: dict[str, dict[str, Any]] = {
    "packer": {},
    "checkpointing": {"gradient_checkpointing": "true"},
    "trained tower": {
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_vision_resampler,mm_language_model",
        "gradient_checkpointing": "true",
    },
    "newline": {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_resampler_type": "perceiver",
        "mm_projector_type": "mlp1x_res1x_gelu",
    },
    # Views of an image leave the packer's fast span without a gradient.
    "resampled views": {"image_aspect_ratio": "anyres", "mm_resample_images": "true"},
    # Tables of coordinates, which text uses as heads, media as positions, and some samples as targets too.
    "coordinates": {"stage": "2", "image_aspect_ratio": "pad", "num_spatial_tokens": 10, "num_temporal_tokens": 10},
}

_FLAGS: dict[str, Any] = {
    "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4,
    "mm_resampler_width": 32, "mm_resampler_heads": 4, "num_frames": 3, "learning_rate": 1e-3,
    "lr_scheduler_type": "constant", "weight_decay": 0.1, "adam_epsilon": 1e-4, "save_strategy": "no",
    "logging_steps": 1, "report_to": "none", "use_cpu": "true", "disable_tqdm": "true", "seed": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training run.

    Args:
        model: folder of a plain language model.
        tower: folder of a vision model; None trains on text alone.
        output: folder for the trained model and, for each rank, what was watched.
        schedule: steps as in the module's docstring.
        flags: flags of the command line that differ from the usual ones here.
    """

    model: str
    tower: str | None
    output: str
    schedule: list[str]
    flags: dict[str, Any] = field(default_factory=dict)

    def argv(self, engine: str | None, num_micro_batches: int) -> list[str]:
        values = {
            **_FLAGS, "model_name_or_path": self.model, "vision_tower": self.tower, "output_dir": self.output,
            "data_path": Path(self.model) / "data.json", "max_steps": len(self.schedule),
            "gradient_accumulation_steps": num_micro_batches,
            "deepspeed": engine if engine and engine.startswith("zero") else None,
            "fsdp": "true" if engine == "fsdp" else None,
            **self.flags,
        }  # fmt: skip
        if self.tower is None:
            values |= {name: None for name in values if name.startswith("mm_")}
        return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


# The worker: one rank of one engine, or the process that all of them are compared with.


def make_example(
    kind: str, seed: int, tokenizer: Any, vision: VisionConfig | None, grounding: GroundingConfig | None = None
) -> Example:
    """A sample of random text and pixels, always the same for a seed; with coordinates, every video has a span."""
    generator = torch.Generator().manual_seed(seed)
    frames, size, modality = {"t": (0, None, None), "i": (1, (90, 60), "image"), "v": (3, (60, 60), "video"),
                              "w": (2, (60, 60), "video")}[kind]  # fmt: skip
    words = torch.randint(1, 60, (int(torch.randint(3, 9, (), generator=generator)),), generator=generator).tolist()
    if modality is None:
        return Example(f"{kind}{seed}", words, words)
    assert vision is not None
    spans = vision.layout.spans(modality, frames, size)
    ids = [i for span in spans for i in tokenizer(span.text, add_special_tokens=False)["input_ids"]]
    if modality == "image" and vision.anyres is not None:
        frames = vision.anyres.num_views(size)
    coordinates = NO_COORDINATES
    if grounding is not None and modality == "video":
        words += tokenizer(span_text(), add_special_tokens=False)["input_ids"]
        coordinates = Coordinates(temporal_output_locations=tuple(torch.rand(2, generator=generator).tolist()))
    shape = (frames, 3, vision.image_size, vision.image_size)
    pixels = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    media = [VisualInput(modality, pixels, size)]
    return Example(f"{kind}{seed}", ids + words, [-100] * len(ids) + words, media, coordinates)


def micro_batches(schedule: Sequence[str], rank: int | None) -> Iterator[list[tuple[str, int]]]:
    """Kinds and seeds of the samples of each micro-batch of a rank, or of all ranks one after the other."""
    seed = 0
    for step in schedule:
        for owner, batches in enumerate(step.split(" / ")):
            for batch in batches.split():
                kinds = batch.replace("-", "")
                if rank in (None, owner):
                    yield [(kind, seed + i) for i, kind in enumerate(kinds)]
                seed += len(kinds)


class Watch(TrainerCallback):
    """Sees, step by step, which parts the optimizer moved and the language model's gradients.

    A part has moved if a bit of its weights or of the optimizer's state of it has changed.
    """

    def __init__(self) -> None:
        self.moved: list[list[str]] = []
        self.gradients: list[list[str]] = []
        self._before: dict[Tensor, str] = {}

    def on_train_begin(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        # Wrappers of accelerate and DeepSpeed keep what they wrap under this name.
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        optimizer.register_step_pre_hook(self._note_before)
        optimizer.register_step_post_hook(self._note_after)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.moved.append([])
        self.gradients.append([])

    def _note_before(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._before[parameter] = _digest(parameter, *_state(optimizer, parameter))
                if group["vision_module"] is None:
                    assert parameter.grad is not None
                    self.gradients[-1].append(_digest(parameter.grad))

    def _note_after(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if self._before[parameter] != _digest(parameter, *_state(optimizer, parameter)):
                    self.moved[-1] = sorted({*self.moved[-1], group["vision_module"] or "language_model"})


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [torch.as_tensor(state[name]) for name in sorted(state)]


def _digest(*tensors: Tensor) -> str:
    # Of FSDP's tensors each rank has a share.
    own = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in own)).hexdigest()


def train(job: Job, engine: str | None) -> None:
    """Train as a job says, on this rank of an engine, or on all samples in one process."""
    rank = None if engine is None else int(os.environ["RANK"])
    ranks = job.schedule[0].split(" / ")
    trainer = build_trainer(job.argv(engine, len(ranks[0].split()) * (len(ranks) if rank is None else 1)))
    tokenizer, vision, grounding = trainer.processing_class, trainer.model.vision, trainer.model.grounding
    collator = SupervisedCollator(tokenizer.pad_token_id)
    batches: list[Batch] = [
        collator([make_example(kind, seed, tokenizer, vision, grounding) for kind, seed in batch])
        for batch in micro_batches(job.schedule, rank)
    ]
    build_loader = trainer.get_train_dataloader

    def load_schedule() -> DataLoader:
        build_loader()  # The trainer keeps the order that it makes; only the batches are others.
        return DataLoader(batches, batch_size=None)

    trainer.get_train_dataloader = load_schedule
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    trainer.save_model()
    watched = {"moved": watch.moved, "gradients": watch.gradients}
    Path(job.output, f"watched-{rank or 0}.json").write_text(json.dumps(watched))


def work(path: Path) -> None:
    """Do the jobs of a file, as one rank."""
    orders = json.loads(path.read_text())
    for job in orders["jobs"]:
        train(Job(**job), orders["engine"])
    leave_process_group()


def launch(engine: str, jobs: Sequence[Job], timeout: float = 600, python: str = sys.executable) -> None:
    """Train each job with one engine on two ranks; a rank that fails or waits for ever is an error."""
    with tempfile.TemporaryDirectory() as folder:
        orders = Path(folder, "orders.json")
        orders.write_text(json.dumps({"engine": engine, "jobs": [asdict(job) for job in jobs]}))
        command = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--standalone",
                   str(Path(__file__).resolve()), "--worker", str(orders)]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": python}
        # DeepSpeed builds a small operator with ninja, which stands beside the interpreter.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        launcher = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        try:
            _, errors = launcher.communicate(timeout=timeout)
        finally:
            # Asked to end, torchrun ends its ranks; killed, it would leave them waiting for each other.
            launcher.terminate()
            launcher.wait()
    if launcher.returncode:
        raise RuntimeError(f"{engine} ended with {launcher.returncode}:\n{errors[-6000:]}")


# What is compared.


def weights(job: Job) -> dict[str, Tensor]:
    return load_file(Path(job.output, "model.safetensors"))


def difference(one: Job, other: Job) -> float:
    """The largest absolute difference of any weight."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def watched(job: Job, rank: int = 0) -> dict[str, Any]:
    return json.loads(Path(job.output, f"watched-{rank}.json").read_text())


def write_models(folder: Path) -> tuple[str, str]:
    """A plain GPT-2 whose tokenizer knows the visual tokens, and a tower; both tiny, of random weights."""
    names = ["<|endoftext|>", *(f"word{i}" for i in range(60))]
    bare = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<|endoftext|>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|endoftext|>")
    tokenizer.add_tokens(list(VISUAL_TOKENS), special_tokens=True)
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model, tower = folder / "model", folder / "tower"
    GPT2LMHeadModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    # What the library would read; the worker puts its own samples in their place.
    text = {"id": "a", "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "word1 word2"}]}
    (model / "data.json").write_text(json.dumps([text]))
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(vision).save_pretrained(tower)
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64}, "do_center_crop": True,
                 "crop_size": {"height": 56, "width": 56},
                 "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # fmt: skip
    (tower / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(model), str(tower)


def sweep(folder: Path, num_steps: int, engines: Sequence[str]) -> dict[str, Any]:
    """Largest differences by variant and engine."""
    model, tower = write_models(folder)
    schedule = list(islice(cycle(AWKWARD), num_steps))

    def job(variant: str, engine: str) -> Job:
        return Job(model, tower, str(folder / engine / variant), schedule, VARIANTS[variant])

    for engine in engines:
        launch(engine, [job(variant, engine) for variant in VARIANTS])
    report: dict[str, Any] = {}
    for variant in VARIANTS:
        alone, still = job(variant, "alone"), job(variant, "still")
        train(alone, None)
        train(Job(**{**asdict(still), "flags": still.flags | {"learning_rate": 0}}), None)
        differences = {engine: difference(alone, job(variant, engine)) for engine in engines}
        report[variant] = {"largest difference": differences, "largest movement": difference(alone, still)}
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mixed modalities on two ranks against one process.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report = sweep(Path(name), args.steps, args.engines)
    for variant, figures in report.items():
        each = ", ".join(f"{engine} {value:.1e}" for engine, value in figures["largest difference"].items())
        print(f"{variant:<16}{each}; moved by {figures['largest movement']:.1e}")
    worst = max(value for figures in report.values() for value in figures["largest difference"].values())
    if args.output:
        versions = {package: version(package) for package in ("torch", "transformers", "deepspeed")}
        setting = {"steps": args.steps, "ranks": RANKS, "allowed": ALLOWED_DIFFERENCE}
        args.output.write_text(json.dumps({**versions, **setting, "variants": report}, indent=1) + "\n")
    return int(worst > ALLOWED_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
