"""The network that labels the patches of synthetic frames, whose tower the demo freezes: what it is and how it learns.

Every patch of a frame is labelled by separate heads: the shape it belongs to, its colour, where the shape's centre is,
and which of its pixels the shape covers. Joint labels (one class for each shape with each colour) would be learned as
well, but give features in which an unseen pair means nothing.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model

from llava.demo.scenes import (
    FRAME_SIZE,
    FRAMES_PER_CLIP,
    composite,
    recolour,
    render_background,
    render_coverage,
    sample_scene,
)
from llava.demo.sentences import COLOURS, HELD_OUT_PAIRS, SHAPES, Pair

logger = logging.getLogger(__name__)

NEW_TO_TOWER: tuple[Pair, ...] = (*HELD_OUT_PAIRS, ("stella", "rosa"), ("quadrato", "arancione"))
"""Pairs that occur in no frame that trained the tower: those held out, and two more.

The shipped tower was trained without all eight; two that are not held out appear in training clips.
"""
TOWER_PAIRS: tuple[Pair, ...] = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in NEW_TO_TOWER
)

PATCH_SIZE = 8
IMAGE_MEAN = (0.4, 0.4, 0.4)
IMAGE_STD = (0.25, 0.25, 0.25)

FOREGROUND_SHARE = 0.25
"""A patch is foreground when the shape covers at least this share of it."""

UNNAMED = -100
"""Label of the patches of a colour without a name; no head is trained on them."""

_FREE_COLOURS = 0.5
_POSITION_SCALE = 0.5
_CENTRE_SCALE = 6.0
_HEADS_FILE = "heads.safetensors"
_KEPT_HEADS = ("shape_head", "colour_head", "centre_head")

_TRAINING_STREAM, _TEST_STREAM = 11, 12
"""First words of the seeds, so that fresh frames never repeat training frames."""


class LabelledFrames(NamedTuple):
    """A batch of B frames of P patches. Class 0 is the background; patches of class -100 are not learned from."""

    pixels: Tensor  # float (B, 3, height, width), normalised
    shapes: Tensor  # int64 (B, P)
    colours: Tensor  # int64 (B, P)
    pairs: Tensor  # int64 (B, 2): the frame's shape, and the colour that it is nearest to
    centres: Tensor  # float (B, 2): x and y of the shape's centre in [-1, 1]
    coverage: Tensor  # float (B, P, pixels of a patch): share of each pixel that the shape covers


class Predictions(NamedTuple):
    """What the heads say about each patch."""

    shapes: Tensor  # (B, P, 1 + shapes) logits
    colours: Tensor  # (B, P, 1 + colours) logits
    centres: Tensor  # (B, P, 2)
    coverage: Tensor  # (B, P, pixels of a patch) logits


class Accuracy(NamedTuple):
    """Shares of foreground patches labelled right, and the mean error of the centre in pixels."""

    shape: float
    colour: float
    both: float
    centre_error: float


class PatchLabeller(nn.Module):
    """The tower with a linear head for each label; only the tower is kept after training."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.tower = Dinov2Model(config)
        self.shape_head = nn.Linear(width, 1 + len(SHAPES))
        self.colour_head = nn.Linear(width, 1 + len(COLOURS))
        self.centre_head = build_centre_head(width)
        self.coverage_head = nn.Linear(width, PATCH_SIZE**2)
        # From small random positions, attention takes most of the training to find out what is
        # where; from sines and cosines it knows within a few steps.
        with torch.no_grad():
            self.tower.embeddings.position_embeddings[0, 1:] = encode_positions(width)

    def forward(self, pixels: Tensor) -> Predictions:
        """Label pixels (B, 3, height, width)."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]  # (B, P, width), the class token left out
        return Predictions(
            self.shape_head(patches), self.colour_head(patches), self.centre_head(patches), self.coverage_head(patches)
        )


def build_centre_head(width: int) -> nn.Linear:
    """Two directions, at right angles and with fixed small weights.

    Weights that could grow would let the features hold the centre as small as they like. Movements
    are differences of it, and a language model learns them last: it has to be large.
    """
    head = nn.Linear(width, 2, bias=False)
    nn.init.orthogonal_(head.weight, gain=1 / _CENTRE_SCALE)
    return head.requires_grad_(False)


def encode_positions(width: int) -> Tensor:
    """Sines and cosines of the rows and columns of the patch grid: (P, width)."""
    side = FRAME_SIZE // PATCH_SIZE
    frequencies = torch.linspace(0.5, 4.0, width // 4) * math.pi / side
    angles = (torch.arange(side) + 0.5)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) * _POSITION_SCALE  # (side, width / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)


def build_tower_config() -> Dinov2Config:
    """The architecture that is shipped."""
    return Dinov2Config(
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=4,
        initializer_range=0.06,
    )


def render_labelled_frames(
    seed: Sequence[int], num_frames: int, pairs: Sequence[Pair], free_colours: float = 0.0
) -> LabelledFrames:
    """Draw single frames of random scenes; the same seed gives the same frames.

    Args:
        seed: words of the seed.
        num_frames: B.
        pairs: shapes and colours to draw from.
        free_colours: share of the frames that get any colour at all, and no label for it. What a
            shape is then has to be learned apart from the colours that it comes in.
    """
    rng = np.random.default_rng(seed)
    rows = [_render_labelled_frame(rng, pairs, rng.random() < free_colours) for _ in range(num_frames)]
    pixels, *labels = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    pixels = pixels.permute(0, 3, 1, 2)  # uint8 (B, height, width, 3) -> (B, 3, height, width)
    return LabelledFrames((pixels.float() / 255 - mean) / std, *labels)


def _render_labelled_frame(
    rng: np.random.Generator, pairs: Sequence[Pair], free: bool
) -> tuple[NDArray[np.generic], ...]:
    """One frame's pixels and labels, in the order of ``LabelledFrames``."""
    scene = sample_scene(rng, pairs)
    if free:
        scene = recolour(rng, scene)
    frame = int(rng.integers(FRAMES_PER_CLIP))
    coverage = render_coverage(scene, frame)
    side = FRAME_SIZE // PATCH_SIZE
    blocks = coverage.reshape(side, PATCH_SIZE, side, PATCH_SIZE).swapaxes(1, 2)  # (row, column, y, x)
    by_patch = blocks.reshape(side * side, PATCH_SIZE**2)  # (P, pixels of a patch), patches in reading order
    foreground = by_patch.mean(axis=1) >= FOREGROUND_SHARE  # (P,)
    shape, colour = 1 + list(SHAPES).index(scene.shape), 1 + list(COLOURS).index(scene.colour)
    return (
        composite(render_background(scene.background), coverage, scene.rgb),
        foreground * shape,
        foreground * (UNNAMED if free else colour),
        np.array([shape, colour]),
        np.asarray(scene.centres[frame], dtype=np.float32) / (FRAME_SIZE / 2) - 1,
        by_patch,
    )


