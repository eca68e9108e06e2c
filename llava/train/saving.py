"""The checkpoints of a run and its final model: nothing half-written has a name, and what stops a save is said once."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from llava import progress
from llava.compat import kept_out_of_checkpoints, save_training_state
from llava.io import write_beside, write_json
from llava.model.lora import has_adapters
from llava.model.model_card import write_card
from llava.model.quantization import count_weights
from llava.stored_forms import TRAINING_STATE
from llava.train.checkpoint import (
    CHECKSUMS,
    RUN_IDENTITY,
    finalize,
    find_changes,
    list_checkpoints,
    replace_files,
    rotate,
    staging_of,
    store_best,
)
from llava.train.data_order import DATA_STATE, TrainingData
from llava.train.disk_errors import WriteFailure, explain_failures, free_bytes, is_write_error
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_failures
from llava.train.exposure_log import EXPOSURE_STATE, ExposureLog
from llava.train.hub import HubTarget
from llava.train.identity import RunIdentity
from llava.train.milestones import Milestone
from llava.train.model_card import CardSettings, describe_run, in_seconds
from llava.train.preemption import StopRequest
from llava.train.run_lock import LOCK, check_lock
from llava.train.sharding import whole_states

logger = logging.getLogger(__name__)

LOSS_SINCE_LOG = "loss_since_log_{rank}.json"
"""File of a checkpoint: a rank's sum of losses that no line of the log has yet, and the step of the last line."""


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of a trainer, its final model and its state, and tries before the first step that it can.

    A checkpoint is written beside its place by all ranks. When they have met, the first one gives it checksums and
    then its name.

    Attributes:
        trainer: whose model, optimizer and state are written.
        data: trained on; a checkpoint has the place in them.
        stop_request: a checkpoint that it asks for has everything to go on from.
        exposure: what was presented up to the last step.
        identity: what this run is; None where a program does not say.
        card: what the cards of its models say beside what their folders hold.
        hub: where they are sent; None where they are not.
    """

    trainer: Any  # transformers' types know of no model's config
    data: TrainingData
    stop_request: StopRequest
    exposure: ExposureLog
    identity: RunIdentity | None = None
    card: CardSettings = field(default_factory=CardSettings)
    hub: HubTarget | None = None

    def write_checkpoint(self) -> None:
        """Write ``checkpoint-N`` of the last step, and remove those that ``--save_total_limit`` has no room for."""
        args, state = self.trainer.args, self.trainer.state
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        # The evaluation of an earlier step may have been the best without leaving a checkpoint.
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        # What a run that was asked to stop leaves is to go on from, also with --save_only_model.
        self._write_folder(folder, self.stop_request.agreed or not args.save_only_model)
        if args.should_save:
            # Only now: until this one had its name, the oldest may have been the only one. The other ranks train on.
            rotate(folder, args.save_total_limit, keep=[state.best_model_checkpoint])
            if self.hub is not None:
                self.hub.send_checkpoint(folder, state.global_step)

    def write_milestone(self, milestone: Milestone) -> None:
        """Write the model of a milestone, with an optimizer only where ``--milestone_optimizer`` asks for it.

        One that an earlier part of this very run has left, which then went on from an older checkpoint, stays.
        """
        exposure = self.exposure.state()
        if broadcast_from_rank0(lambda: self._is_written(milestone.folder, exposure)):
            logger.info("%s is there already, whole and of this run", milestone.folder)
        else:
            self._write_folder(milestone.folder, self.trainer.args.milestone_optimizer)

    def _is_written(self, folder: Path, exposure: dict[str, Any]) -> bool:
        """Whether a folder is whole, of this run, and of this step."""
        if not (folder / CHECKSUMS).is_file() or find_changes(folder) or self.identity is None:
            return False
        before = RunIdentity.read(folder)
        counted = json.loads((folder / EXPOSURE_STATE).read_text(encoding="utf-8"))
        with_optimizer = (folder / OPTIMIZER_NAME).is_file()
        # As both look once they were in a file, where tuples are lists.
        mine = json.loads(json.dumps([self.identity.fixed, self.identity.length]))
        return (
            before is not None
            and [before.fixed, before.length] == mine
            and counted == {**TRAINING_STATE.stamp, "step": self.trainer.state.global_step, **exposure}
            and with_optimizer >= self.trainer.args.milestone_optimizer
        )

    def _write_folder(self, folder: Path, to_go_on: bool) -> None:
        """Write the model and the state of the last step to a folder that has its name only when it is complete.

        Args:
            folder: the place of it; what is there is replaced.
            to_go_on: whether a run is to go on from it, which takes the optimizer and the random states.
        """
        trainer, args = self.trainer, self.trainer.args
        broadcast_from_rank0(lambda: check_lock(str(args.output_dir)))
        trainer.store_flos()
        exposure = self.exposure.state()
        staging = staging_of(folder)
        staged = staging / folder.name
        # Two meetings: only when every rank's files are there may the first one hash them and rename the folder.
        with self._writing(folder) as failure:
            with failure:
                # Every rank: under ZeRO-3 this gathers the weights, which takes all of them. The first one writes.
                trainer.save_model(str(staged), _internal_call=True)
            if to_go_on:
                # On every rank: random states and loss are its own, as is its share of DeepSpeed's optimizer.
                states = whole_states(trainer, to_save=True)  # with FSDP as without it
                loss, step = save_training_state(trainer, str(staged), failure, states)
                with failure:
                    path = staged / LOSS_SINCE_LOG.format(rank=args.process_index)
                    path.write_text(json.dumps({"sum": loss, "last_logged_step": step}), encoding="utf-8")
            if args.should_save:
                self._write_state(staged)
                counted = {**TRAINING_STATE.stamp, "step": self.trainer.state.global_step, **exposure}
                write_json(staged / EXPOSURE_STATE, counted)
                if failure.message is None:  # It reads config.json, which may be cut off.
                    self._write_card(staged, folder.name, exposure)
        with self._writing(folder):
            if args.should_save:
                finalize(staged, folder)
                staging.rmdir()

    def _write_state(self, staged: Path) -> None:
        """The first rank's small files: counters and log, the place in the data, and what the run is."""
        trainer, state = self.trainer, self.trainer.state
        # As transformers' _save_checkpoint, which this takes the place of, exports them into trainer_state.json.
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                name, exported = type(callback).__name__, callback.state()
                # Several callbacks of one class share a list.
                if isinstance(several := state.stateful_callbacks.get(name), list):
                    several.append(exported)
                else:
                    state.stateful_callbacks[name] = exported
        # ResumeCallback reads it, and evaluates before the first step.
        state.stateful_callbacks["TrainerControl"]["args"]["should_evaluate"] |= self.stop_request.evaluation_due
        self._write_trainer_state(staged / TRAINER_STATE_NAME)
        data_state = self.data.state(state.global_step)
        (staged / DATA_STATE).write_text(json.dumps({**TRAINING_STATE.stamp, **data_state}), encoding="utf-8")
        self._write_identity(staged)

    def _write_identity(self, folder: Path) -> None:
        if self.identity is not None:
            write_json(folder / RUN_IDENTITY, {**TRAINING_STATE.stamp, **vars(self.identity)}, sort_keys=True)

    def _write_trainer_state(self, path: Path) -> None:
        """Write the trainer's state, in which the best checkpoint is named within the run's folder."""
        state = self.trainer.state
        best = state.best_model_checkpoint
        state.best_model_checkpoint = store_best(best, self.trainer.args.output_dir)
        try:
            state.save_to_json(str(path))
        finally:
            state.best_model_checkpoint = best

    def write_state(self) -> None:
        """Write ``trainer_state.json`` in the output folder, whole or not at all."""
        args = self.trainer.args
        with self._writing(Path(args.output_dir)):
            if args.should_save:
                with write_beside(Path(args.output_dir, TRAINER_STATE_NAME)) as beside:
                    self._write_trainer_state(beside)

    def write_model(self, folder: Path) -> None:
        """Write the model to a folder, where an older one stays whole until this one is."""
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        broadcast_from_rank0(lambda: check_lock(str(args.output_dir)))
        staged, exposure = staging_of(folder / "model"), self.exposure.state()
        with self._writing(folder):
            trainer.save_model(str(staged), _internal_call=True)
        with self._writing(folder):
            if args.should_save:
                replace_files(staged, folder)
                finished = 0 < state.max_steps <= state.global_step
                if finished and folder.samefile(args.output_dir):
                    # Behind the weights: beside a model it says that the run is finished.
                    self._write_identity(folder)
                self._write_card(folder, "", exposure)

    def write_final_card(self) -> None:
        """Write the card of the final model once more, with what an evaluation at the end has found."""
        exposure = self.exposure.state()
        if self.trainer.args.should_save:
            self._write_card(Path(self.trainer.args.output_dir), "", exposure)

    def send_model(self) -> None:
        """Send the final model to the hub, where ``--push_to_hub`` asks for it; an AgreedError where that fails."""
        if (hub := self.hub) is not None:
            folder, step = Path(self.trainer.args.output_dir), self.trainer.state.global_step
            broadcast_from_rank0(lambda: hub.send(folder, f"Step {step}"))

    def _write_card(self, folder: Path, part: str, exposure: dict[str, Any]) -> None:
        """Write the card of a model; ``part`` is the name of a checkpoint or milestone of the run."""
        output_dir, step = Path(self.trainer.args.output_dir), self.trainer.state.global_step
        name = "/".join(filter(None, (output_dir.absolute().name, part)))
        presented, settings = in_seconds(exposure["sources"]), self.card
        if self.hub is not None:
            settings = replace(settings, hub_name=self.hub.name)
        write_card(folder, describe_run(folder, name, self.identity, presented, step, settings, output_dir))

    @contextlib.contextmanager
    def _writing(self, folder: Path) -> Iterator[WriteFailure]:
        """Something that all ranks write together; they meet at its end.

        Yields:
            What keeps a failure of this rank: it must not take the rank past a meeting with the others.

        Raises:
            AgreedError: one of them could not write; what was written is removed.
        """
        failure = WriteFailure()
        with progress.doing(progress.SAVING):
            with failure:
                yield failure
            failures = gather_failures(failure.message)
        if failures:
            if self.trainer.args.should_save:
                # Half of a save would take the room that the next attempt needs.
                for left in (staging_of(folder), staging_of(folder / "model")):
                    shutil.rmtree(left, ignore_errors=True)
            raise AgreedError(self._explain(folder, failures))

    def _explain(self, folder: Path, failures: list[str]) -> str:
        """The one error that a save which failed ends the run with."""
        output_dir = Path(self.trainer.args.output_dir)
        last = next(reversed(list_checkpoints(output_dir)), None)
        if last is not None:
            needed = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        else:
            needed = self._estimate_size()
        kept = f"{last} is unharmed" if last is not None else "there is no earlier checkpoint"
        lock = output_dir / LOCK  # It goes when the run ends, and gives its block back.
        blocks = getattr(lock.stat(), "st_blocks", 0) if lock.is_file() else 0
        return explain_failures(folder, failures, needed, kept, about_to_go=blocks * 512)

    def _estimate_size(self, with_optimizer: bool = True) -> int:
        """Bytes of a checkpoint: the parameters that it holds and, with AdamW, two moments of each trained one."""
        model, optim = self.trainer.model, self.trainer.args.optim
        left_out, only_trained = kept_out_of_checkpoints(model), has_adapters(model)
        # In bytes: two moments of four each, of a parameter in fp32.
        moments = 8 if with_optimizer and str(getattr(optim, "value", "")).startswith("adamw_torch") else 0
        size = 0
        for name, p in model.named_parameters():
            if name not in left_out and (p.requires_grad or not only_trained):
                size += count_weights(p) * p.element_size()
            size += p.numel() * moments * p.requires_grad
        return size

    # Before the first step.

    def try_writing(self, num_steps: int) -> None:
        """Write once, at the start, what the end of the run writes beside the weights; and see that there is room.

        Args:
            num_steps: of the whole run.

        Raises:
            ValueError: it cannot be written, or not even one checkpoint has room on the disk.
        """
        broadcast_from_rank0(lambda: self._try_small_files())
        broadcast_from_rank0(lambda: self._check_room(num_steps))
        if self.trainer.args.should_save:  # The mark of a finished run, which this one is not yet.
            Path(self.trainer.args.output_dir, RUN_IDENTITY).unlink(missing_ok=True)

    def _try_small_files(self) -> None:
        trainer, folder = self.trainer, Path(self.trainer.args.output_dir)
        staged = staging_of(folder / "trial")
        try:
            staged.mkdir(parents=True, exist_ok=True)
            trainer.model.config.save_pretrained(staged)
            if trainer.model.can_generate():
                trainer.model.generation_config.save_pretrained(staged)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(staged)
            torch.save(trainer.args, staged / "training_args.bin")
        # save_pretrained refuses generation parameters in config.json, for one, and other settings by other errors.
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"what this run is to leave in {folder} could not be saved at its end: {said}; mend the base model's "
                "config.json, generation_config.json or tokenizer files"
            ) from error
        except (OSError, RuntimeError) as error:
            if not is_write_error(error):
                raise
            message = str(error).partition("\n")[0]
            raise ValueError(
                explain_failures(folder, [message], self._estimate_size(), "nothing was trained")
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _check_room(self, num_steps: int) -> None:
        args, folder = self.trainer.args, Path(self.trainer.args.output_dir)
        saves = args.save_strategy != "no"
        checkpoint = self._estimate_size(with_optimizer=not args.save_only_model)
        model, free = self._estimate_size(with_optimizer=False), free_bytes(folder)
        what, needed = ("a checkpoint", checkpoint) if saves else ("the model", model)
        if free < needed:
            raise ValueError(
                f"--output_dir {folder}: {free:,} bytes are free on its disk, but {what} takes about {needed:,}; make "
                "room, or give another folder"
            )
        if not saves:
            return
        # Below 1 it is a share of all steps, as transformers has it.
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * num_steps)
        planned = math.ceil(num_steps / every) if args.save_strategy == "steps" else 1
        limit = args.save_total_limit or planned
        kept = planned if planned <= limit else limit + 1  # The newest is written before the oldest goes.
        more = max(0, kept - len(list_checkpoints(folder)))
        if free < model + more * checkpoint:
            logger.warning(
                "%s: %s bytes are free on its disk, and %d more checkpoints and the model take about %s; make room, or "
                "keep fewer with --save_total_limit", folder, f"{free:,}", more, f"{model + more * checkpoint:,}"
            )  # fmt: skip
