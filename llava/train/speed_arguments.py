"""Flags of what makes a run faster or smaller, in groups that the groups of ``arguments.py`` are made of.

They are written as ``arguments.py`` says, and checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llava.data.feature_cache.storage import STORAGES
from llava.data.samplers import BY_LENGTH, BY_MODALITY
from llava.train.flops import parse_peak


@dataclass(kw_only=True)  # Behind DataArguments.data_path, which has no default.
class FeatureCacheArguments:
    """Whether features of a frozen vision tower are read from files, and where these lie."""

    # --- images and videos ---
    feature_cache: str | None = None
    """Folder of features of a frozen vision tower: images and clips that it has are neither decoded nor encoded, and
    with all of them the tower's weights are not read (python -m llava.data.feature_cache build, or
    --feature_cache_fill); none turns off what a recipe asks for."""
    feature_cache_fill: bool = False
    """Add what --feature_cache lacks as it is computed, in the first epoch; the folder is made if it is not there."""
    feature_cache_strict: bool = False
    """Stop where --feature_cache lacks an image or a clip, or is damaged, instead of computing the features anew."""
    feature_cache_storage: str | None = None
    """fp32, bf16 or int8: how a folder that --feature_cache_fill makes keeps features (default: as the tower computes
    them, which is exact)."""

    def check_feature_cache(self) -> None:
        """A ValueError for flags that do not go together; all are off where the folder is ``none``."""
        if self.feature_cache == "none":
            self.feature_cache = self.feature_cache_storage = None
            self.feature_cache_fill = self.feature_cache_strict = False
        for name in ("fill", "strict", "storage"):
            if getattr(self, f"feature_cache_{name}") and not self.feature_cache:
                raise ValueError(f"--feature_cache_{name} was given without --feature_cache; give its folder too")
        if self.feature_cache_fill and self.feature_cache_strict:
            raise ValueError(
                "--feature_cache_fill computes what is not there, and --feature_cache_strict stops at it; leave one out"
            )
        if self.feature_cache_storage is not None:
            if not self.feature_cache_fill:
                raise ValueError(
                    "--feature_cache_storage is how --feature_cache_fill keeps features; a folder that is there says "
                    "it itself: leave the flag out"
                )
            if self.feature_cache_storage not in STORAGES:
                raise ValueError(
                    f"--feature_cache_storage is {self.feature_cache_storage!r}; known: {', '.join(STORAGES)}"
                )


@dataclass(kw_only=True)
class StagingArguments(FeatureCacheArguments):
    """Whether media are copied to a disk of each machine first, or features take their place."""

    # --- images and videos ---
    stage_media: str | None = None
    """A folder on a local disk of each machine, to which the images and clips of the run are copied before its first
    step, by one process a machine, and read from there; the next run takes the copies of what has not changed
    (docs/slurm.md)."""
    stage_timeout: float = 1800.0
    """Seconds after which the other processes of a machine give up waiting for the one of --stage_media, if it copies
    nothing in them."""

    def check_feature_cache(self) -> None:
        """A ValueError for flags that do not go together."""
        super().check_feature_cache()
        if self.stage_media is not None and self.feature_cache is not None:
            raise ValueError(
                "--stage_media: with --feature_cache images and clips are read once at most, and a copy saves nothing; "
                "leave it out, or give --feature_cache none where a recipe asks for one"
            )
        if not 0 < self.stage_timeout < math.inf:
            raise ValueError(f"--stage_timeout is {self.stage_timeout}; it is a number of seconds above 0")


@dataclass
class SpeedArguments:
    """How samples become batches, and what a step costs."""

    # --- batches ---
    packing: bool = False
    """Put several samples, text or with media, one behind the other in each row of a batch, up to --model_max_length
    tokens, where padding would stand: positions begin anew with each sample, and none sees another. A batch then has
    --per_device_train_batch_size such rows."""
    max_tokens_per_batch: int | None = None
    """Fill each batch of a process with as many samples of similar length as fit so many positions, padding and visual
    tokens included, in place of --per_device_train_batch_size samples."""

    # --- precision ---
    bf16_weights: bool = False
    """With --bf16: hold weights, gradients and the optimizer's state in bfloat16, without a copy in 32 bits: half the
    memory of these. An update of less than 1/256 of a weight is lost, so that a run learns less from small learning
    rates (docs/performance.md has the losses)."""

    # --- kernels ---
    fused_gelu: bool = False
    """Compute gelu_new, GPT-2's activation, in one kernel in place of eight: the same function, rounded otherwise
    (docs/performance.md has what it saves)."""

    onednn: bool = False
    """On a CPU, compute float32 products with weights by oneDNN in place of MKL, which on AMD's processors is nearly
    twice as fast: the same sums with other last bits (docs/performance.md)."""

    # --- throughput ---
    peak_flops: str | None = None
    """What mfu in the log is a share of: operations a second of one GPU (or of a process on the CPU), such as 989T;
    measure takes the rate of a product of matrices as the run begins (default: bf16 of the GPUs known by name; without
    one there is no mfu)."""

    # --- loading of data ---
    dataloader_persistent_workers: bool = True
    """Keep the workers of the training data from epoch to epoch (default true; without workers it means nothing)."""

    def check_speed(self) -> None:
        """A ValueError for flags that do not go together."""
        grouped = getattr(self, "train_sampling_strategy", None) == BY_LENGTH
        if self.packing and self.max_tokens_per_batch is not None:
            raise ValueError(
                "--packing fills rows of --model_max_length tokens, and --per_device_train_batch_size of these are a "
                "batch; leave out --max_tokens_per_batch"
            )
        if self.packing and grouped:
            raise ValueError(
                f"--packing puts long and short samples together, and --train_sampling_strategy {BY_LENGTH} asks for "
                f"the contrary; take random, or {BY_MODALITY} to keep text-only samples apart"
            )
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"--max_tokens_per_batch is {self.max_tokens_per_batch}; it must be at least 1")
        if self.bf16_weights:
            self._check_bf16_weights()
        if self.onednn and getattr(self, "torch_compile", False):
            raise ValueError("--onednn: --torch_compile chooses its own products; leave one of the two out")
        if self.peak_flops is not None:
            parse_peak(self.peak_flops)

    def _check_bf16_weights(self) -> None:
        given = {name: getattr(self, name, None) for name in ("bf16", "deepspeed", "bits")}
        if not given["bf16"]:
            raise ValueError("--bf16_weights holds weights in what --bf16 computes in; add --bf16 true")
        if given["deepspeed"]:
            raise ValueError("--bf16_weights: DeepSpeed holds copies of its own in 32 bits; leave one of the two out")
        if given["bits"] not in (None, 16):
            raise ValueError(
                f"--bf16_weights: --bits {given['bits']} holds weights in fewer bits already; leave it out"
            )
