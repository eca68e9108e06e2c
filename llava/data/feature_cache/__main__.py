"""``python -m llava.data.feature_cache``: build the features of a run's images and clips, look at them, check them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.command import run_command
from llava.data.feature_cache.flags import build_parser, command_parser
from llava.types import BadSampleError

if TYPE_CHECKING:
    from llava.data.feature_cache.cache import FeatureCache


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 where ``verify`` finds damage, or 2, as ``--help`` says."""
    return run_command(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def run(words: list[str]) -> int:
    """What a command line asks for."""
    if words[:1] == ["build"]:
        if any(word in ("-h", "--help") for word in words):
            build_parser().parse_known_args(words[1:])  # Its answer needs nothing large.
        # Flags, model and data are training's: a command stands above all parts of the library.
        from llava.train.build_features import build

        build(words[1:])
        return 0
    args = command_parser().parse_args(words)

    from llava.data.feature_cache.cache import FeatureCache

    cache = FeatureCache(args.feature_cache)
    return show(cache) if args.command == "info" else verify(cache)


def show(cache: FeatureCache) -> int:
    """Print what a cache holds."""
    size = sum(shard.size for shard in cache.shards.values())
    print(f"{cache.folder}: {len(cache)} images and clips in {len(cache.shards)} shards, {size / 2**30:.2f} GiB")
    print(f"kept as {cache.storage}")
    sources = read_sources(cache.folder)
    for context, count in cache.count_contexts():
        tower = context["tower"]
        print(f"{count} {context['kind']}s:")
        source = sources.get(tower["weights"], "weights")
        grid = f"layer {tower['select_layer']}, {tower['patches']} patches x {tower['width']}"
        print(f"  tower: {source} (hash {tower['weights'][:12]}), {grid}, in {tower['precision']}")
        print(f"  pixels: {json.dumps(context['pixels'])}")
        print(f"  frames: {json.dumps(context['frames'])}; limits: {json.dumps(context['limits'])}")
    for text in cache.damaged.values():
        print(f"damaged: {text}")
    return 0


def read_sources(folder: Path) -> dict[str, str]:
    """Where towers came from, by the hash of their weights."""
    from llava.data.feature_cache.cache import TOWERS

    found = {}
    for path in (folder / TOWERS).glob("*.json"):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            found[told["weights"]] = told["source"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def verify(cache: FeatureCache) -> int:
    """Check every byte of a cache, and name the shards that are damaged; whether there are any."""
    from tqdm import tqdm

    from llava.data.feature_cache.shards import DamagedShardError

    damaged = dict(cache.damaged)
    for name, shard in tqdm(cache.shards.items(), unit="shard", disable=None):
        for key in shard.keys:
            try:
                shard.read(key, cache.storage)
            except (DamagedShardError, BadSampleError) as error:
                damaged[name] = str(error)
    for text in damaged.values():
        print(f"damaged: {text}")
    whole = len(cache.shards) + len(cache.damaged) - len(damaged)
    print(
        f"{whole} shards are whole, {len(damaged)} are damaged" + ("; remove these, and build again" if damaged else "")
    )
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
