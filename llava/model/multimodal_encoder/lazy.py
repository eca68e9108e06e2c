"""A frozen tower whose weights are read when they are first needed: with features in a cache, never."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights

from llava.config import VisionConfig
from llava.model.multimodal_encoder.base import TowerDescription, VisionTower, build_tower
from llava.model.multimodal_encoder.hf import hash_weights

if TYPE_CHECKING:
    from llava.model.llava_arch import LlavaMetaForCausalLM

logger = logging.getLogger(__name__)


class FindTowerHash(Protocol):
    """Tells the hash of the weights at a source without reading them; None where nothing is known of them."""

    def __call__(self, source: str, vision: VisionConfig) -> str | None: ...


class LazyTower(VisionTower):
    """Stands for a frozen tower, without parameters, until something is to be encoded.

    The tower that is read then is no part of the model: neither its checkpoints nor its optimizer see it, as it is
    with any frozen tower.

    Args:
        vision: with the source and the hash of the weights, which are compared when they are read.
        dtype: of the tower.
    """

    filled_later = True
    place: Tensor

    def __init__(self, vision: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__(vision)
        # An empty tensor, which goes where the model goes and into what dtype it is put.
        self.register_buffer("place", torch.empty(0, dtype=dtype), persistent=False)
        self._read: list[VisionTower] = []  # a list, so that it is no submodule
        # What was done to the model meanwhile (moved, cast), for the tower that is read later.
        self._done: list[Callable[[VisionTower], object]] = [lambda tower: tower.hold_in(dtype)]

    @classmethod
    def describe(cls, source: str, config: PretrainedConfig) -> TowerDescription:
        raise NotImplementedError("it stands for a tower of another class")

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    @property
    def is_read(self) -> bool:
        """Whether the weights are in memory."""
        return bool(self._read)

    def hold_in(self, dtype: torch.dtype) -> None:
        self.place = self.place.to(dtype)
        self._do(lambda tower: tower.hold_in(dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LazyTower:
        super()._apply(fn, recurse)
        self._do(lambda tower: tower._apply(fn))
        return self

    def _do(self, act: Callable[[VisionTower], object]) -> None:
        if self._read:
            act(self._read[0])
        else:
            self._done.append(act)

    def load_weights(self, source: str) -> str:
        """Read the weights now; a ValueError where they are others than ``vision`` says."""
        # It may come in the midst of a run, which draws the numbers that it would have drawn without it.
        with torch.random.fork_rng(devices=[]), no_init_weights():
            tower = build_tower(self.vision)
            found = tower.load_weights(source)
        tower.requires_grad_(False)
        for act in self._done:
            act(tower)
        self._read[:] = [tower.eval()]
        return found

    def encode(self, pixels: Tensor) -> Tensor:
        if not self._read:
            logger.info(
                "the vision tower is read from %s: some images or clips have no features in the cache",
                self.vision.vision_tower,
            )
            self.load_weights(self.vision.vision_tower)
        return self._read[0].encode(pixels)


def put_lazy_tower(model: LlavaMetaForCausalLM, source: str | None, find_hash: FindTowerHash) -> None:
    """Give a model its tower: a lazy one where the hash of its weights is known, else the weights themselves.

    Args:
        model: whose tower, if any, is frozen.
        source: where it lies now; by default what the configuration says.
        find_hash: tells the hash.
    """
    decoder = model.get_model()
    vision: VisionConfig | None = decoder.vision
    if vision is None or vision.save_vision_tower:
        return  # There is none, or it was in the checkpoint.
    source = source or vision.vision_tower
    found = find_hash(source, vision)
    if found is None or vision.vision_tower_hash not in (None, found):
        model.load_vision_tower(source)  # Where the weights have changed, it says so.
        return
    source = str(Path(source).absolute()) if Path(source).is_dir() else source
    vision = replace(vision, vision_tower=source, vision_tower_hash=found)
    decoder.vision_tower = LazyTower(vision, decoder.vision_tower.dtype)
    model.set_vision(vision)


def hash_tower(model: LlavaMetaForCausalLM) -> str:
    """The hash of a tower's weights: its source's, or that of the weights themselves where a checkpoint holds them."""
    vision, tower = model.vision, model.get_vision_tower()
    assert vision is not None
    assert tower is not None
    if not (tower.filled_later and vision.vision_tower_hash):
        # They may have been trained: then the hash of their source says nothing of them.
        return hash_weights(tower.state_dict())
    return vision.vision_tower_hash
