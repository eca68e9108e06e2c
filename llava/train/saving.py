"""The trainer's side of checkpoints: nothing half-written has a name, and what stops a save is said once."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from llava.model.lora import has_adapters
from llava.model.pretrained import quiet_transformers
from llava.model.quantization import count_weights
from llava.train.checkpoint import (
    RUN_IDENTITY,
    WriteFailure,
    explain_failures,
    find_best,
    free_bytes,
    is_write_error,
    list_checkpoints,
    measure,
    publish,
    replace_files,
    rotate,
    seal,
    staging_of,
    store_best,
)
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_failures, is_first_rank
from llava.train.identity import OPTIMIZER_SETTINGS, RunIdentity, compare_runs, explain_other_run
from llava.train.parts import put_in_force
from llava.train.run_folder import LOCK

logger = logging.getLogger(__name__)

DATA_STATE = "data_state.json"
LOSS_SINCE_LOG = "loss_since_log_{rank}.json"
"""Each rank's sum of losses that no line of the log has yet, and the step of the last line."""


class CheckpointTrainer(Trainer):
    """A trainer whose checkpoints are complete, checked and enough to go on from as if nothing had happened.

    transformers writes them; here they get a folder beside, checksums and then their name.
    """

    args: Any
    identity: RunIdentity | None = None
    """What this run is, for its checkpoints; None where nobody says."""
    _changed: frozenset[str] = frozenset()  # settings that --resume_changed lets through
    _rescheduled = False  # the run that is gone on with was to have another number of steps
    _staging: Path | None = None
    _failure: WriteFailure | None = None

    def data_state(self) -> dict[str, Any] | None:
        """Where in the data the run stands, for ``data_state.json``; None if the step says it all."""
        return None

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Go on in the data from what ``data_state`` returned."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            self._check_resumed(Path(resume_from_checkpoint))
        self.try_saving()
        if self.args.should_save:
            Path(self.args.output_dir, RUN_IDENTITY).unlink(missing_ok=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumed(self, checkpoint: Path) -> None:
        """See that a checkpoint is this run's; what differs is an error, or with ``--resume_changed`` a warning."""
        wrong: list[str] = []
        allowed: list[str] = []
        args, self._changed, self._rescheduled = self.args, frozenset(), False
        if any(checkpoint.glob("global_step*")) != self.is_deepspeed_enabled:
            it = "was written with DeepSpeed" if not self.is_deepspeed_enabled else "was written without DeepSpeed"
            raise AgreedError(
                f"--resume_from_checkpoint {checkpoint} {it}, whose optimizer this run cannot read; give --deepspeed "
                "as it was then"
            )
        if self.identity is not None:
            mine = replace(self.identity, length=self.run_length())
            found = broadcast_from_rank0(lambda: compare_runs(mine, checkpoint, args.ignore_data_skip))
            wrong, self._changed, self._rescheduled = found.wrong, found.names, found.rescheduled
            allowed = found.allowed
        if wrong and args.resume_changed and is_first_rank():
            logger.warning("going on from %s as another run (--resume_changed): %s", checkpoint, "; ".join(wrong))
        wrong = [] if args.resume_changed else wrong
        try:
            if (path := checkpoint / DATA_STATE).is_file():
                self.load_data_state(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            if not wrong:
                raise
            wrong.append(str(error))
        if wrong:
            raise AgreedError(explain_other_run(checkpoint, wrong))
        if allowed and is_first_rank():
            logger.info("going on from %s with changes: %s", checkpoint, "; ".join(allowed))

    def run_length(self) -> dict[str, Any]:
        """How many steps the run has, and the flags that say so."""
        raise NotImplementedError

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As in transformers; the best checkpoint is looked for where it lies now, and steps are as flags say now."""
        quiet = contextlib.nullcontext() if resume_from_checkpoint is None else quiet_transformers()
        with quiet:  # It looks where the best one was, and warns of changes that are none of its business.
            place = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        if self.identity is not None:
            self.identity = replace(self.identity, length=self.run_length())
        if resume_from_checkpoint is None:
            return place
        # transformers goes on logging, saving and evaluating as often as the checkpoint's run did.
        self.state.compute_steps(self.args, max_steps)
        self._find_best(resume_from_checkpoint)
        if self.state.global_step >= max_steps:
            self._say_finished()
        return place

    def _say_finished(self) -> None:
        if is_first_rank():
            print(
                f"the run in {self.args.output_dir} is finished: all of its {self.state.max_steps} steps were trained "
                "before, and nothing is left to train",
                flush=True,
            )

    def take_final_model(self, folder: Path) -> None:
        """Be as after the last step of a run whose final model lies in a folder."""
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._say_finished()

    def _find_best(self, checkpoint: str) -> None:
        path = Path(checkpoint, TRAINER_STATE_NAME)
        stored = json.loads(path.read_text(encoding="utf-8")).get("best_model_checkpoint")
        self.state.best_model_checkpoint = find_best(stored, checkpoint)
        if stored is not None and self.state.best_model_checkpoint is None:
            logger.warning(
                "the best checkpoint so far, %s, is gone; the best one is looked for among those to come", stored
            )
            self.state.best_metric = self.state.best_global_step = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in transformers; where flags have changed, what they say is put in force."""
        changed = bool(self._changed) or self._rescheduled
        if checkpoint is None or not changed:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_deepspeed_enabled and self._changed:
            raise AgreedError(
                "--resume_changed cannot be had with --deepspeed, which keeps the optimizer settings of its "
                "checkpoint; start a new run from the weights: --model_name_or_path " + checkpoint
            )
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None
        assert scheduler is not None
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self._changed & OPTIMIZER_SETTINGS:
            logger.warning("the optimizer's state is not that of this optimizer any more, and begins anew")
            schedule = torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True)
            scheduler.load_state_dict(schedule)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        put_in_force(optimizer, scheduler, wanted)
        if is_first_rank():
            rates = dict.fromkeys(f"{group.get('part', '')} {group['lr']:.3g}" for group in optimizer.param_groups)
            logger.info("learning rates that the run goes on with: %s", ", ".join(rates))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A finished run that is resumed has nothing left; transformers would take one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        staging = staging_of(folder)
        staged = staging / folder.name
        with self._writing(folder):
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._finish_files(staged, folder)
        with self._writing(folder):
            if self.args.should_save:
                seal(staged)
                publish(staged, folder)
                staging.rmdir()
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, keep=[self.state.best_model_checkpoint])
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))

    def _finish_files(self, staged: Path, folder: Path) -> None:
        """Write the place in the data, and the name that the best checkpoint is about to get."""
        data_state = self.data_state()
        if self.args.should_save and data_state is not None:
            (staged / DATA_STATE).write_text(json.dumps(data_state), encoding="utf-8")
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            self._write_state(staged / TRAINER_STATE_NAME)
            if self.identity is not None:
                self.identity.write(staged)

    def _write_state(self, path: Path) -> None:
        """Write the trainer's state, in which the best checkpoint is named within the run's folder."""
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = store_best(best, self.args.output_dir)
        try:
            self.state.save_to_json(str(path))
        finally:
            self.state.best_model_checkpoint = best

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # transformers would remove the newest checkpoint beside the best one at last, and with it the end of the run.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the folder is about to be renamed."""

    def _save_rng_state(self, output_dir: str) -> None:
        with self._keeping_failure():
            super()._save_rng_state(output_dir)
            state = {"sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}
            path = Path(output_dir, LOSS_SINCE_LOG.format(rank=self.args.process_index))
            path.write_text(json.dumps(state), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, LOSS_SINCE_LOG.format(rank=self.args.process_index))
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            self._tr_loss.fill_(state["sum"])
            self._globalstep_last_logged = state["last_logged_step"]
            # The next line of the log is the mean of these and new steps; train_loss is that of new ones alone.
            others = Path(checkpoint).glob(LOSS_SINCE_LOG.format(rank="*"))
            sums = [json.loads(other.read_text(encoding="utf-8"))["sum"] for other in others]
            self._total_loss_scalar = -sum(sums) / len(sums)
        else:
            logger.warning(
                "%s has no random states of rank %d: it is from another number of ranks, or from an earlier version, "
                "and the run will not go on exactly as it would have",
                checkpoint, self.args.process_index,
            )  # fmt: skip

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._keeping_failure(), self._patient_deepspeed():
            super()._save_optimizer_and_scheduler(output_dir)

    # --- the final model ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model in a folder, where an older one stays whole until this one is."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = Path(output_dir or self.args.output_dir)
        staged = staging_of(folder / "model")
        with self._writing(folder):
            super().save_model(str(staged), _internal_call=True)
        with self._writing(folder):
            if self.args.should_save:
                replace_files(staged, folder)
                if self.identity is not None and self._is_finished(folder):
                    self.identity.write(folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` in the output folder, whole or not at all."""
        with self._writing(Path(self.args.output_dir)):
            if self.args.should_save:
                path = Path(self.args.output_dir, TRAINER_STATE_NAME)
                beside = staging_of(path)
                try:
                    self._write_state(beside)
                    beside.replace(path)
                finally:
                    beside.unlink(missing_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._keeping_failure():
            super()._save(output_dir, state_dict)

    # --- failures ---

    @contextlib.contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Something that all ranks write together; they meet at its end.

        Raises:
            AgreedError: one of them could not write; what was written is removed.
        """
        self._failure = failure = WriteFailure()
        try:
            with failure:
                yield
        finally:
            self._failure = None
        if failures := gather_failures(failure.message):
            if self.args.should_save:
                for left in (staging_of(folder), staging_of(folder / "model")):
                    shutil.rmtree(left, ignore_errors=True)
            raise AgreedError(self._explain(folder, failures))

    @contextlib.contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        """One rank's part of ``_writing``: its failure must not take the rank past a meeting with the others."""
        with self._failure or contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _patient_deepspeed(self) -> Iterator[None]:
        """The same for the files that DeepSpeed writes, between meetings of its own."""
        if not self.is_deepspeed_enabled or self._failure is None:
            yield
            return
        engine: Any = self.model_wrapped.checkpoint_engine
        save: Callable[..., Any] = engine.save
        failure = self._failure

        def save_patiently(state_dict: Any, path: str) -> None:
            with failure:
                save(state_dict, path)
                return
            Path(path).unlink(missing_ok=True)  # Room for the small files that follow.

        engine.save = save_patiently
        try:
            yield
        finally:
            del engine.save

    def _explain(self, folder: Path, failures: list[str]) -> str:
        """The one error that a save which failed ends the run with."""
        last = next(reversed(list_checkpoints(self.args.output_dir)), None)
        needed = measure(last) if last is not None else self._estimate_size()
        kept = f"{last} is unharmed" if last is not None else "there is no earlier checkpoint"
        lock = Path(self.args.output_dir, LOCK)
        blocks = getattr(lock.stat(), "st_blocks", 0) if lock.is_file() else 0
        return explain_failures(folder, failures, needed, kept, about_to_go=blocks * 512)

    def _estimate_size(self, with_optimizer: bool = True) -> int:
        """Bytes of a checkpoint: the parameters that it holds and, with AdamW, two moments of each trained one."""
        model: Any = self.model
        left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        only_trained = has_adapters(model)
        moments = 8 if with_optimizer and str(getattr(self.args.optim, "value", "")).startswith("adamw_torch") else 0
        size = 0
        for name, p in model.named_parameters():
            if name not in left_out and (p.requires_grad or not only_trained):
                size += count_weights(p) * p.element_size()
            size += p.numel() * moments * p.requires_grad
        return size

    # --- before the first step ---

    def try_saving(self) -> None:
        """Save once, at the start, what the end of the run saves beside the weights; and see that there is room.

        Raises:
            ValueError: it cannot be saved, or not even one checkpoint has room on the disk.
        """
        broadcast_from_rank0(self._save_trial)
        length = self.run_length()["steps"]
        broadcast_from_rank0(lambda: self._check_room(length))

    def _save_trial(self) -> None:
        folder = Path(self.args.output_dir)
        staged = staging_of(folder / "trial")
        model: Any = self.model
        try:
            staged.mkdir(parents=True, exist_ok=True)
            model.config.save_pretrained(staged)
            if model.can_generate():
                model.generation_config.save_pretrained(staged)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(staged)
            torch.save(self.args, staged / "training_args.bin")
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

    def _check_room(self, steps: int) -> None:
        args, folder = self.args, Path(self.args.output_dir)
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
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
        planned = math.ceil(steps / every) if args.save_strategy == "steps" else 1
        limit = args.save_total_limit or planned
        kept = planned if planned <= limit else limit + 1  # The newest is written before the oldest goes.
        more = max(0, kept - len(list_checkpoints(folder)))
        if free < model + more * checkpoint:
            logger.warning(
                "%s: %s bytes are free on its disk, and %d more checkpoints and the model take about %s; make room, or "
                "keep fewer with --save_total_limit", folder, f"{free:,}", more, f"{model + more * checkpoint:,}"
            )  # fmt: skip

    def _is_finished(self, folder: Path) -> bool:
        whole = 0 < self.state.max_steps <= self.state.global_step
        return whole and os.path.realpath(folder) == os.path.realpath(self.args.output_dir)
