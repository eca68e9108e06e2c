"""What a run takes back from a folder: weights, optimizer and schedule, random states and the meter of losses.

All of it fits this run, or is an error before the first step: torch and transformers would leave what finds no place as
it was begun with, and the run would train on from weights that were never trained.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llava.compat import evaluate_as_due, kept_out_of_checkpoints, restore_loop
from llava.messages import list_names
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import read_pretrained
from llava.model.lora import has_adapters, load_adapter_weights, read_adapter_weights
from llava.model.pretrained import describe_damage
from llava.train.checkpoint_contents import check_moments, check_schedule, reading_state
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_from_ranks, is_first_rank
from llava.train.elastic import saved_ranks, seed_rank
from llava.train.identity import OPTIMIZER_SETTINGS, Differences
from llava.train.parts import put_in_force
from llava.train.saving import LOSS_SINCE_LOG
from llava.train.sharding import shares_of

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of a model or of its files, by name."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "sum")
"""What torch's optimizers keep of a parameter in its own shape."""


# --- weights ------------------------------------------------------------------------------------------


def load_weights(model: LlavaMetaForCausalLM, folder: str) -> None:
    """Read the weights of a folder into a model that is there already, on all ranks.

    Raises:
        AgreedError: a file is missing or damaged, or its tensors are not those of the model.
    """
    failure = None
    try:
        if has_adapters(model):
            # transformers reads back only adapters of peft's own model class, and nothing that trained beside them.
            load_adapter_weights(model, folder)
        else:
            for state in _read_states(model, folder):
                model.load_state_dict(shares_of(state, model), strict=False)
    except ValueError as error:
        failure = str(error)
    # A rank whose file alone is bad must not leave the others waiting for it in the first step.
    if failures := [said for said in gather_from_ranks(failure) if said is not None]:
        raise AgreedError(failures[0])


def check_weights(model: LlavaMetaForCausalLM, folder: str) -> None:
    """A ValueError where ``load_weights`` would give one, for a folder that is to be read later."""
    if has_adapters(model):
        read_adapter_weights(model, folder)
    elif _find_misfit(model, _stored_shapes(folder)):
        _read_by_other_names(model, folder)


