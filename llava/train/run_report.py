"""``report.html``: a run on one page, from its first step on, whatever became of it, to be opened without a network.

Everything comes from what a run leaves anyway: the log in the trainer's state, which a checkpoint holds, and the files
of words, scores and samples. So a run that was resumed shows all of its curves.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.chart import Line, Point, draw_svg
from llava.html import (
    BAD,
    GOOD,
    WARNING,
    Markup,
    code,
    details,
    figure,
    grid,
    note,
    page,
    paragraph,
    row,
    table,
    tag,
)
from llava.io import read_json_lines, write_beside
from llava.messages import explain_error
from llava.train.callbacks import FIRST_STEPS, GRAD_NORM
from llava.train.distributed import is_first_rank
from llava.train.evaluation import EXACT_MATCH, MODALITIES
from llava.train.exposure_log import EXPOSURE_FILE
from llava.train.preemption import Preempted
from llava.train.run_starts import Start, add_start, describe_start, read_starts
from llava.train.samples import SampleCallback, SampleRow, WatchedSample
from llava.train.score_table import ScoreTable
from llava.train.throughput import RATES

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments
    from llava.train.arguments import TrainingArguments as OwnArguments
    from llava.train.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

RUN_REPORT = "report.html"

_EVERY = 50
"""Lines of the log between two reports; checkpoints have one too."""
_SHARE = 0.01
"""Of the time of a run, the most that reports between checkpoints may take."""
_FAILURES = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
"""What a report may fail with, a damaged file among them: it is said, and never ends a run."""
_MOST_SAID = 6
"""Answers to a sample that are shown at once; the others are behind a click."""
_STEPS = "steps"

Entries = Sequence[Mapping[str, Any]]
"""Lines of the log, each with its step."""


@dataclass(eq=False)
class RunReport(TrainerCallback):
    """Writes the report: with checkpoints, every so many lines of the log, and at the end. The first rank has it alone.

    Attributes:
        trainer: of the run.
        start: how this process was started.
    """

    trainer: LlavaTrainer
    start: Start
    _has_begun: bool = False
    _is_theirs: bool = False
    _lines: int = 0
    _has_failed: bool = False
    _written: float = -math.inf
    _took: float = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._has_begun, self._lines = True, 0
        with self._only_said():
            self._is_theirs = True
            if not is_report_own(self._folder):
                raise ValueError(f"{self._folder / RUN_REPORT} is none of a run's, and stays as it is; move it away")
            add_start(self._folder, {**self.start, "step": state.global_step})
            self._is_theirs = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if "loss" not in (logs or {}):
            return
        self._lines += 1
        is_due = self._lines == FIRST_STEPS or self._lines % _EVERY == 0
        if is_due and time.monotonic() - self._written > self._took / _SHARE:
            self._write_running()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._write_running()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """For a program that calls ``trainer.train`` itself; ``reporting`` knows better how a run has ended."""
        if self.trainer.stop_request.agreed:
            self.write(WARNING, _stopped(state))
        else:
            self.write(GOOD, f"All {state.max_steps:,} steps are trained.")

    def _write_running(self) -> None:
        state = self.trainer.state
        with self.trainer.throughput.paused():
            self.write(WARNING, f"At step {state.global_step:,} of {state.max_steps:,}, when this page was written.")

    @property
    def _folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir))

    def write(self, kind: str, status: str) -> None:
        """Write the page, whole or not at all; where that fails, it is said once and nothing else.

        Args:
            kind: of the note with the status.
            status: how the run stands.
        """
        # It has failed before its first step, and leaves nothing behind; or there is a file of somebody's own.
        if not self._has_begun or self._is_theirs:
            return
        began = time.monotonic()
        with self._only_said():
            text = build_page(self.trainer, note(kind, status), self.start)
            with write_beside(self._folder / RUN_REPORT, durable=kind != WARNING) as beside:
                beside.write_text(text, encoding="utf-8", newline="")
        self._written = time.monotonic()
        self._took = self._written - began

    @contextmanager
    def _only_said(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            if not self._has_failed:
                logger.warning("%s could not be written, the run goes on: %s", RUN_REPORT, explain_error(error))
            self._has_failed = True


def is_report_own(folder: Path) -> bool:
    """Whether the report of a folder is a run's, or there is none: a run writes down its start before its report."""
    try:
        return not (folder / RUN_REPORT).exists() or bool(read_starts(folder))
    except ValueError:
        return False


