"""A run as the trainer would build it, up to its first step: by the trainer's own functions, on the CPU.

read_arguments    train/command_line.py   the trainer's flags and recipe
check_start       train/train.py          folders
build_model       train/train.py          model, tokenizer, adapters, what learns
build_data        train/train.py          data sets, format, collator
check_and_report  train/report.py         the checks and tables that the trainer begins with
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.command import CommandLineError
from llava.data.dataset import SupervisedDataset
from llava.data.module import DataModule, RunDataset, documents_of
from llava.inspect.findings import Findings
from llava.messages import explain_error
from llava.model.loading import LoadedModel
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.command_line import build_group, parse_values
from llava.train.engines import choose_kernels
from llava.train.report import check_and_report, report_words
from llava.train.run_folder import prepare_folder
from llava.train.score_plan import plan_scores
from llava.train.train import build_data, build_model, check_start, list_sources

_OF_THE_DEVICE: dict[str, Any] = {
    "bf16": False, "fp16": False, "tf32": None, "bf16_full_eval": False, "fp16_full_eval": False, "bf16_weights": False,
    "deepspeed": None, "torch_compile": False,
}  # fmt: skip
"""Flags that ask for a device or change nothing but precision and speed, and what an inspection takes for them."""
_OF_THE_CACHE: dict[str, Any] = {
    "feature_cache": None, "feature_cache_fill": False, "feature_cache_strict": False, "feature_cache_storage": None,
}  # fmt: skip


@dataclass
class InspectedRun:
    """What the trainer would train, and what it said of it; what could not be built is None.

    Attributes:
        given: flags of the command line that an inspection takes other values for.
        report: what the trainer prints before its first step.
    """

    model_args: ModelArguments
    data_args: DataArguments
    training_args: TrainingArguments
    given: dict[str, Any]
    loaded: LoadedModel | None = None
    data: DataModule | None = None
    max_length: int = 0
    report: str = ""
    sources: dict[str, str | None] = field(default_factory=dict)

    @property
    def dataset(self) -> RunDataset | None:
        """What is trained on, or else evaluated on."""
        return None if self.data is None else self.data["train_dataset"] or self.data["eval_dataset"]

    @property
    def documents(self) -> SupervisedDataset | None:
        """Its samples as the data files have them."""
        return None if self.dataset is None else documents_of(self.dataset)


def read_arguments(words: Sequence[str], own_flags: Sequence[str]) -> InspectedRun:
    """The trainer's flags, for this machine's CPU.

    Args:
        words: of the command line, without the inspection's own.
        own_flags: those, for errors.

    Raises:
        CommandLineError: a flag, or a folder that one names, is wrong.
    """
    try:
        values = parse_values(words, also=own_flags)
        changed = {name: value for name, value in (_OF_THE_DEVICE | _OF_THE_CACHE).items() if name in values}
        if values.get("attn_implementation") == "flash_attention_2":
            changed["attn_implementation"] = None
        given = {name: values[name] for name, value in changed.items() if values[name] not in (value, None, False)}
        # Trackers are asked for by a run, and this is none: a package that is missing shows when training starts.
        values |= changed | {"use_cpu": True, "report_to": "none", "push_to_hub": False}
        run = InspectedRun(
            build_group(ModelArguments, values),
            build_group(DataArguments, values),
            build_group(TrainingArguments, values),
            given,
        )
        check_start(run.model_args, run.data_args, run.training_args)
    except ValueError as error:
        raise CommandLineError(str(error)) from error
    run.sources = list_sources(run.model_args, run.training_args)
    return run


def build_run(run: InspectedRun, findings: Findings) -> None:
    """Fill in what the trainer would build; what it would refuse, or warn of, is a finding, in its own words."""
    if run.given:
        flags = ", ".join(f"--{name} {value}" for name, value in run.given.items())
        findings.note("inspection", f"looked at on the CPU, in float32 and without {flags}")
    choose_kernels()
    said = io.StringIO()
    with hearing(findings), contextlib.redirect_stdout(said):
        try:
            _build(run)
        except (ValueError, OSError) as error:
            findings.error("refused", f"the trainer stops here: {explain_error(error)}")
    run.report = said.getvalue().rstrip()


def _build(run: InspectedRun) -> None:
    arguments = (run.model_args, run.data_args, run.training_args)
    if run.training_args.do_train and not run.training_args.overwrite_output_dir:
        # With it the folder would be cleared, which is not for an inspection to do.
        folder = Path(str(run.training_args.output_dir))
        prepare_folder(str(folder), run.training_args.resume_from_checkpoint, False, run.sources)
    run.loaded = build_model(*arguments)
    if run.training_args.wants_scores:
        plan_scores(run.training_args, run.loaded.model, run.loaded.tokenizer)
    run.data, run.max_length = build_data(run.loaded, run.data_args, run.training_args)
    check_and_report(run.loaded, run.data, run.max_length, *arguments)
    report_words(run.data["train_dataset"], run.training_args)


class _Listener(logging.Handler):
    """Takes the warnings of the library's loggers down as findings."""

    def __init__(self, findings: Findings) -> None:
        super().__init__(logging.WARNING)
        self.findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        self.findings.warn("trainer", record.getMessage())


@contextlib.contextmanager
def hearing(findings: Findings) -> Iterator[None]:
    """Within it what the library warns of becomes findings, and is not printed as it comes."""
    library, listener = logging.getLogger("llava"), _Listener(findings)
    propagates = library.propagate
    library.addHandler(listener)
    library.propagate = False
    try:
        yield
    finally:
        library.removeHandler(listener)
        library.propagate = propagates