def _read_states(model: LlavaMetaForCausalLM, folder: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of a folder by the model's names: file by file, so that a large model is not held twice."""
    stored = _stored_shapes(folder)
    if _find_misfit(model, stored):
        yield _read_by_other_names(model, folder)
        return
    for file in _weight_files(Path(folder)):
        yield load_file(file)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [path for path in (folder / SAFE_WEIGHTS_NAME,) if path.is_file()]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _stored_shapes(folder: str) -> Shapes:
    """The names and shapes of a folder's tensors, from the heads of its files; none for files of another kind.

    Raises:
        ValueError: a file is missing, cut short or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in _weight_files(Path(folder)):
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: {describe_damage(folder, error)}, or take another checkpoint") from error
    return shapes


def _find_misfit(model: LlavaMetaForCausalLM, stored: Shapes) -> str:
    """In which tensors a file and a model differ, in words; empty where every tensor finds its place."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Of tensors that are one, a file has one; which one has changed between releases of transformers.
    tied = model.all_tied_weights_keys
    one_of = {name: {name, partner} for pair in tied.items() for name, partner in (pair, pair[::-1])}
    elsewhere = _kept_elsewhere(model)
    missing = [name for name in own if not one_of.get(name, {name}) & stored.keys() and name not in elsewhere]
    reshaped = [name for name in own.keys() & stored.keys() if own[name] != stored[name]]
    return _say_misfit(missing, stored.keys() - own.keys(), reshaped)


def _kept_elsewhere(model: LlavaMetaForCausalLM) -> set[str]:
    """Names of tensors that a checkpoint may lack: those of a frozen tower, which was read from its own source.

    Also where ``--save_vision_tower`` was given only after the checkpoint was written.
    """
    tower = model.get_vision_tower()
    if tower is None or tower.trainable:
        return kept_out_of_checkpoints(model)
    return kept_out_of_checkpoints(model) | {name for name in model.state_dict() if ".vision_tower." in name}


def _say_misfit(missing: Collection[str], unexpected: Collection[str], reshaped: Collection[str]) -> str:
    kinds = ((missing, "lacks"), (unexpected, "has beside them"), (reshaped, "has in another shape"))
    return "; ".join(f"it {verb} {len(names)}: {list_names(sorted(names))}" for names, verb in kinds if names)


def _read_by_other_names(model: LlavaMetaForCausalLM, folder: str) -> dict[str, Tensor]:
    """The tensors of a folder whose files name them otherwise than the model, which transformers translates.

    Every expert of a mixture is stored by itself, for one; in the model they are one tensor.

    Raises:
        ValueError: they are not the model's; names the folder and some of them.
    """
    # Past the model's own from_pretrained, which would read a frozen tower once more. In fp32, from which every
    # narrower type that a parameter may have gets its stored values back.
    load = super(LlavaMetaForCausalLM, type(model)).from_pretrained
    fresh, info = read_pretrained(load, folder, "--resume_from_checkpoint", config=model.config, dtype=torch.float32)
    elsewhere = _kept_elsewhere(model)
    reshaped = [name for name, *_ in info["mismatched_keys"]]
    if misfit := _say_misfit(set(info["missing_keys"]) - elsewhere, info["unexpected_keys"], reshaped):
        raise ValueError(
            f"{folder} does not have the weights of this run's model: {misfit}; give --resume_from_checkpoint another "
            "checkpoint, or the model, flags and version of this library that it was written with"
        )
    return {name: tensor for name, tensor in fresh.state_dict().items() if name not in elsewhere}


# --- optimizer and schedule ---------------------------------------------------------------------------


def load_optimizer(trainer: Trainer, checkpoint: str, changes: Differences | None, load: Callable[[str], None]) -> None:
    """Read optimizer and schedule, and put in force what flags say now.

    Args:
        trainer: has both, not stepped yet.
        checkpoint: whose settings need not be these.
        changes: from the run that wrote it; None where nothing tells.
        load: transformers' way of reading both.

    Raises:
        AgreedError: the state is another optimizer's, or DeepSpeed's with other settings.
    """
    changes = changes or Differences([], [], frozenset())
    deepspeed = trainer.is_deepspeed_enabled
    if deepspeed and changes.names:
        raise AgreedError(
            "--resume_changed cannot be had with --deepspeed, which keeps the optimizer settings of its "
            "checkpoint; start a new run from the weights: --model_name_or_path " + checkpoint
        )
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    assert optimizer is not None
    assert scheduler is not None
    # Noted before reading: a state dict of torch brings the settings of its groups, and these would be gone.
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if changes.names & OPTIMIZER_SETTINGS:
        logger.warning("the optimizer's state is not that of this optimizer any more, and begins anew")
        with reading_state(checkpoint, SCHEDULER_NAME):
            check_schedule(scheduler, checkpoint)
            scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
    elif deepspeed:  # Its engine has read its own files already, and was strict about them.
        load(checkpoint)
    else:
        with reading_state(checkpoint, OPTIMIZER_NAME):
            broadcast_from_rank0(lambda: check_optimizer_state(optimizer, checkpoint))
        with reading_state(checkpoint, SCHEDULER_NAME):
            check_schedule(scheduler, checkpoint)
        with reading_state(checkpoint, f"{OPTIMIZER_NAME} or {SCHEDULER_NAME}"):
            load(checkpoint)
            check_moments(optimizer)
    if not (changes.names or changes.rescheduled):
        return
    put_in_force(optimizer, scheduler, settings)
    if is_first_rank():
        rates = dict.fromkeys(f"{group.get('part', '')} {group['lr']:.3g}" for group in optimizer.param_groups)
        logger.info("learning rates that the run goes on with: %s", ", ".join(rates))


def check_optimizer_state(optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
    """See that an optimizer's stored state is of the same groups of parameters; nothing of it is read but shapes.

    The state of a parameter is found by its place among the others, so groups in another order, of the same sizes,
    would each take up another one's. transformers skips, without a word, a state that is not there.

    Raises:
        ValueError: it is not; names the checkpoint and the group.
    """
    # optimizer.pt: {"state": {place: {"exp_avg": ..., ...}}, "param_groups": [{"params": [place, ...], "lr": ...}]}.
    path = Path(checkpoint, OPTIMIZER_NAME)
    advice = (
        "; give --resume_from_checkpoint another checkpoint, or the flags that it was written with (--optim, "
        "--mm_tunable_parts), or begin a new run from its weights: --model_name_or_path " + checkpoint
    )
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {OPTIMIZER_NAME}, and the optimizer would begin anew{advice}")
    # Shapes alone: tensors on the meta device take no memory.
    stored = torch.load(path, map_location="meta", weights_only=True)
    # Those of other packages keep moments in other shapes, of low rank or in blocks.
    of_torch = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("torch.optim")
    before, now = stored["param_groups"], optimizer.param_groups
    if len(before) != len(now):
        raise ValueError(f"{path} has {len(before)} groups of parameters, this run's optimizer has {len(now)}{advice}")
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        # Versions before the groups had names of parts say nothing of them.
        said = [name for name in ("part", "vision_module") if name in old and old[name] != new.get(name)]
        if said or len(old["params"]) != len(new["params"]):
            there, here = (f"{len(group['params'])} of {group.get('part', 'no part')}" for group in (old, new))
            raise ValueError(f"{path}: group {number} of its parameters is {there}, in this run {here}{advice}")
        for place, parameter in zip(old["params"], new["params"], strict=True):
            for name, moment in stored["state"].get(place, {}).items():
                if of_torch and name in _MOMENTS and moment.shape != parameter.shape:
                    shapes = f"{tuple(moment.shape)}, in this run {tuple(parameter.shape)}"
                    raise ValueError(f"{path}: {name} of parameter {place} (group {number}) is {shapes}{advice}")


def say_finished(folder: str | None, steps: int) -> None:
    """Say that nothing is left to train of a run."""
    if is_first_rank():
        print(
            f"the run in {folder} is finished: all of its {steps} steps were trained before, and nothing is left to "
            "train",
            flush=True,
        )


# --- the moment of a checkpoint -----------------------------------------------------------------------


@dataclass(eq=False)
class ResumeCallback(TrainerCallback):
    """Takes up, before the first step, what a checkpoint says of the moment when it was written.

    Attributes:
        trainer: that goes on.
        checkpoint: from which.
    """

    trainer: Trainer
    checkpoint: str

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Go on with random states and the losses since the last line of the log; make up for an evaluation."""
        folder, rank, ranks = Path(self.checkpoint), args.process_index, args.world_size
        saved = {
            path.name: json.loads(path.read_text("utf-8")) for path in folder.glob(LOSS_SINCE_LOG.format(rank="*"))
        }
        same_ranks = saved_ranks(folder) == ranks
        meter = None
        if saved:
            # The next line of the log is a mean over ranks, of losses before and after: on other ranks, each goes on
            # from that mean. train_loss, at the end, is that of new losses alone, so those before count against it.
            mean = sum(one["sum"] for one in saved.values()) / len(saved)
            own = saved.get(LOSS_SINCE_LOG.format(rank=rank)) if same_ranks else None
            last = next(iter(saved.values()))["last_logged_step"]
            meter = (mean if own is None else own["sum"], last, -mean)
        else:
            logger.warning(
                "%s does not have the losses since the last line of the log (an earlier version wrote it): the next "
                "line has those of new steps alone", self.checkpoint,
            )  # fmt: skip
        seed = None if same_ranks else partial(seed_rank, args.seed, state.global_step, rank, ranks)
        with reading_state(self.checkpoint, "rng_state*.pth"):
            restore_loop(self.trainer, self.checkpoint, meter, seed)
        # A run that was asked to stop has saved in place of the evaluation that its step was due.
        states = state.stateful_callbacks
        if isinstance(states, dict) and states.get("TrainerControl", {}).get("args", {}).get("should_evaluate"):
            evaluate_as_due(self.trainer)
