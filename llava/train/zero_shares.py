"""Checkpoints of ZeRO that were written by another number of ranks.

Every rank of ZeRO has a file with its share of the optimizer: of each group of parameters, which lie one behind the
other, a piece of the weights in fp32 and of the optimizer's moments. DeepSpeed reads them back with the same number of
ranks alone. Here each rank takes what is to be its own share out of the files of the others; no bit of it changes::

    ZeRO-1, 2   a group as one row of numbers, cut into as many pieces as there are ranks
    ZeRO-3      every parameter of a group cut by itself; frozen ones too, which lie in the files of the model
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llava.compat_deepspeed import describe_engine, load_engines_by, read_engine_file, serving_files
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_failures, is_first_rank

logger = logging.getLogger(__name__)

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_STAGE3_MODEL = "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
_MODEL = "mp_rank_00_model_states.pt"


class Piece(NamedTuple):
    """So many numbers of a rank's file, and their place in a new share."""

    file: int
    source: int
    target: int
    length: int


class Change(NamedTuple):
    """From how many shares to how many, and whose is made.

    Attributes:
        stage: of ZeRO.
        before: ranks that wrote the checkpoint.
        now: ranks of this run.
        rank: whose share is made.
    """

    stage: int
    before: int
    now: int
    rank: int


class Layout(NamedTuple):
    """A group of parameters as it was shared out and as it is to be.

    Attributes:
        before: numbers of an old share, padding included.
        now: numbers of the new one.
        pieces: of old shares that make the new one.
    """

    before: int
    now: int
    pieces: list[Piece]


class MisfitError(ValueError):
    """What keeps a checkpoint from being shared out anew."""


def load_other_ranks() -> None:
    """Let transformers' trainer read checkpoints of DeepSpeed whatever the number of ranks that wrote them."""
    load_engines_by(load_engine)


def load_engine(engine: Any, folder: str, load: Callable[[], None]) -> None:
    """Load a checkpoint of DeepSpeed, whatever the number of ranks that wrote it; all ranks call this together.

    Args:
        engine: of this rank.
        folder: of the checkpoint.
        load: reads it as DeepSpeed does, where ranks and stage are the same.

    Raises:
        AgreedError: it is of another stage, or cannot be shared out to these ranks.
    """
    inside = broadcast_from_rank0(lambda: _find_files(Path(folder)))
    before, now = len(inside.optimizer), dist.get_world_size()
    stage = int(engine.zero_optimization_stage())
    if inside.is_stage3 != (stage == 3) or (before > 0) != (stage > 0):
        was = "zero3" if inside.is_stage3 else "zero1 or zero2" if before else "a configuration without ZeRO"
        raise AgreedError(
            f"--resume_from_checkpoint {folder} was written with --deepspeed {was}, whose files this run's "
            f"ZeRO-{stage} cannot read; give --deepspeed as it was then"
        )
    if before in (0, now):
        load()
        return
    failure, files = None, dict[str, dict[str, Any]]()
    try:
        files = share_out(engine, inside, Change(stage, before, now, dist.get_rank()))
    # A file that is damaged, or of a form that is not known: each reader says it in its own way.
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        failure = (
            str(error) if isinstance(error, MisfitError) else f"{type(error).__name__}: {error}".partition("\n")[0]
        )
    if failures := gather_failures(failure):
        raise AgreedError(
            f"--resume_from_checkpoint {folder} was written by {before} ranks of ZeRO-{stage}, and this run has {now}, "
            f"to which its optimizer cannot be shared out ({failures[0]}); go on with {before} ranks"
        )
    if is_first_rank():
        logger.info("%s: the optimizer's shares of %d ranks become those of %d", folder, before, now)
    with serving_files(engine, inside.model_of(0), files):
        load()


class Files(NamedTuple):
    """The files of a checkpoint's engine.

    Attributes:
        folder: where they lie.
        optimizer: rank by rank; none without ZeRO.
        is_stage3: whether each rank has one of the model, too.
    """

    folder: Path
    optimizer: list[Path]
    is_stage3: bool

    def model_of(self, rank: int) -> Path:
        """The file of the model that a rank reads."""
        return self.folder / (_STAGE3_MODEL.format(rank=rank) if self.is_stage3 else _MODEL)


