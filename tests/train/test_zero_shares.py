"""Shares of ZeRO's optimizer for another number of ranks: bit for bit what these ranks would have written."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.train import zero_shares
from llava.train.distributed import AgreedError
from llava.train.zero_shares import Change, Files, MisfitError, load_engine, share_out

SIZES = [{"wte": 37, "wpe": 24, "proj": 5}, {"bias": 3, "norm": 1}, {"unused": 10}]
FROZEN = {"tower.weight": 29, "tower.bias": 2}
LAST = 2
"""A group that no step has come to, and so without moments."""


def shapes(sizes: dict[str, int]) -> dict[str, torch.Size]:
    return {name: torch.Size([number]) for name, number in sizes.items()}


def numbers(kind: str, name: str, size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(sum(map(ord, kind + name))))


def cut(row: Tensor, rank: int, ranks: int, align: int = 1) -> Tensor:
    """A rank's part of a row, padded with zeros."""
    size = math.ceil(len(row) / (ranks * align)) * align
    part = row[rank * size : (rank + 1) * size]
    return torch.cat([part, torch.zeros(size - len(part))])


def share(kind: str, sizes: dict[str, int], stage: int, rank: int, ranks: int) -> Tensor:
    rows = [numbers(kind, name, size) for name, size in sizes.items()]
    if stage == 3:
        return torch.cat([cut(row, rank, ranks) for row in rows])
    return cut(torch.cat(rows), rank, ranks, align=2)  # DeepSpeed's parts are even.


def write(stage: int, ranks: int) -> dict[str, dict[str, Any]]:
    """The files of so many ranks, by name, as DeepSpeed writes them."""
    files: dict[str, dict[str, Any]] = {}
    for rank in range(ranks):
        weights = [share("fp32", sizes, stage, rank, ranks) for sizes in SIZES]
        state: dict[int, dict[str, Any]] = {
            number: {"step": torch.tensor(7.0)}
            | {kind: share(kind, sizes, stage, rank, ranks) for kind in ("exp_avg", "exp_avg_sq")}
            for number, sizes in enumerate(SIZES[:LAST])
        }
        base = {"state": state, "param_groups": [{"lr": 0.1}] * len(SIZES)}
        if stage == 3:
            own: dict[str, Any] = {"fp32_flat_groups": weights, "optimizer_state_dict": base, "partition_count": ranks}
        else:
            totals = [sum(sizes.values()) for sizes in SIZES]
            kept = [min(max(total - rank * len(w), 0), len(w)) for total, w in zip(totals, weights, strict=True)]
            own = {
                "single_partition_of_fp32_groups": [w[:k] for w, k in zip(weights, kept, strict=True)],
                "base_optimizer_state": base, "partition_count": [ranks] * len(SIZES),
                "group_paddings": [len(w) - k for w, k in zip(weights, kept, strict=True)],
            }  # fmt: skip
        own |= {"loss_scaler": "a scaler of fp16", "dynamic_loss_scale": True, "overflow": False}
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": own}
        model = {"param_shapes": [shapes(sizes) for sizes in SIZES], "dp_world_size": ranks}
        if stage == 3:
            fragments = {name: cut(numbers("frozen", name, size), rank, ranks) for name, size in FROZEN.items()}
            model |= {"frozen_param_shapes": shapes(FROZEN), "frozen_param_fragments": fragments}
            files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = model
        else:
            files["mp_rank_00_model_states.pt"] = model
    return files


def engine(stage: int, ranks: int, files: dict[str, dict[str, Any]], sizes: list[dict[str, int]] = SIZES) -> Any:
    shares = [share("fp32", of_group, stage, 0, ranks) for of_group in sizes]
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        _get_zero_param_shapes=lambda: [shapes(of_group) for of_group in sizes],
        optimizer=SimpleNamespace(single_partition_of_fp32_groups=shares, fp32_partitioned_groups_flat=shares),
        checkpoint_engine=SimpleNamespace(load=lambda path, map_location: files[Path(path).name]),
    )


