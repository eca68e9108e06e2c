"""What one training step of the Italian recipe costs, and how little of it is this library's own.

    python benchmarks/train_step.py --full-logits --checkpointing --eager --kernels --before \
        --output benchmarks/train_step.json

The recipe is the real one, with random weights: GPT-2 12 x 768 over 30,000 tokens, DINOv2-large cut
behind the selected layer, batches of 4 clips, 4 frames of 224 pixels each, 81 and 9 latents. Two
kinds of steps alternate in one run, on the same weights and the same optimizer:

- library: a step of ``LlavaTrainer.train`` as it is, from examples in memory to the end of the step:
  collating, normalising, tower, projector, packer, splicing, GPT-2, loss, backward, gradient
  clipping, optimizer, scheduler and all that the trainer does around them.
- floor: the same modules called bare on tensors that lie ready. Normalised pixels go through
  transformers' ``Dinov2Model``, as many frames a call and by the products that the library has it do,
  then projector and packer; their features are joined with ready text embeddings (no look-up) and go
  through transformers' own ``GPT2Model``, which shares the parameters; head and cross entropy at the
  supervised positions, backward, clipping, optimizer.

Decoding is measured beside them, since worker processes do it. Times are CPU seconds of this process
on one thread: other processes disturb them little, and alternation shares what is left.

``--full-logits``, ``--checkpointing``, ``--eager`` and ``--kernels`` (eager attention, ``--fused_gelu`` and
``--onednn``) add steps of the library in which only that is different. None of them touches the frozen
tower, so those steps take its features and its time from the library's step before them. ``--before`` adds
steps as they were without what is on by default today: the tower in one call and by MKL, and freed memory
returned to the system. ``gains`` says how many times as fast the steps with ``--kernels`` are as these.

What a stage holds: "tower" is its forward pass (frozen); "packer" is projector and resampler;
"language model" is GPT-2 with head and loss; "optimizer" is clipping, AdamW and clearing gradients;
"rest" is everything else, which the floor has nothing of but the join.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Dinov2Config, GPT2Config, GPT2Model, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from llava.compat import linear_by_onednn
from llava.config import VisionConfig
from llava.constants import IGNORE_INDEX, VISUAL_TOKENS
from llava.data.collator import SupervisedCollator, model_inputs
from llava.data.module import make_supervised_data_module
from llava.model import llava_arch
from llava.model.language_model.llava_gpt2 import LlavaGPT2Config, LlavaGPT2ForCausalLM
from llava.model.multimodal_encoder import base
from llava.model.vocabulary import add_visual_tokens
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.flops import FORWARD, ModelFlops
from llava.train.memory import keep_freed_memory
from llava.train.parts import fuse_gelu, set_trainable_parts, unfused_gelus
from llava.train.trainer import LlavaTrainer
from llava.types import Batch, Example

STAGES = (
    "tower", "packer forward", "language model forward", "language model backward", "packer backward",
    "optimizer", "rest",
)  # fmt: skip
VARIANTS = ("full_logits", "checkpointing", "eager", "kernels")
BEFORE = "before"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED_RATIO = 1.05


@dataclass(frozen=True)
class Sizes:
    """The recipe's sizes; ``QUICK`` is for a smoke test."""

    vocabulary: int = 30_000
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    tower_width: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16
    tower_image: int = 518
    frame_side: int = 224
    latents: int = 81
    latents_fast: int = 9
    resampler_width: int = 1024
    num_frames: int = 4
    batch: int = 4
    caption_words: int = 16
    clip_size: tuple[int, int] = (480, 360)
    clip_frames: int = 96


RECIPE = Sizes()
QUICK = Sizes(
    vocabulary=200, context=128, width=32, layers=2, heads=4, tower_width=32, tower_layers=3, tower_heads=4,
    tower_image=56, frame_side=56, latents=9, latents_fast=4, resampler_width=32, num_frames=3,
    clip_size=(64, 48), clip_frames=8,
)  # fmt: skip


# The model, the clips and the captions.