def _find_files(checkpoint: Path) -> Files:
    found = sorted(path for path in checkpoint.glob("global_step*") if path.is_dir())
    if len(found) != 1:
        raise ValueError(f"--resume_from_checkpoint {checkpoint} has {len(found)} folders global_stepN; expected one")
    ranks = {int(match[1]): path for path in found[0].iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))}
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(
            f"{found[0]} lacks files of some ranks: it has those of {sorted(ranks)}; take another checkpoint"
        )
    is_stage3 = (found[0] / _STAGE3_MODEL.format(rank=0)).is_file()
    return Files(found[0], [ranks[rank] for rank in range(len(ranks))], is_stage3)


def share_out(engine: Any, files: Files, change: Change) -> dict[str, dict[str, Any]]:
    """What DeepSpeed is to read in place of files, by their names.

    Raises:
        MisfitError: it would be another optimizer.
    """
    groups, shares = describe_engine(engine)
    model = read_engine_file(engine, files.model_of(0))
    stored = [{name: shape.numel() for name, shape in group.items()} for group in model["param_shapes"]]
    # The order too: dictionaries compare without it. DeepSpeed's round_robin_gradients orders by the number of ranks.
    if [list(group.items()) for group in stored] != [list(group.items()) for group in groups]:
        raise MisfitError("its groups of parameters are others, or in another order")
    first = read_engine_file(engine, files.optimizer[0])
    layouts = _lay_out(change, first["optimizer_state_dict"], groups, shares)
    optimizer = _share_optimizer(engine, files, first, layouts, change)
    own = model | {"dp_world_size": change.now}
    if change.stage == 3 and model.get("frozen_param_fragments"):
        own["frozen_param_fragments"] = _share_frozen(engine, files, model, change)
    name = files.optimizer[0].name.replace("zero_pp_rank_0_", f"zero_pp_rank_{change.rank}_")
    return {name: optimizer, files.model_of(0).name: own}


def _lay_out(
    change: Change, state: Mapping[str, Any], groups: Sequence[Mapping[str, int]], shares: Sequence[int]
) -> list[Layout]:
    """How each group is cut: what it holds, and the share that each rank of this run has of it."""
    layouts = []
    for number, (group, share) in enumerate(zip(groups, shares, strict=True)):
        if change.stage == 3:
            numels, old = list(group.values()), state["fp32_flat_groups"][number].numel()
        else:
            # Stored without the padding behind the row, which the last shares have; more may be between parameters.
            gaps = state["param_alignment_paddings"][number] if "param_alignment_paddings" in state else ()
            numels = [sum(group.values()) + sum(gaps)]
            old = state["single_partition_of_fp32_groups"][number].numel() + state["group_paddings"][number]
        layouts.append(Layout(old, share, list(_cut(change, numels, old, share))))
    return layouts


def _cut(change: Change, numels: Sequence[int], old: int, share: int) -> Iterator[Piece]:
    """The pieces of old shares that make a rank's new share of a group.

    Args:
        change: of the ranks.
        numels: of what is cut by itself, one behind the other.
        old, share: numbers of an old share and of the new one.
    """
    source = target = 0
    for numel in numels:
        parts = (old, share)
        if change.stage == 3:
            parts = (math.ceil(numel / change.before), math.ceil(numel / change.now))
        if parts[0] * change.before < numel or parts[1] * change.now < numel:
            raise MisfitError(f"{numel} numbers in shares of {parts[0]}, and here of {parts[1]}")
        yield from place(numel, *parts, change.rank, source, target)
        source, target = source + parts[0], target + parts[1]
    if (source, target) != (old, share):
        raise MisfitError(f"shares of {old} and here of {share} numbers, expected {source} and {target}")