def described(stage: int, ranks: int) -> Files:
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    return Files(Path("checkpoint"), [Path("checkpoint", name) for name in names], stage == 3)


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Everything in a file by its path."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {key: value for name, inner in items for key, value in flat(inner, f"{path}/{name}").items()}
    return {path: content.tolist() if isinstance(content, Tensor) else content}


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 1), (1, 2), (2, 3), (3, 5), (7, 4)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shares_are_those_that_the_ranks_would_have_written(stage: int, before: int, now: int) -> None:
    files, expected = write(stage, before), write(stage, now)
    for rank in range(now):
        made = share_out(engine(stage, now, files), described(stage, before), Change(stage, before, now, rank))
        optimizer_file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        own, other = made.pop(optimizer_file)["optimizer_state_dict"], expected[optimizer_file]["optimizer_state_dict"]
        if stage < 3:  # Both with the padding: DeepSpeed adds what is missing.
            full = [share("fp32", sizes, stage, rank, now) for sizes in SIZES]
            other = other | {"single_partition_of_fp32_groups": full, "group_paddings": [0] * len(SIZES)}
        assert flat(own) == flat(other)
        (model,) = made.values()
        model_file = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        assert flat(model) == flat(expected[model_file])
    assert flat(files) == flat(write(stage, before)), "what was read stays as it is"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "exp_avg_sq_row",
            torch.ones(6),
            "exp_avg_sq_row in zero_pp_rank_0_.* belongs to that rank's share",
        ),
        ("exp_avg", torch.ones(34, dtype=torch.uint8), "exp_avg in zero_pp_rank_0_"),
        ("RMS", None, "RMS in zero_pp_rank_1_"),
    ],
    ids=["factored", "8 bits", "another on each rank"],
)
def test_an_optimizer_that_knows_its_share_is_refused(stage: int, name: str, value: Tensor | None, said: str) -> None:
    files = write(stage, 2)
    for rank in range(2):
        state = files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]["optimizer_state_dict"]
        base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        base["state"][0][name] = float(rank) if value is None else value
    with pytest.raises(MisfitError, match=said):
        share_out(engine(stage, 1, files), described(stage, 2), Change(stage, 2, 1, 0))


def test_other_groups_are_refused() -> None:
    reordered = [dict(reversed(SIZES[0].items())), *SIZES[1:]]
    with pytest.raises(MisfitError, match="others, or in another order"):
        share_out(engine(2, 1, write(2, 2), reordered), described(2, 2), Change(2, 2, 1, 0))
    other = engine(3, 1, write(3, 2))
    other.optimizer.fp32_partitioned_groups_flat[0] = torch.zeros(0)  # Offloaded to a disk.
    with pytest.raises(MisfitError, match="shares of 34 and here of 0 numbers, expected 34 and 66"):
        share_out(other, described(3, 2), Change(3, 2, 1, 0))


@pytest.mark.parametrize(
    ("stage", "ranks", "gone", "said"),
    [
        (3, 2, None, "was written with --deepspeed zero1 or zero2, whose files this run's ZeRO-3 cannot read"),
        (2, 1, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "lacks files of some ranks: it has those of \\[0, 2\\]"),
        (2, 3, None, "^loaded$"),  # The same number of ranks: DeepSpeed reads its own files.
        (2, 2, None, "was written by 3 ranks of ZeRO-2, and this run has 2, .*KeyError.*; go on with 3 ranks"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, ranks: int, gone: str | None, said: str
) -> None:
    folder = tmp_path / "global_step3"
    folder.mkdir()
    files = write(2, 3)
    for name in files.keys() - {gone}:
        (folder / name).touch()
    del files["mp_rank_00_model_states.pt"]["param_shapes"]  # As in no version that is known.
    monkeypatch.setattr(zero_shares, "dist", SimpleNamespace(get_world_size=lambda: ranks, get_rank=lambda: 0))

    def load() -> None:
        raise AgreedError("loaded")

    with pytest.raises(AgreedError if gone is None else ValueError, match=said):
        load_engine(engine(stage, ranks, files), str(tmp_path), load)