def add_report(
    trainer: LlavaTrainer,
    argv: Sequence[str] | None,
    groups: Sequence[ModelArguments | DataArguments | OwnArguments],
) -> None:
    """Let a trainer write its report; to be called behind what adds the callbacks whose files it shows.

    Args:
        argv, groups: as for ``describe_start``.
    """
    if trainer.args.do_train and trainer.args.run_report and is_first_rank():
        trainer.add_callback(RunReport(trainer, describe_start(argv, groups)))


@contextmanager
def reporting(trainer: LlavaTrainer) -> Iterator[None]:
    """Around a whole run, its last evaluation included: at its end the report says how that came."""
    report = next((c for c in trainer.callback_handler.callbacks if isinstance(c, RunReport)), None)
    if report is None:
        yield
        return
    try:
        yield
    except Preempted:
        report.write(WARNING, _stopped(trainer.state))
        raise
    except KeyboardInterrupt:
        report.write(WARNING, f"Interrupted (control-C) behind step {trainer.state.global_step:,}. {_GO_ON}")
        raise
    except BaseException as error:
        said = explain_error(error)
        report.write(BAD, f"Ended with an error behind step {trainer.state.global_step:,}: {said}")
        raise
    report.write(GOOD, f"Finished: all {trainer.state.max_steps:,} steps are trained, and the model is saved.")


_GO_ON = "--resume_from_checkpoint auto goes on from the last checkpoint, if there is one."


def _stopped(state: TrainerState) -> str:
    return f"Stopped by a signal after step {state.global_step:,} of {state.max_steps:,}, with a checkpoint. {_GO_ON}"


# The page.


def build_page(trainer: LlavaTrainer, status: Markup, start: Start) -> str:
    """The page as it stands; nothing on it waits for another rank."""
    folder = Path(str(trainer.args.output_dir))
    entries: Entries = trainer.state.log_history
    losses = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    samples = next((c for c in trainer.callback_handler.callbacks if isinstance(c, SampleCallback)), None)
    exposure = read_json_lines(folder / EXPOSURE_FILE)
    sections: list[tuple[str, list[object]]] = [
        ("Loss", _show_loss(losses, evaluations)),
        ("Learning rates and gradients", _show_rates(trainer, losses)),
        ("Samples", [] if samples is None else _show_samples(samples)),
        ("Scores", _show_scores(folder)),
        ("Words", _show_words(exposure)),
        ("Speed", _show_speed(losses, entries)),
        ("How it was started", _show_starts(folder, start, trainer.args.world_size)),
    ]
    return page(f"Run {folder.absolute().name}", sections, [status, _show_facts(losses, evaluations, exposure)])


def _line(name: str, entries: Entries, key: str) -> Line:
    return Line(name, [Point(entry["step"], float(entry[key])) for entry in entries if entry.get(key) is not None])


def _show_facts(losses: Entries, evaluations: Entries, exposure: Entries) -> Markup:
    newest = losses[-1] if losses else {}
    facts: dict[str, object] = {"step": newest.get("step"), "epoch": newest.get("epoch"), "loss": newest.get("loss")}
    if evaluations:
        facts |= {name: evaluations[-1].get(f"eval_{name}") for name in ("loss", EXACT_MATCH)} | {
            "loss": newest.get("loss"), "evaluation": evaluations[-1]["eval_loss"],
        }  # fmt: skip
    if exposure:
        facts["words"] = exposure[-1].get("words")
    for name in ("skipped_samples", "cut_samples"):
        facts[name.replace("_", " ")] = newest.get(name)
    known = {name.replace("_", " "): value for name, value in facts.items() if value is not None}
    return table(list(known), [list(known.values())]) if known else paragraph("No loss is logged yet.")


def _show_loss(losses: Entries, evaluations: Entries) -> list[object]:
    if not losses and not evaluations:
        return []
    lines = [_line("training", losses, "loss")]
    charts = []
    if evaluations:
        lines.append(_line("evaluation", evaluations, "eval_loss"))
        kinds = [_line(kind, evaluations, f"eval_{kind}_loss") for kind in MODALITIES]
        if len(kinds := [line for line in kinds if line.points]) > 1:
            charts.append(draw_svg(kinds, "Evaluation, by what samples show", _STEPS))
        exact = _line("share of the samples", evaluations, f"eval_{EXACT_MATCH}")
        charts.append(draw_svg([exact], "Exact matches", _STEPS, y_limits=(0.0, 1.0)))
    return [grid(draw_svg(lines, "Loss", _STEPS), *charts)]