def place(numel: int, old: int, now: int, rank: int, source: int = 0, target: int = 0) -> Iterator[Piece]:
    """Where the numbers of a rank's new part of one row come from.

    Args:
        numel: numbers of the row.
        old, now: of an old part and of a new one; the last parts are padded.
        rank: whose part is made.
        source, target: where the row's parts begin in old and new shares.
    """
    begin, end = rank * now, min((rank + 1) * now, numel)
    while begin < end:
        file = begin // old
        length = min(end, (file + 1) * old) - begin
        yield Piece(file, source + begin - file * old, target + begin - rank * now, length)
        begin += length


def _share_optimizer(
    engine: Any, files: Files, first: dict[str, Any], layouts: Sequence[Layout], change: Change
) -> dict[str, Any]:
    """A rank's file of the optimizer, as it would have been written by the ranks of this run."""
    weights_of, base_of = ("single_partition_of_fp32_groups", "base_optimizer_state")
    if change.stage == 3:
        weights_of, base_of = ("fp32_flat_groups", "optimizer_state_dict")
    template = first["optimizer_state_dict"]
    weights = [
        torch.zeros(layout.now, dtype=share.dtype) for layout, share in zip(layouts, template[weights_of], strict=True)
    ]
    # A group that no step has come to yet has no state.
    moments: dict[int, dict[str, Any]] = {number: {} for number in template[base_of]["state"]}
    needed = {piece.file for layout in layouts for piece in layout.pieces}
    for number in sorted({0, *needed}):  # One after the other: all shares together may not fit the memory.
        path = files.optimizer[number]
        state = (first if number == 0 else read_engine_file(engine, path))["optimizer_state_dict"]
        if state[base_of]["state"].keys() != moments.keys():
            raise MisfitError(f"{path.name} has the state of other groups than the first rank's file")
        for group, layout in enumerate(layouts):
            pieces = [piece for piece in layout.pieces if piece.file == number]
            _copy(state[weights_of][group], weights[group], pieces)
            if group in moments:
                _share_moments(state[base_of]["state"][group], moments[group], layout, pieces, path.name)
    own = template | {weights_of: weights, base_of: template[base_of] | {"state": moments}}
    if change.stage == 3:
        own["partition_count"] = change.now
    else:
        own |= {"partition_count": [change.now] * len(layouts), "group_paddings": [0] * len(layouts)}
    return first | {"optimizer_state_dict": own}


def _share_moments(
    state: Mapping[str, Any], own: dict[str, Any], layout: Layout, pieces: Sequence[Piece], file: str
) -> None:
    """Take from one rank's file what a new share has of the optimizer's state of a group.

    Raises:
        MisfitError: it is nothing that can be cut: of blocks, or of a rank's whole share.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == (layout.before,):
            _copy(value, own.setdefault(name, torch.zeros(layout.now, dtype=value.dtype)), pieces)
        elif getattr(value, "ndim", 0) or not _is_same(own.setdefault(name, value), value):
            raise MisfitError(
                f"{name} in {file} belongs to that rank's share as a whole; only optimizers that keep numbers of each "
                "weight, such as AdamW, can be shared out"
            )


def _is_same(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def _copy(source: Tensor, target: Tensor, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        target[piece.target : piece.target + piece.length] = source[piece.source : piece.source + piece.length]


def _share_frozen(engine: Any, files: Files, model: dict[str, Any], change: Change) -> dict[str, Tensor]:
    """A rank's parts of the frozen parameters under ZeRO-3."""
    own: dict[str, Tensor] = {}
    pieces: dict[str, list[Piece]] = {}
    for name, shape in model["frozen_param_shapes"].items():
        part, now = model["frozen_param_fragments"][name], math.ceil(shape.numel() / change.now)
        if part.numel() != math.ceil(shape.numel() / change.before):
            raise MisfitError(f"{name} has {part.numel()} of {shape.numel()} numbers in the first rank's file")
        own[name] = torch.zeros(now, dtype=part.dtype)
        pieces[name] = list(place(shape.numel(), part.numel(), now, change.rank))
    for number in sorted({piece.file for of_one in pieces.values() for piece in of_one}):
        content = model if number == 0 else read_engine_file(engine, files.model_of(number))
        for name, of_one in pieces.items():
            parts = content["frozen_param_fragments"]
            _copy(parts[name].flatten(), own[name], [piece for piece in of_one if piece.file == number])
    return own