def labelling_loss(predictions: Predictions, frames: LabelledFrames) -> Tensor:
    """Sum of the heads' losses. Background and foreground weigh the same in the class heads.

    A class that never occurs with a frame's other label is left out of the softmax. Otherwise the
    heads would learn which pairs are missing from training, and rule them out.
    """
    known = known_pairs()
    shape, colour = frames.pairs.unbind(dim=1)
    shape_loss = _class_loss(predictions.shapes, frames.shapes, known[:, colour].T)
    colour_loss = _class_loss(predictions.colours, frames.colours, known[shape])
    centre_loss = (predictions.centres - frames.centres[:, None]).square().mean()
    coverage_loss = functional.binary_cross_entropy_with_logits(predictions.coverage, frames.coverage)
    return shape_loss + colour_loss + centre_loss + 2 * coverage_loss


def _class_loss(logits: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
    """Cross entropy of logits (B, P, C) over the classes that ``allowed`` (B, C) holds."""
    foreground = labels != 0  # (B, P)
    weights = torch.where(foreground, 0.5 / foreground.sum(), 0.5 / (~foreground).sum())
    masked = logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min)
    by_patch = functional.cross_entropy(masked.flatten(0, 1), labels.flatten(), reduction="none")
    return (by_patch * weights.flatten()).sum()


