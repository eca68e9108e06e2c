"""Floating point operations of training, and the most that a machine does: the two numbers that MFU is made of.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the share of the peak that the useful operations of a
run come to. A product of a matrix with N entries and a vector is 2N operations; training needs three of them: forward,
gradient of the input, gradient of the weights. ``docs/running.md`` states the formula for each part of a model.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llava.config import VisionConfig
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.base import build_tower
from llava.model.multimodal_encoder.lazy import LazyTower
from llava.model.multimodal_projector.projectors import build_projector
from llava.model.multimodal_resampler import build_resampler
from llava.model.visual import is_added
from llava.types import MediaKind, holds_features

FORWARD, THROUGH, TRAINED = 2, 4, 6
"""Operations for each weight and token: forward alone, with a gradient that passes through, with one of the weight."""

MEASURE = "measure"
"""Value of ``--peak_flops``: what a plain product of matrices comes to on this machine."""

# NVIDIA's data sheets: products of dense bf16 matrices with fp32 sums, in 10^12 operations a second. The first name
# that is part of the GPU's counts.
_PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A800": 312,
    "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364,
    "RTX A6000": 155, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip

_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([GTP]?)", re.IGNORECASE)
_FACTORS = {"": 1.0, "G": 1e9, "T": 1e12, "P": 1e15}
_MEASURED_SIDE = 2048


def parse_peak(text: str) -> float | None:
    """Operations a second that ``--peak_flops`` gives: 989T, 1.5P, 9.9e14; None for ``measure``.

    Raises:
        ValueError: it is neither.
    """
    if text == MEASURE:
        return None
    match = _NUMBER.fullmatch(text.strip())
    peak = float(match[1]) * _FACTORS[match[2].upper()] if match else 0.0
    if not peak:
        raise ValueError(
            f"--peak_flops is {text!r}; expected operations a second, such as 989T or 9.9e14, or {MEASURE}"
        )
    return peak


def find_peak(asked: str | None, device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of a rank's device, in operations a second; None where nothing says it.

    Args:
        asked: ``--peak_flops``; without it that of a GPU whose name is known, for bf16 whatever the run computes in.
        device: of the rank.
        dtype: that products are measured in.
    """
    if asked is not None:
        return parse_peak(asked) or measure_peak(device, dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in _PEAKS.items() if known in name), None)


def measure_peak(device: torch.device, dtype: torch.dtype, side: int = _MEASURED_SIDE) -> float:
    """Operations a second of a product of two square matrices, the median of five."""
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ b).sum().item()  # A device works on after the call: the sum waits for it.
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / statistics.median(seconds[1:])


class ModelFlops:
    """Counts the operations that a model needs for a batch.

    Read when training begins: what trains, and what has been quantised or shared out, is settled by then.

    Attributes:
        per_token: of the language model's matrices.
        per_target: of its head, which runs at the positions alone that are predicted.
    """

    def __init__(self, model: LlavaMetaForCausalLM) -> None:
        head = model.get_output_embeddings()
        weight: Any = None if head is None else head.weight
        self.per_token = sum(_matrices(model, weight))
        self.per_target = 0.0 if weight is None else _factor(weight) * prod(_shape(weight))
        self._decoder = model.get_model()
        self._counted: dict[tuple[MediaKind, int, bool], float] = {}

    def count(self, batch: Mapping[str, Any], tokens: int, targets: int) -> float:
        """Operations of a micro-batch of a rank.

        Args:
            batch: its media are looked at.
            tokens: positions that are no padding.
            targets: those that are predicted.
        """
        of_text = self.per_token * tokens + self.per_target * targets
        for medium in (media := list(_media(batch))):
            if medium not in self._counted:
                self._counted[medium] = self._of_medium(*medium)
        return of_text + sum(self._counted[medium] for medium in media)

    @cached_property
    def _tower_weights(self) -> int:
        tower = self._decoder.vision_tower
        if isinstance(tower, LazyTower):  # It may have none in memory yet.
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                tower = build_tower(tower.vision)
        return _num_weights(tower)

    def _of_medium(self, kind: MediaKind, frames: int, is_encoded: bool) -> float:
        """Operations of tower, projector and resampler for an image (whose frames are its views) or a video."""
        decoder, vision = self._decoder, self._decoder.vision
        patches = frames * vision.patches_per_side**2
        tower_trains = _trains(decoder.vision_tower)
        of_tower = (TRAINED if tower_trains else FORWARD) * self._tower_weights * patches
        total = 0.0 if is_encoded else float(of_tower)
        width = decoder.get_input_embeddings().embedding_dim
        modules = [decoder.mm_projector] + ([] if decoder.vision_resampler is None else [decoder.vision_resampler])
        counts = _count_forward(json.dumps(vision.to_model_config()), width, kind, frames)
        is_learning = tower_trains
        for i, module in enumerate(modules):
            forward = float(FORWARD * _num_weights(module) * patches) if counts is None else counts[i]
            trains = _trains(module)
            # A frozen module hands on the gradient of one before it that trains.
            total += forward * (3 if trains else 2 if is_learning else 1)
            is_learning |= trains
        return total


