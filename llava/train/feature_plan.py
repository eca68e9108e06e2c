"""What a build of features has to make: the images and clips of data files, in shards that are always cut alike.

A shard is named by the keys that it is to hold, and one process makes all of it: so the same data and settings give
the same files, however often the build was stopped and whatever number of processes shared it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch.utils.data import Dataset
from tqdm import tqdm

from llava.data.dataset import SupervisedDataset
from llava.data.feature_cache.cache import FeatureCache
from llava.data.feature_cache.keys import frames_at_most
from llava.data.feature_cache.run import RunFeatures
from llava.data.feature_cache.shards import SUFFIX
from llava.data.media import load_media
from llava.data.media_files import MediaError
from llava.io import hash_json, num_cores
from llava.types import BadSample, Media, Record, VisualInput

SHARD_BYTES = 64 << 20
"""About what a shard holds, and what is lost at most where a process is stopped."""


Share = tuple[int, int]
"""Which of how many equal parts of the shards, from 0."""


@dataclass(frozen=True)
class Item:
    """An image, a clip or a part of one, that is to have features."""

    key: str
    media: Media
    split: tuple[int, int] | None
    record: Record  # the first that has it


@dataclass(frozen=True)
class PlannedShard:
    """A shard, and what of it is to be made."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """All shards of a build, and the records of whose media no bytes can be read."""

    shards: list[PlannedShard]
    unreadable: list[tuple[Record, Media]]

    @property
    def items(self) -> list[Item]:
        return [item for shard in self.shards for item in shard.items]

    def missing(self, cache: FeatureCache, share: Share) -> list[PlannedShard]:
        """What is still to be made of a share of the shards.

        A shard that is there lacks what could not be decoded, and what others had when it was made: what nothing has
        now comes into a shard of its own.
        """
        cache.look()
        names = {f"{shard.name}{SUFFIX}" for shard in self.shards}
        others = {key for name, shard in cache.shards.items() if name not in names for key in shard.keys}
        left = []
        for shard in self.shards[share[0] :: share[1]]:
            is_made = f"{shard.name}{SUFFIX}" in cache.shards
            wanted = [item for item in shard.items if item.key not in (cache if is_made else others)]
            if wanted:
                left.append(_name(wanted) if is_made else PlannedShard(shard.name, tuple(wanted)))
        return left


def make_plan(datasets: Sequence[SupervisedDataset], features: RunFeatures) -> Plan:
    """Read the bytes of all media of data sets, and cut them into shards in their order."""
    pairs: dict[tuple[Media, tuple[int, int] | None], Record] = {}
    for dataset in datasets:
        for record in _with_media(dataset):
            for media in record.media:
                pairs.setdefault((media, record.split if media.kind == "video" else None), record)
    unreadable: list[tuple[Record, Media]] = []
    found: dict[str, Item] = {}
    with ThreadPoolExecutor(num_cores()) as pool:
        keys = pool.map(lambda pair: features.key_of(*pair), pairs)
        shown = tqdm(keys, total=len(pairs), desc="reading files", unit="file", disable=None, delay=2)
        for key, ((media, split), record) in zip(shown, pairs.items(), strict=True):
            if key is None:
                unreadable.append((record, media))
            else:
                found.setdefault(key, Item(key, media, split, record))
    return Plan(list(_cut(list(found.values()), features)), unreadable)


def _with_media(dataset: SupervisedDataset) -> Iterator[Record]:
    records = dataset.records
    return (record for i in range(len(records)) if (record := records[i]).media and record.fault is None)


def _cut(items: Sequence[Item], features: RunFeatures) -> Iterator[PlannedShard]:
    """Shards of about the same size, by the most frames that each image or clip may have."""
    vision, storage = features.keys.vision, features.cache.storage
    of_frame = storage.num_bytes(1, vision.patches_per_side**2, vision.hidden_size)
    part: list[Item] = []
    size = 0
    for item in items:
        own = of_frame * frames_at_most(vision, item.media.kind)
        if part and size + own > SHARD_BYTES:
            yield _name(part)
            part, size = [], 0
        part.append(item)
        size += own
    if part:
        yield _name(part)


def _name(items: Sequence[Item]) -> PlannedShard:
    return PlannedShard(f"build-{hash_json([item.key for item in items], 16)}", tuple(items))


@dataclass(frozen=True)
class ItemMedia(Dataset["VisualInput | BadSample"]):
    """The decoded media of items; a ``BadSample`` where one cannot be decoded."""

    items: Sequence[Item]
    dataset: SupervisedDataset
    features: RunFeatures

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> VisualInput | BadSample:
        item, dataset = self.items[index], self.dataset
        assert dataset.vision is not None
        try:
            decoded = load_media(item.media, dataset.vision, item.split, dataset.decode_timeout, dataset.limits)
            if self.features.key_of(item.media, item.split) != item.key:
                raise MediaError(f"{item.media.path}: has changed since the build began; build again", item.media.path)
            return decoded
        except ValueError as error:
            return BadSample.from_error(item.record, error)
