"""What one run reads from a feature cache: its images and clips, by the keys of its tower and settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llava.config import VisionConfig
from llava.data.feature_cache.cache import FLAG, FeatureCache, FeatureCacheError
from llava.data.feature_cache.digests import FOLDER, Digests
from llava.data.feature_cache.keys import KeyMaker, TowerRun, find_differences
from llava.data.media_files import DEFAULT_LIMITS, MediaError
from llava.storage import find_cause
from llava.types import FeatureEntry, Media, VisualInput

logger = logging.getLogger(__name__)


@dataclass
class RunFeatures:
    """What the samples of one run read from a cache.

    Attributes:
        cache: that they read.
        keys: of the run's tower and settings.
        dtype: of the tower.
        fills: whether entries that are not there are to be added, once the tower has run.
    """

    cache: FeatureCache
    keys: KeyMaker
    dtype: torch.dtype
    fills: bool = False
    digests: Digests = field(init=False)

    def __post_init__(self) -> None:
        self.digests = Digests(self.cache.folder / FOLDER)

    @property
    def inexact_storage(self) -> str | None:
        """The form that features are kept in, where they do not come back as they were."""
        return None if self.cache.storage.is_exact(self.dtype) else str(self.cache.storage)

    def key_of(self, media: Media, split: tuple[int, int] | None) -> str | None:
        """The key of an image or a clip as its file is now; None where it cannot be read, of which decoding tells.

        Raises:
            OSError: of storage that fails. A file without a key would be one without features.
        """
        try:
            return self.keys.key_of(media, split, self.digests.of_media(media))
        except (OSError, MediaError) as error:
            if find_cause(error) is not None:
                raise
            return None

    def load(self, media: Media, split: tuple[int, int] | None, decode: Callable[[], VisualInput]) -> VisualInput:
        """An image or a clip: its features, where they are kept, or what ``decode`` gives.

        Raises:
            FeatureCacheError: there are none (under ``--feature_cache_strict``).
        """
        key = self.key_of(media, split)
        kept = None if key is None else self.cache.read(key)
        if kept is not None:
            entry, features = kept
            return VisualInput(entry.kind, features[:, None], entry.original_size, entry.times, entry.duration)
        decoded = decode()  # First: a file that cannot be decoded is a bad sample, and no miss.
        if self.cache.strict and not self.fills:
            raise FeatureCacheError(
                f"{media.path}: {FLAG} {self.cache.folder} has no features of it as it is now and with these settings; "
                f"build them, or leave out {FLAG}_strict"
            )
        # A file that has changed meanwhile may be another than was hashed.
        if key is None or not self.fills or self.key_of(media, split) != key:
            return decoded
        return replace(decoded, entry=self.entry_of(key, decoded))

    def entry_of(self, key: str, decoded: VisualInput) -> FeatureEntry:
        """What is kept of an image or a clip beside its features."""
        about = (decoded.kind, decoded.original_size, decoded.times, decoded.duration)
        return FeatureEntry(key, self.keys.context_of(decoded.kind), *about)

    def round_live(self, tower: nn.Module, look: Callable[[Tensor], None] | None = None) -> None:
        """From now on let a tower's features be as they come back from the cache.

        So a sample is the same, whether its features were kept or have just been computed: in the first epoch and in
        later ones, and in a run that was resumed.

        Args:
            tower: of the run.
            look: is given the features before that.
        """
        storage = self.cache.storage

        def round_features(module: nn.Module, frames: object, features: Tensor) -> Tensor:
            if look is not None:
                look(features)
            return storage.round(features)

        tower.register_forward_hook(round_features)

    def log(self) -> None:
        """Say what a run will find; a warning where it is nothing, though the cache has features."""
        level = logging.INFO if self.fits or not len(self.cache) else logging.WARNING
        logger.log(level, "%s", self.describe())

    @property
    def fits(self) -> bool:
        """Whether the cache has any features of these settings."""
        return self.cache.count_of(self.keys.contexts) > 0

    def describe(self) -> str:
        """One line about what a run will find."""
        num = self.cache.count_of(self.keys.contexts)
        text = f"{FLAG} {self.cache.folder}: {num} images and clips with these settings, kept as {self.cache.storage}"
        if num or not len(self.cache):
            return text
        # The nearest of what is there: why does nothing fit?
        mine, there = self.keys.contexts.values(), self.cache.count_contexts()
        alike = [(own, other, n) for own in mine for other, n in there if own["kind"] == other["kind"]]
        differing = [(find_differences(own, other), n) for own, other, n in alike]
        nearest, count = min(differing, key=lambda pair: len(pair[0]))
        return f"{text}; {count} others differ in {'; '.join(nearest[:4])}"


def precision_of(dtype: torch.dtype, autocast: torch.dtype | None, device: torch.device) -> str:
    """What a tower computes in, as a part of a key: its own dtype, autocast's, and TensorFloat-32 on a GPU."""
    text = str(dtype).removeprefix("torch.")
    if autocast is not None:
        text += f" under {str(autocast).removeprefix('torch.')} autocast"
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        text += " with TensorFloat-32"
    return text


def read_features(
    folder: str, vision: VisionConfig, weights: str, dtype: torch.dtype, device: torch.device, strict: bool = False
) -> RunFeatures:
    """What is read from a cache by whoever asks a model, in the precision that it is loaded in.

    Args:
        folder: of the cache.
        vision: the model's settings.
        weights: the hash of its tower's weights.
        dtype, device: of its tower.
        strict: whether features that are not there are an error.
    """
    cache = FeatureCache(folder, strict=strict)
    run = TowerRun(weights, precision_of(dtype, None, device))
    features = RunFeatures(cache, KeyMaker(run, vision, cache.storage, DEFAULT_LIMITS), dtype)
    features.log()
    return features