def _show_rates(trainer: LlavaTrainer, losses: Entries) -> list[object]:
    if not losses:
        return []
    logged = _line("all", losses, "learning_rate")
    shares = _share_rates(trainer)
    rates = [
        Line(name, [Point(point.x, point.y * share) for point in logged.points]) for name, share in shares.items()
    ] or [logged]
    parts = sorted({key.partition("/")[2] for entry in losses for key in entry if key.startswith(f"{GRAD_NORM}/")})
    norms = [_line("all", losses, GRAD_NORM), *(_line(part, losses, f"{GRAD_NORM}/{part}") for part in parts)]
    return [
        grid(
            draw_svg(rates, "Learning rate", _STEPS),
            draw_svg(norms, "Gradient norm, before clipping (logarithmic)", _STEPS, log_y=True),
        )
    ]


def _share_rates(trainer: LlavaTrainer) -> dict[str, float]:
    """Each part's learning rate as a share of the first group's, which is the one that is logged."""
    groups = getattr(trainer.optimizer, "param_groups", ())
    first = groups[0].get("initial_lr") if groups else None
    if not first:
        return {}
    shares: dict[str, float] = {}
    for group in groups:
        shares.setdefault(str(group.get("part", "all")), group.get("initial_lr", first) / first)
    by_share: dict[float, list[str]] = {}
    for part, share in shares.items():
        by_share.setdefault(share, []).append(part)
    return {", ".join(parts): share for share, parts in by_share.items()}


def _show_speed(losses: Entries, entries: Entries) -> list[object]:
    if not any(name in entry for entry in losses for name in RATES):
        return []
    charts = [
        draw_svg([_line("samples", losses, "samples_per_second")], "Samples a second", _STEPS),
        draw_svg(
            [_line("tokens", losses, "tokens_per_second"), _line("supervised", losses, "supervised_tokens_per_second")],
            "Tokens a second", _STEPS,
        ),
        draw_svg(
            [_line("waiting for data", losses, "data_wait"), _line("padding", losses, "padding")],
            "Shares of time and of positions", _STEPS, y_limits=(0.0, 1.0),
        ),
        draw_svg([_line("peak", losses, "peak_memory_gib")], "Memory, GiB (since the start of the process)", _STEPS),
    ]  # fmt: skip
    if any("mfu" in entry for entry in losses):
        charts.append(draw_svg([_line("MFU", losses, "mfu")], "Share of the machine's peak (MFU)", _STEPS))
    ends = [entry for entry in entries if "train_runtime" in entry]
    facts = [
        [entry["step"], entry["train_runtime"], *(entry.get(f"train_{name}") for name in RATES[:4])] for entry in ends
    ]
    head = ["up to step", "seconds", *(name.replace("_", " ") for name in RATES[:4])]
    return [grid(*charts), *([table(head, facts)] if facts else [])]


def _show_words(exposure: Entries) -> list[object]:
    if not exposure:
        return []
    newest, names = exposure[-1], ("samples", "words", "tokens", "supervised_tokens", "images", "videos", "cut_words")
    sources = newest.get("sources", {})
    rows = [[name, *(counts.get(count) for count in names)] for name, counts in sources.items()]
    if len(rows) > 1:
        rows.append(["all", *(newest.get(count) for count in names)])
    milestones = [line for line in exposure if line.get("milestones")]
    reached = [[", ".join(line["milestones"]), line["step"], line["words"]] for line in milestones]
    return [
        grid(draw_svg([_line("words", exposure, "words")], "Words trained on", _STEPS)),
        paragraph("What batches have presented up to the newest line of the log, repeats included.", faint=True),
        table(["source", *(name.replace("_", " ") for name in names)], rows),
        *([table(["milestone", "step", "words"], reached)] if reached else []),
    ]


