"""The trainer's side of checkpoints: nothing half-written has a name, and what stops a save is said once."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from llava.train.agreement import AgreedError, gather_failures
from llava.train.checkpoint import (
    list_checkpoints,
    measure,
    publish,
    replace_files,
    rotate,
    seal,
    staging_of,
)

logger = logging.getLogger(__name__)

DATA_STATE = "data_state.json"
LOSS_SINCE_LOG = "loss_since_log_{rank}.json"
"""Each rank's sum of losses that no line of the log has yet, and the step of the last line."""


class WriteFailure(contextlib.AbstractContextManager):
    """Keeps the first error of writing, instead of letting it out: the other ranks wait at the next meeting.

    Attributes:
        message: of the error, None while there was none.
    """

    def __init__(self) -> None:
        self.message: str | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_write_error(error):
            return False
        self.message = self.message or str(error).partition("\n")[0]
        return True


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written: each library that writes a checkpoint says it in its own way."""
    if isinstance(error, OSError | SafetensorError):
        return True
    text = str(error)
    if isinstance(error, RuntimeError):  # torch.save
        return "PytorchStreamWriter" in text or "inline_container" in text or "iostream error" in text
    return type(error) is Exception and "(os error" in text  # tokenizers


class CheckpointTrainer(Trainer):
    """A trainer whose checkpoints are complete, checked and enough to go on from as if nothing had happened.

    transformers writes them; here they get a folder beside, checksums and then their name.
    """

    args: Any
    _staging: Path | None = None
    _failure: WriteFailure | None = None

    def data_state(self) -> dict[str, Any] | None:
        """Where in the data the run stands, for ``data_state.json``; None if the step says it all."""
        return None

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Go on in the data from what ``data_state`` returned."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint and (path := Path(str(resume_from_checkpoint), DATA_STATE)).is_file():
            self.load_data_state(json.loads(path.read_text(encoding="utf-8")))
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

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
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` in the output folder, whole or not at all."""
        with self._writing(Path(self.args.output_dir)):
            if self.args.should_save:
                path = Path(self.args.output_dir, TRAINER_STATE_NAME)
                beside = staging_of(path)
                try:
                    self.state.save_to_json(str(beside))
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
        existing = next(path for path in [folder, *folder.parents] if path.is_dir())
        free = shutil.disk_usage(existing).free
        kept = f"{last} is unharmed" if last is not None else "there is no earlier checkpoint"
        return (
            f"{folder} could not be written: {'; '.join(failures)}. About {needed:,} bytes are needed, {free:,} are "
            f"free on that disk (a quota may allow less); {kept}. Make room, or save less with --save_total_limit, and "
            "go on with --resume_from_checkpoint auto"
        )

    def _estimate_size(self) -> int:
        """Bytes of a checkpoint: every parameter, and two moments of each trained one."""
        model: Any = self.model
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
        return sum(size * (3 if trained else 1) for size, trained in sizes)