def known_pairs() -> Tensor:
    """Which shapes and colours occur together in training: bool (1 + shapes, 1 + colours).

    Class 0, the background, goes with everything.
    """
    known = torch.ones(1 + len(SHAPES), 1 + len(COLOURS), dtype=torch.bool)
    for shape, colour in NEW_TO_TOWER:
        known[1 + list(SHAPES).index(shape), 1 + list(COLOURS).index(colour)] = False
    return known


@torch.inference_mode()
def measure_accuracy(labeller: PatchLabeller, seed: int, num_frames: int, pairs: Sequence[Pair]) -> Accuracy:
    """Label fresh frames that training never drew."""
    labeller.eval()
    frames = render_labelled_frames((_TEST_STREAM, seed), num_frames, pairs)
    predictions = labeller(frames.pixels)
    foreground = frames.shapes > 0
    shape_right = (predictions.shapes.argmax(-1) == frames.shapes)[foreground]
    colour_right = (predictions.colours.argmax(-1) == frames.colours)[foreground]
    error = (predictions.centres - frames.centres[:, None]).abs().mean() * (FRAME_SIZE / 2)
    return Accuracy(
        shape=shape_right.float().mean().item(),
        colour=colour_right.float().mean().item(),
        both=(shape_right & colour_right).float().mean().item(),
        centre_error=error.item(),
    )


def train_labeller(*, seed: int, num_steps: int, batch_size: int, learning_rate: float) -> PatchLabeller:
    """Train the tower and its heads on frames of the training pairs, drawn on the fly."""
    torch.manual_seed(seed)
    labeller = PatchLabeller(build_tower_config()).train()
    optimizer = torch.optim.AdamW(labeller.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(num_steps):
        frames = render_labelled_frames((_TRAINING_STREAM, seed, step), batch_size, TOWER_PAIRS, _FREE_COLOURS)
        loss = labelling_loss(labeller(frames.pixels), frames)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(labeller.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == num_steps - 1:
            logger.info("step %d: loss %.4f, %.0f s", step, loss.item(), time.perf_counter() - start)
        if step % 500 == 499:
            accuracy = measure_accuracy(labeller, seed + 1, 200, TOWER_PAIRS)
            logger.info("step %d: %.1f %% of shapes right", step, 100 * accuracy.shape)
            labeller.train()
    return labeller


def save_labeller(labeller: PatchLabeller, folder: Path) -> int:
    """Write the tower, its processor settings and its heads; returns the tower's size in bytes.

    The heads are no part of the tower: they are kept so that its labels can be checked.
    """
    labeller.tower.save_pretrained(folder)
    heads = {name: labeller.get_submodule(name).state_dict() for name in _KEPT_HEADS}
    tensors = {f"{head}.{name}": value for head, state in heads.items() for name, value in state.items()}
    save_file(tensors, folder / _HEADS_FILE)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": FRAME_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": FRAME_SIZE, "width": FRAME_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size


def read_labeller(folder: Path) -> PatchLabeller:
    """The tower of a folder with its heads; the coverage head, which is not kept, is untrained."""
    labeller = PatchLabeller(Dinov2Config.from_pretrained(folder))
    labeller.load_state_dict(load_file(folder / _HEADS_FILE), strict=False)
    labeller.tower = Dinov2Model.from_pretrained(folder)
    return labeller.eval()