def _show_scores(folder: Path) -> list[object]:
    scores, _, checks = ScoreTable(folder).read_all()
    if not scores:
        return []
    charts = []
    for metric in dict.fromkeys(score.metric for score in scores):
        points: dict[str, list[Point]] = {}
        for score in scores:
            if score.metric == metric and score.score is not None:
                points.setdefault(score.task, []).append(Point(score.step, score.score))
        charts.append(draw_svg([Line(task, of_task) for task, of_task in points.items()], metric, _STEPS))
    blind = {check.task: "does not look" if check.is_blind else "looks" for check in checks}
    rows = [
        [
            score.task, score.step, score.words, score.score, score.chance, score.low, score.high, score.ties,
            score.items, *([blind.get(score.task)] if blind else []),
        ]
        for score in {score.task: score for score in scores}.values()
    ]  # fmt: skip
    head = ["task", "step", "words", "score", "chance", "from", "to (95 %)", "ties", "items"]
    return [grid(*charts), table([*head, *(["at its pictures"] if blind else [])], rows)]


def _show_samples(samples: SampleCallback) -> list[object]:
    """What was said of each sample over time; those of another choice of samples come last, without their frames."""
    shown: list[object] = []
    rows = samples.log.rows
    known = {(watched.sample.id, watched.sample.source) for watched in samples.watched}
    for watched in samples.watched:
        mine = [row for row in rows if (row["id"], row["source"]) == (watched.sample.id, watched.sample.source)]
        shown += _show_sample(watched, mine)
    if others := [row for row in rows if (row["id"], row["source"]) not in known]:
        lines = [[row["step"], row["id"], row["answer"]] for row in others]
        shown.append(details("samples that were asked before", table(["step", "sample", "answer"], lines)))
    return shown


def _show_sample(watched: WatchedSample, rows: Sequence[SampleRow]) -> list[object]:
    content: list[object] = [tag("h3", watched.sample.id)]
    if watched.frames:
        frames = [figure(*shown, max_side=160) for shown in zip(watched.frames, watched.labels, strict=True)]
        content.append(row(*frames))
    told = {"question": watched.sample.expression, "reference": watched.reference}
    content.append(table(["", ""], [[name, text] for name, text in told.items() if text]))
    # The newest first: a run that goes on is looked at for what it says now.
    lines = [[line["step"], line["answer"] or "(nothing)"] for line in reversed(rows)]
    if len(lines) > _MOST_SAID + 1:
        # The first is what the model said before it was trained.
        shown, hidden = [*lines[: _MOST_SAID - 1], lines[-1]], lines[_MOST_SAID - 1 : -1]
        content += [table(["step", "answer"], shown), details("steps in between", table(["step", "answer"], hidden))]
    elif lines:
        content.append(table(["step", "answer"], lines))
    if rows and watched.frames and (rows[-1]["boxes"] or rows[-1]["spans"] or watched.places):
        picture = watched.draw(rows[-1])
        caption = f"step {rows[-1]['step']}: the answer's places in red, the reference's in green"
        content.append(details("places", figure(picture, caption, max_side=720), is_open=True))
    return content


def _show_starts(folder: Path, start: Start, num_ranks: int) -> list[object]:
    starts = read_starts(folder) or [start]
    newest = starts[-1]
    content: list[object] = []
    for number, begun in enumerate(starts, start=1):
        where = "from the first step" if begun["step"] == 0 else f"from step {begun['step']:,}"
        heading = f"{begun['time']}, {where}" if len(starts) > 1 else begun["time"]
        content += [paragraph(tag("b", heading)), code(begun["command"])]
        if begun["flags"]:
            content += [paragraph("with the flags that a program gave:", faint=True), code(begun["flags"])]
        before = starts[number - 2] if number > 1 else None
        if before is not None:
            names = ("settings", "versions", "code", "machine", "environment")
            if changed := [name for name in names if begun[name] != before[name]]:  # type: ignore[literal-required]
                content.append(paragraph(f"other than at the start before: {', '.join(changed)}", faint=True))
    machine = {**newest["machine"], "ranks": str(num_ranks)}
    if newest["code"]:
        content.append(paragraph("Code of llava: ", newest["code"]))
    content.append(grid(
        _list("Versions", newest["versions"]), _list("Machine", machine), _list("Environment", newest["environment"]),
    ))  # fmt: skip
    content.append(details("settings that are not at their defaults", _list("", newest["settings"])))
    return content


def _list(title: str, values: Mapping[str, str]) -> Markup:
    rows = table(["", ""], list(values.items())) if values else paragraph("none of those that are told", faint=True)
    return tag("div", tag("h3", title) if title else "", rows)
