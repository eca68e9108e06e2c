"""A run with a feature cache: what it reads from it, what it adds, and what is said of both."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as TransformersArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llava.data.feature_cache.cache import FLAG, FeatureCache
from llava.data.feature_cache.keys import KeyMaker, TowerRun
from llava.data.feature_cache.run import RunFeatures, precision_of
from llava.data.feature_cache.shards import Kept
from llava.data.feature_cache.storage import Storage
from llava.data.feature_cache.towers import TowerRecords
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import LoadedModel
from llava.model.multimodal_encoder.lazy import FindTowerHash, LazyTower, hash_tower
from llava.train.arguments import PARTS, DataArguments, ModelArguments, TrainingArguments
from llava.train.distributed import is_first_rank
from llava.types import FeatureEntry, holds_features

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
"""What is gathered before a shard is written."""


def check_feature_cache(model_args: ModelArguments, data_args: DataArguments) -> None:
    """A ValueError for a cache that cannot be used: the tower is trained, or the folder is none."""
    if PARTS[0] in model_args.tunable_parts:
        raise ValueError(
            f"{FLAG} holds features of a frozen tower, and --mm_tunable_parts trains it ({PARTS[0]}): they would "
            f"change with every step; leave {FLAG} out"
        )
    if not data_args.feature_cache_fill:
        assert data_args.feature_cache is not None
        FeatureCache(data_args.feature_cache, strict=data_args.feature_cache_strict)


def find_tower(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments | None
) -> FindTowerHash | None:
    """What tells which weights a tower has without reading them; None where they are to be read."""
    # Weights that are to be stored have to be there.
    if model_args.save_vision_tower:
        return None
    # ZeRO-3 shares out what is made while it is on, and a tower that is read later would be.
    if args is None or is_deepspeed_zero3_enabled():
        return None
    assert data_args.feature_cache is not None
    return TowerRecords(data_args.feature_cache)


def set_up_features(
    loaded: LoadedModel, data_args: DataArguments, args: TrainingArguments, asked: Storage | None = None
) -> RunFeatures:
    """What a run with ``--feature_cache`` reads from it.

    Args:
        loaded: the model, with its trainable parts set.
        data_args, args: the flags.
        asked: the form that features are to be kept in; by default what the flags say.

    Raises:
        ValueError: the model does not see, the cache keeps features in another form, or the flags do not fit it.
    """
    assert data_args.feature_cache is not None
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ValueError(f"{FLAG}: --bf16_full_eval and --fp16_full_eval run the tower otherwise; leave them out")
    tower = loaded.model.get_vision_tower()
    if loaded.vision is None or tower is None:
        raise ValueError(f"{FLAG} was given, but the model does not see; give --vision_tower, or leave the flag out")
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    # DeepSpeed casts the weights themselves and needs no autocast.
    dtype = half if half is not None and args.deepspeed else tower.dtype
    autocast = None if args.deepspeed else half
    storage = None
    if data_args.feature_cache_fill:
        if asked is None and data_args.feature_cache_storage:
            asked = Storage(data_args.feature_cache_storage)
        with args.main_process_first(desc="feature cache"):
            exists = FeatureCache.exists(data_args.feature_cache)
            storage = None if exists and asked is None else asked or Storage.exact(dtype)
            cache = FeatureCache(data_args.feature_cache, storage, data_args.feature_cache_strict)
    else:
        cache = FeatureCache(data_args.feature_cache, None, data_args.feature_cache_strict)
    weights = hash_tower(loaded.model)
    if not isinstance(tower, LazyTower) and not loaded.vision.save_vision_tower:
        TowerRecords(data_args.feature_cache).keep(loaded.vision)
    run = TowerRun(weights, precision_of(dtype, autocast, args.device))
    keys = KeyMaker(run, loaded.vision, cache.storage, data_args.media_limits)
    features = RunFeatures(cache, keys, dtype, fills=data_args.feature_cache_fill)
    if is_first_rank():
        features.log()
    return features


class FeatureLog(TrainerCallback):
    """Counts the images and clips that came with features and those that the tower ran for, and keeps the latter.

    Args:
        features: of the run.
        model: whose tower is listened to.

    Attributes:
        counts: what the log says, over all ranks at the newest line of it.
    """

    def __init__(self, features: RunFeatures, model: LlavaMetaForCausalLM) -> None:
        self.features = features
        self.tower = model.get_vision_tower()
        assert self.tower is not None
        self.counts: dict[str, float] = {}
        self._own = [0, 0]  # hits and misses of this rank
        self._entries: list[tuple[FeatureEntry | None, int]] = []  # of the batch, with their frames
        self._seen: list[Tensor] = []
        self._kept: dict[str, Kept] = {}
        features.round_live(self.tower, self._look if features.fills else None)

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Before the forward pass of a batch."""
        media = batch.get("images") or []
        hits = [holds_features(frames) for frames in media]
        self._own[0] += sum(hits)
        self._own[1] += len(hits) - sum(hits)
        entries = batch.get("feature_entries") or [None] * len(media)
        pairs = zip(entries, media, hits, strict=True)
        self._entries, self._seen = [(entry, len(frames)) for entry, frames, hit in pairs if not hit], []

    def _look(self, features: Tensor) -> None:
        """Take in what the tower computed for the next frames of the batch, (frames, patches, width)."""
        if not self._entries:  # It runs for a scoring, say, and not for a batch.
            return
        self._seen.append(features.detach())
        lengths = [length for _, length in self._entries]
        if sum(map(len, self._seen)) != sum(lengths):
            return  # The tower may be run in several calls.
        for (entry, _), part in zip(self._entries, torch.cat(self._seen).split(lengths), strict=True):
            cache = self.features.cache
            if entry is not None and self.features.fills and entry.key not in cache and entry.key not in self._kept:
                self._kept[entry.key] = Kept.of(entry, part, cache.storage)
        self._entries, self._seen = [], []
        if sum(kept.num_bytes for kept in self._kept.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered as a shard."""
        kept, self._kept = list(self._kept.values()), {}
        if not kept:
            return
        try:
            self.features.cache.add(f"fill-{uuid.uuid4().hex}", kept, self.features.keys.contexts)
        except (OSError, ValueError) as error:  # A full disk, or a folder that was removed and cannot be made again.
            # What is there stays, and training has all that it needs.
            self.features.fills = False
            logger.warning(
                "%s %s: cannot be written (%s): training goes on, and adds nothing more to it",
                FLAG, self.features.cache.folder, error,
            )  # fmt: skip

    def _gather(self) -> None:
        """Bring the counts of all ranks together; all of them come here at the same steps."""
        all_ranks = gather_object([self._own]) if PartialState().num_processes > 1 else [self._own]
        hits, misses = (sum(numbers) for numbers in zip(*all_ranks, strict=True))
        self.counts = {"feature_hits": hits, "feature_misses": misses}

    def on_step_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if control.should_log:
            self._gather()

    def on_save(self, *args: object, **_: object) -> None:
        self.flush()

    def on_epoch_end(self, *args: object, **_: object) -> None:
        self.flush()

    def on_evaluate(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.flush()
        if not args.do_train:
            self._tell(state)

    def on_train_end(
        self, args: TransformersArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.flush()
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        """Print what was read; all ranks call this together."""
        self._gather()
        if state.is_world_process_zero:
            is_read = not isinstance(self.tower, LazyTower) or self.tower.is_read
            print(
                f"feature cache: {self.counts['feature_hits']} images and clips had their features in it, "
                f"{self.counts['feature_misses']} were run through the tower; its weights "
                f"{'were read' if is_read else 'were not read'}",
                flush=True,
            )