def _media(batch: Mapping[str, Any]) -> Iterator[tuple[MediaKind, int, bool]]:
    """The kind and the number of frames of each image and video of a batch, and whether it is features already."""
    images = batch.get("images")
    if images is None:
        return
    kinds = batch.get("modalities") or ["image" if image.ndim == 3 else "video" for image in images]
    for image, kind in zip(images, kinds, strict=True):
        yield kind, 1 if image.ndim == 3 else len(image), holds_features(image)


@lru_cache(maxsize=256)
def _count_forward(settings: str, width: int, kind: MediaKind, frames: int) -> list[float] | None:
    """Operations of projector and resampler for one medium, forward; None where they do not run without memory.

    Their tokens are others than the language model's, and others from layer to layer: so both are run once on the meta
    device, and torch counts their products, those of attention included.
    """
    vision = VisionConfig.from_model_config(SimpleNamespace(**json.loads(settings)))
    assert vision is not None
    counts = []
    try:
        # Built anew, and in evaluation mode: nothing of the model is touched, and no random number is drawn.
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            features = torch.empty(frames, vision.patches_per_side**2, vision.hidden_size)
            with FlopCounterMode(display=False) as counter:
                features = build_projector(vision, width).eval()(features)  # (frames, patches, width)
            counts.append(float(counter.get_total_flops()))
            if (resampler := build_resampler(vision, width)) is not None:
                # As encode_visual does: each view of an image on its own, the frames of a video together.
                group = features.unsqueeze(1 if kind == "image" else 0)  # (media, frames, patches, width)
                with FlopCounterMode(display=False) as counter:
                    resampler.eval()(group, kind)
                counts.append(float(counter.get_total_flops()))
    except (RuntimeError, TypeError, ValueError, AttributeError):  # A plug-in's, which reads values, say.
        return None
    return counts


def _matrices(model: LlavaMetaForCausalLM, head: object) -> Iterator[float]:
    """Operations a token of each matrix of the language model; tables that are looked up in have none."""
    # A head that is the embeddings' own table is left out here as well: it has a count of its own.
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()} | {id(head)}
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", 1)
    for name, parameter in model.named_parameters():
        shape = _shape(parameter)
        if len(shape) < 2 or is_added(name) or id(parameter) in tables:
            continue
        share = active / experts if experts and len(shape) == 3 and shape[0] == experts else 1.0
        yield share * _factor(parameter) * prod(shape)


def _factor(parameter: Tensor) -> int:
    return TRAINED if parameter.requires_grad else THROUGH


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _num_weights(module: nn.Module) -> int:
    """Entries of a module's matrices; a table of positions, which the tower adds, is none."""
    shapes = (_shape(p) for name, p in module.named_parameters() if "position" not in name and "pos_embed" not in name)
    return sum(prod(shape) for shape in shapes if len(shape) > 1)


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, whatever 4 bits or ZeRO-3 have made of it."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return tuple(state.shape)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