def build_vision(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> VisionConfig:
    tower = Dinov2Config(
        hidden_size=sizes.tower_width,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.tower_image,
        patch_size=14,
    )
    return VisionConfig(
        vision_tower="random weights",
        vision_config=tower.to_diff_dict() | {"model_type": tower.model_type},
        hidden_size=sizes.tower_width,
        image_size=sizes.frame_side,
        image_resize_size=sizes.frame_side * 8 // 7,
        patches_per_side=sizes.frame_side // 14,
        resampler_type="fast_slow_resampler",
        perceiver_latents=sizes.latents,
        perceiver_latents_fast=sizes.latents_fast,
        resampler_width=sizes.resampler_width,
        num_frames=sizes.num_frames,
        token_ids=dict(zip(VISUAL_TOKENS, tokenizer.convert_tokens_to_ids(list(VISUAL_TOKENS)), strict=True)),
    )


def build_model(
    sizes: Sizes, tokenizer: PreTrainedTokenizerFast, half: torch.dtype | None = None
) -> LlavaGPT2ForCausalLM:
    """The recipe's model with random weights; GPT-2's dropout is the default of its configuration."""
    config = LlavaGPT2Config(
        vocab_size=len(tokenizer),
        n_positions=sizes.context,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **build_vision(sizes, tokenizer).to_model_config(),
    )
    model = LlavaGPT2ForCausalLM(config)
    set_trainable_parts(model, ["mm_mlp_adapter", "mm_vision_resampler", "mm_language_model"], half=half)
    return model


def build_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """A vocabulary of whole words, so that a caption has as many tokens as words, and the visual tokens."""
    words = ["<|endoftext|>", *(f"parola{i}" for i in range(1, sizes.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    add_visual_tokens(fast)
    return fast


def write_clip(path: Path, sizes: Sizes, seed: int) -> None:
    """A clip in H.264: smooth noise that drifts, under a moving square."""
    width, height = sizes.clip_size
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, height // 8, width // 8)))
    scene = F.interpolate(coarse, size=(height, width), mode="bilinear")[0].permute(1, 2, 0).byte().numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(sizes.clip_frames):
            image = np.roll(scene, 2 * i, axis=1).copy()
            left = i * (width - height // 4) // sizes.clip_frames
            image[height // 3 : height // 3 + height // 4, left : left + height // 4] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_data(folder: Path, sizes: Sizes) -> Path:
    """Clips with captions of about ``caption_words`` words, as a data file."""
    rng = random.Random(0)
    samples = []
    for i in range(sizes.batch):
        write_clip(folder / f"{i}.mp4", sizes, seed=i)
        length = sizes.caption_words - 2 + i % 5
        caption = " ".join(f"parola{rng.randrange(1, sizes.vocabulary)}" for _ in range(length))
        turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": caption}]
        samples.append({"id": str(i), "video": f"{i}.mp4", "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    return path


# Measuring.


@dataclass
class Clock:
    """Charges CPU seconds to stages: ``mark`` gives a stage the time since the mark before."""

    stages: dict[str, float] = field(default_factory=dict)
    last: float = 0.0

    def start(self) -> None:
        self.stages = dict.fromkeys(STAGES, 0.0)
        self.last = time.process_time()

    def mark(self, stage: str) -> None:
        now = time.process_time()
        self.stages[stage] += now - self.last
        self.last = now

    def mark_gradient(self, features: Tensor) -> None:
        """Let the arrival of the features' gradient end the language model's backward pass."""
        features.register_hook(lambda _: self.mark("language model backward"))


class TimedTrainer(LlavaTrainer):
    """The library's trainer, with marks between the parts of a step."""

    clock: Clock

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.clock.mark("language model forward")
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.clock.mark("packer backward")
        return loss


def add_marks(model: LlavaGPT2ForCausalLM, clock: Clock) -> None:
    """Mark where a forward pass enters and leaves the modules of a model."""
    decoder = model.get_model()

    def before(module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: clock.mark("rest"))

    def after(module: nn.Module, act: Callable[[Tensor], None]) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: act(output))

    def leave_packer(features: Tensor) -> None:
        clock.mark("packer forward")
        clock.mark_gradient(features)

    before(decoder.vision_tower)
    after(decoder.vision_tower, lambda _: clock.mark("tower"))
    before(decoder.mm_projector)
    after(decoder.vision_resampler, leave_packer)
    before(decoder)


class Floor:
    """The bare modules of a model, on tensors prepared from one batch.

    Args:
        model: its weights are used, not its forward pass.
        batch: clips of equal length, each at the start of its sample.
        bf16: whether to run under autocast.
    """

    def __init__(self, model: LlavaGPT2ForCausalLM, batch: Batch, bf16: bool) -> None:
        decoder = model.get_model()
        self.bf16 = bf16
        self.tower = decoder.vision_tower.vision_tower
        self.projector, self.resampler, self.head = decoder.mm_projector, decoder.vision_resampler, model.lm_head
        self.decoder = bare_decoder(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        self.clips = (len(batch["images"]), len(batch["images"][0]))
        self.pixels = decoder.vision_tower.normalize(torch.cat(batch["images"]))
        self.frames_at_once = decoder.vision_tower.frames_at_once(self.pixels.device)
        self.num_patches = model.vision.patches_per_side**2
        num_visual = model.vision.layout.num_tokens("video", self.clips[1])
        self.text = model.get_input_embeddings()(batch["input_ids"][:, num_visual:]).detach()
        self.mask = batch["attention_mask"]
        targets = batch["labels"][:, 1:]
        rows, columns = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        self.positions = rows * batch["labels"].shape[1] + columns
        self.targets = targets[rows, columns]

    def step(self, clock: Clock, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
        clock.start()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.no_grad(), linear_by_onednn():
                parts = self.pixels.split(self.frames_at_once)
                patches = torch.cat([self.tower(pixel_values=part).last_hidden_state for part in parts])
                patches = patches[:, -self.num_patches :].contiguous()
            clock.mark("tower")
            features = self.resampler(self.projector(patches).unflatten(0, self.clips), "video")
            clock.mark("packer forward")
            clock.mark_gradient(features)
            embeddings = torch.cat([features.to(self.text.dtype), self.text], dim=1)
            clock.mark("rest")
            hidden = self.decoder(inputs_embeds=embeddings, attention_mask=self.mask, use_cache=False).last_hidden_state
            logits = self.head(hidden.flatten(0, 1).index_select(0, self.positions))
            loss = F.cross_entropy(logits.float(), self.targets)
        clock.mark("language model forward")
        loss.backward()
        clock.mark("packer backward")
        nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
        return loss.item()


def bare_decoder(model: LlavaGPT2ForCausalLM) -> GPT2Model:
    """transformers' GPT-2 over the very parameters of a model's decoder, in training mode."""
    names = GPT2Config().to_dict().keys() - {"model_type", "architectures"}
    decoder = GPT2Model(GPT2Config(**{name: getattr(model.config, name) for name in names}))
    weights = model.get_model().state_dict(keep_vars=True)
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()}, assign=True)
    assert decoder.wte.weight is model.get_input_embeddings().weight
    return decoder.train()


def full_loss(
    hidden: Tensor, labels: Tensor, head: nn.Module, num_items_in_batch: Any = None, label_smoothing: float = 0.0
) -> Tensor:
    """The loss as plain transformers computes it: the head runs at every position."""
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    total = F.cross_entropy(head(hidden).float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert not label_smoothing
    return total / num_items_in_batch


def set_kept_memory(mapped: int, trimmed: int) -> None:
    """From what size on glibc maps memory anew, and how much it keeps; 32 and 64 MiB are what it comes to by itself."""
    with suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, mapped)
        mallopt(-1, trimmed)


@contextmanager
def manner_of(model: LlavaGPT2ForCausalLM, kind: str, patches: Tensor | None) -> Iterator[None]:
    """Within it a step is of another kind: "library" is the plain one, the others are ``VARIANTS``.

    Args:
        model: what trains.
        kind: of the step.
        patches: the tower's features, which it returns at once in a variant.
    """
    with ExitStack() as stack:
        if kind in VARIANTS:
            stack.enter_context(mock.patch.object(model.get_vision_tower(), "forward", return_value=patches))
        if kind == "full_logits":
            stack.enter_context(mock.patch.object(llava_arch, "supervised_loss", full_loss))
        elif kind == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            stack.callback(model.gradient_checkpointing_disable)
        elif kind in ("eager", "kernels"):
            stack.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
            model.config._attn_implementation = "eager"
        elif kind == BEFORE:
            stack.enter_context(mock.patch.dict(base.FRAMES_AT_ONCE, cpu=10**6))
            stack.enter_context(mock.patch.object(base, "linear_by_onednn", nullcontext))
            set_kept_memory(2**25, 2**26)
            stack.callback(keep_freed_memory)
        if kind == "kernels":
            for parent, name in unfused_gelus(model):
                stack.callback(setattr, parent, name, getattr(parent, name))
            fuse_gelu(model)
            stack.enter_context(linear_by_onednn())
        yield


class Alternation(TrainerCallback):
    """Runs a floor step and a decoding after each plain library step, within the trainer's own loop.

    Args:
        plan: the kind of each of the trainer's steps; the first is a warm-up and not recorded.
    """

    def __init__(self, plan: Sequence[str], clock: Clock, floor: Floor, decode: Callable[[], Any]) -> None:
        self.plan = list(plan)
        self.clock = clock
        self.floor = floor
        self.decode = decode
        self.trainer: LlavaTrainer | None = None
        self.manner: Any = None
        self.patches: Tensor | None = None
        self.steps: dict[str, list[dict[str, float]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._prepare(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - 1
        self.clock.mark("optimizer")
        self.manner.__exit__(None, None, None)
        self._record(self.plan[done], done)
        if self.plan[done] == "library":
            assert self.trainer is not None
            self.floor.step(self.clock, self.trainer.optimizer.optimizer, args.max_grad_norm)
            self._record("floor", done)
            self.clock.start()
            self.decode()
            self.clock.mark("rest")
            self._record("decode", done)
        self._prepare(done + 1)

    def remember(self, patches: Tensor) -> None:
        """Keep the tower's features for the variants."""
        self.patches = patches

    def _record(self, kind: str, step: int) -> None:
        if not step:
            return
        stages = dict(self.clock.stages)
        if kind in VARIANTS:
            stages["tower"] = self.steps["library"][-1]["tower"]
        self.steps.setdefault(kind, []).append(stages)

    def _prepare(self, step: int) -> None:
        assert self.trainer is not None
        kind = self.plan[step] if step < len(self.plan) else "library"
        self.manner = manner_of(self.trainer.model, kind, self.patches)
        self.manner.__enter__()
        self.clock.start()


class Held(Dataset[Example]):
    """Examples in memory."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def measure(sizes: Sizes, bf16: bool, repeats: int, variants: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the alternation in one precision.

    Returns:
        Medians of the stages and the total of each kind of step, in CPU seconds, and the ratios of
        library to floor.
    """
    keep_freed_memory()  # as a run does
    transformers.set_seed(0)
    tokenizer = build_tokenizer(sizes)
    model = build_model(sizes, tokenizer, torch.bfloat16 if bf16 else None)
    args = TrainingArguments(
        output_dir=str(folder / "output"),
        bf16=bf16,
        use_cpu=True,
        per_device_train_batch_size=sizes.batch,
        max_steps=1 + repeats * (1 + len(variants)),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data_args = DataArguments(data_path=[str(folder / "data.json")])
    dataset = make_supervised_data_module(tokenizer, data_args, model.vision, sizes.context)["train_dataset"]
    examples = [dataset[i] for i in range(sizes.batch)]
    collator = SupervisedCollator(tokenizer.pad_token_id)
    batch = model_inputs(collator(examples))

    clock = Clock()
    add_marks(model, clock)
    alternation = Alternation(
        ["library", *["library", *variants] * repeats],
        clock,
        Floor(model, batch, bf16),
        lambda: [dataset.load_media(record) for record in dataset.records],
    )
    trainer = TimedTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=Held(examples * args.max_steps),
        processing_class=tokenizer,
        callbacks=[alternation],
    )
    trainer.remove_callback(PrinterCallback)
    model.get_vision_tower().register_forward_hook(lambda _module, _inputs, output: alternation.remember(output))
    trainer.clock = clock
    alternation.trainer = trainer
    trainer.train()
    counted = ModelFlops(model)
    matrices = [p.numel() for n, p in model.get_vision_tower().named_parameters() if p.ndim > 1 and "position" not in n]
    targets = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    gflop = {
        "tower": 1e-9 * FORWARD * sum(matrices) * sizes.batch * sizes.num_frames
        * model.vision.patches_per_side**2,
        "language model": 1e-9 * (counted.per_token * batch["input_ids"].numel() + counted.per_target * targets),
    }  # fmt: skip
    sizes_of = {"tokens": list(batch["input_ids"].shape), "gflop": rounded(gflop)}
    return sizes_of | summarise(alternation.steps)


def summarise(steps: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    totals = {kind: [sum(step.values()) for step in recorded] for kind, recorded in steps.items()}
    medians: dict[str, dict[str, float]] = {}
    for kind, recorded in steps.items():
        stages = {} if kind == "decode" else {stage: statistics.median(s[stage] for s in recorded) for stage in STAGES}
        medians[kind] = stages | {"total": statistics.median(totals[kind])}

    def ratio(*kinds: str) -> float:
        over = zip(totals["floor"], *(totals[kind] for kind in kinds), strict=True)
        return statistics.median(sum(costs) / floor for floor, *costs in over)

    ratios = {kind: ratio(kind) for kind in ("library", *VARIANTS, BEFORE) if kind in totals}
    return {
        "seconds": rounded(medians),
        "over_floor": rounded(ratios | {"library_and_decode": ratio("library", "decode")}),
        "gains": rounded(gains(steps)),
        "library_over_floor_each": rounded([a / b for a, b in zip(totals["library"], totals["floor"], strict=True)]),
    }


def gains(steps: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """How many times as fast as before: language model, tower and step with ``--kernels``."""

    def of_model(step: dict[str, float]) -> float:
        return step["language model forward"] + step["language model backward"]

    found = {}
    if "kernels" in steps and BEFORE in steps:
        pairs = list(zip(steps[BEFORE], steps["kernels"], strict=True))
        found["language_model"] = statistics.median(of_model(a) / of_model(b) for a, b in pairs)
        found["tower"] = statistics.median(a["tower"] / b["tower"] for a, b in pairs)
        found["step"] = statistics.median(sum(a.values()) / sum(b.values()) for a, b in pairs)
    return found


def shares(result: dict[str, Any], rate: float) -> dict[str, dict[str, float]]:
    """What part of the machine's rate of products the tower and the language model reach, in each kind of step."""
    found: dict[str, dict[str, float]] = {}
    for kind, seconds in result["seconds"].items():
        if kind != "decode":
            of_model = seconds["language model forward"] + seconds["language model backward"]
            times = {"tower": seconds["tower"], "language model": of_model}
            found[kind] = {part: round(result["gflop"][part] / max(s, 1e-9) / rate, 3) for part, s in times.items()}
    return found


def rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    return [rounded(value) for value in values] if isinstance(values, list) else round(values, 4)


def matrix_rate(dtype: torch.dtype, size: int) -> float:
    """What this machine can do: the GFLOP/s of a plain product of two square matrices."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    rates = []
    for _ in range(5):
        start = time.process_time()
        a @ b
        rates.append(2e-9 * size**3 / max(time.process_time() - start, 1e-9))
    return round(statistics.median(rates), 1)


# Reporting.


def describe_machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def format_table(dtype: str, result: dict[str, Any]) -> str:
    """Rows are stages, columns the kinds of steps, figures CPU seconds."""
    seconds = result["seconds"]
    kinds = [kind for kind in ("floor", "library", *VARIANTS, BEFORE) if kind in seconds]
    lines = [f"{dtype + ', CPU seconds a step':<26}" + "".join(f"{kind:>15}" for kind in kinds)]
    for stage in (*STAGES, "total"):
        lines.append(f"{stage:<26}" + "".join(f"{seconds[kind][stage]:>15.3f}" for kind in kinds))
    over = {"floor": 1.0} | result["over_floor"]
    lines.append(f"{'over the floor':<26}" + "".join(f"{over[kind]:>15.3f}" for kind in kinds))
    each = ", ".join(f"{ratio:.3f}" for ratio in result["library_over_floor_each"])
    lines.append(
        f"decoding {seconds['decode']['total']:.3f} s; with it {over['library_and_decode']:.3f} times the floor; "
        f"library over floor, repeat by repeat: {each} (allowed {ALLOWED_RATIO})"
    )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU seconds of a training step of the Italian recipe.")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    parser.add_argument("--repeats", type=int, default=3, help="alternations after a warm-up (default 3)")
    parser.add_argument("--full-logits", action="store_true", help="also: the head at all positions, as plain GPT-2")
    parser.add_argument("--checkpointing", action="store_true", help="also: gradient checkpointing of GPT-2")
    parser.add_argument("--eager", action="store_true", help="also: eager attention in GPT-2")
    parser.add_argument("--kernels", action="store_true", help="also: eager attention, --fused_gelu and --onednn")
    parser.add_argument("--before", action="store_true", help="also: all as it was before these were added")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    sizes = QUICK if args.quick else RECIPE
    variants = [variant for variant in (*VARIANTS, BEFORE) if getattr(args, variant)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": describe_machine(), "sizes": vars(sizes), "repeats": args.repeats}
    try:
        with tempfile.TemporaryDirectory() as name:
            write_data(Path(name), sizes)
            for dtype in DTYPES if args.dtype == "both" else [args.dtype]:
                result = measure(sizes, dtype == "bf16", args.repeats, variants, Path(name))
                rate = matrix_rate(DTYPES[dtype], 64 if args.quick else 2048)
                result["share_of_product_rate"] = shares(result, rate)
                report[dtype] = {"matrix_product_gflops": rate} | result
                print(format_table(dtype, result), flush=True)
    finally:
        torch.set_num_threads(threads)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
    sys.exit()
