"""All rows, one by one -> the three data files and the list of what was left out."""

from __future__ import annotations

import stat
import string
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from llava.data.localized_narratives.boxes import (
    GROUNDED,
    IMAGE,
    TEXT,
    BoxSettings,
    NarrativeSample,
    find_ungrounded,
    ground_utterances,
)
from llava.data.localized_narratives.preview import PreviewChoice
from llava.data.localized_narratives.rows import Finding, Narrative, RowError, parse_narrative, read_rows
from llava.io import append_json_lines, write_beside

LEFT_OUT = "left_out.jsonl"
REPEATED = "an earlier row has the same dataset, image and annotator: the id got a number"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
COCO_DIGITS = 12
_PATTERN_FIELDS = {"image_id", "dataset_id"}


@dataclass(frozen=True)
class Settings:
    """How rows become samples.

    Attributes:
        boxes: how boxes are formed.
        words_per_box: see ``group_utterances``.
        keep_without_image: whether a row whose image is missing stays, as text, in all three files.
    """

    boxes: BoxSettings = field(default_factory=BoxSettings)
    words_per_box: int = 1
    keep_without_image: bool = False

    def __post_init__(self) -> None:
        if self.words_per_box < 1:
            raise ValueError(f"--words_per_box is {self.words_per_box}; it must be at least 1")


@dataclass
class Summary:
    """What became of the rows.

    Attributes:
        rows, samples, images: how many rows were read, are in the files, and have an image there.
        utterances, boxes: of the samples with an image, or groups of them, and how many have a box.
        left_out, reduced: how many rows each reason left out, or left with less.
    """

    rows: int = 0
    samples: int = 0
    images: int = 0
    utterances: int = 0
    boxes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    reduced: Counter[str] = field(default_factory=Counter)

    def count(self, sample: NarrativeSample) -> None:
        self.samples += 1
        self.images += sample.image is not None
        self.utterances += len(sample.utterances)
        self.boxes += sum(utterance.box is not None for utterance in sample.utterances)

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows: {self.samples} samples, {self.images} with an image; "
            f"{self.boxes} boxes for {self.utterances} utterances"
        ]
        for title, reasons in (("rows left out", self.left_out), ("rows kept with less", self.reduced)):
            if reasons:
                lines.append(f"{title}:")
                lines += [f"{count:>8}  {reason}" for reason, count in _most_frequent_first(reasons)]
        return "\n".join(lines)


def _most_frequent_first(reasons: Counter[str]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def prepare(
    rows: Sequence[str], finder: ImageFinder, out: Path, name: str, settings: Settings, preview: PreviewChoice
) -> Summary:
    """Write ``NAME_t.jsonl``, ``NAME_ti.jsonl``, ``NAME_tim.jsonl`` and ``left_out.jsonl``.

    The rows are read one by one; what stays in memory are the ids of all samples and the rows of the preview. The
    data files get their names when they are complete.

    Raises:
        ValueError: no row was good, or a compressed file is broken.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary, ids = Summary(), set[str]()
    with ExitStack() as files:
        # Kept where nothing is left of the rows: the error points to it.
        left_out = files.enter_context((out / LEFT_OUT).open("wb"))
        samples: dict[str, BinaryIO] = {}
        for kind in (TEXT, IMAGE, GROUNDED):
            # Closed before it takes its name: the stack unwinds from its end. Not durable: it can be made again.
            beside = files.enter_context(write_beside(out / f"{name}_{kind}.jsonl", durable=False))
            samples[kind] = files.enter_context(beside.open("wb"))
        for row, where in read_rows(rows):
            summary.rows += 1
            findings: list[Finding] = []
            sample: NarrativeSample | None
            try:
                sample = make_sample(row, finder, settings, findings)
            except RowError as error:
                sample, findings = None, [error.finding]
            if sample is not None:
                sample = _name_apart(sample, ids, findings)
                summary.count(sample)
                for kind, built in sample.build().items():
                    append_json_lines(samples[kind], [built], durable=False)
                preview.offer(sample)
            # One list for both: what was left out, and what was kept with less.
            reasons = summary.left_out if sample is None else summary.reduced
            of_row = {key: row.get(key) if isinstance(row, dict) else None for key in ("image_id", "annotator_id")}
            for finding in findings:
                reasons[finding.reason] += 1
                told = {"kept": sample is not None, "reason": finding.reason, "details": list(finding.details)}
                append_json_lines(left_out, [{"row": where, **of_row, **told}], durable=False)
        if not summary.samples:
            reason = _most_frequent_first(summary.left_out)[0][0] if summary.left_out else "they are empty"
            raise ValueError(
                f"no sample is left of the {summary.rows} rows in {' '.join(rows)}; most often: {reason}; "
                f"{out / LEFT_OUT} lists all"
            )
    return summary


def make_sample(row: object, finder: ImageFinder, settings: Settings, findings: list[Finding]) -> NarrativeSample:
    """The sample of a row; what is wrong with it is added to the findings.

    Raises:
        RowError: it is left out.
    """
    narrative = parse_narrative(row)
    image = None
    try:
        image = finder.find(narrative)
    except RowError as error:
        if not settings.keep_without_image:
            raise
        findings.append(error.finding)
    utterances = []
    if image is not None:
        utterances = ground_utterances(narrative, settings.boxes, settings.words_per_box)
        # Without a trace no utterance has points: that is said once.
        findings += narrative.findings or find_ungrounded(utterances)
    # An id that says where a sample is from, and is the same in all three files.
    names = (narrative.dataset_id, narrative.image_id, narrative.annotator_id)
    return NarrativeSample("_".join(filter(None, names)), narrative, image, utterances)


def _name_apart(sample: NarrativeSample, ids: set[str], findings: list[Finding]) -> NarrativeSample:
    """The sample with an id that none before has: several annotators may describe one image, and one do so twice."""
    identity, number = sample.identity, 1
    while identity in ids:
        number += 1
        identity = f"{sample.identity}_{number}"
    ids.add(identity)
    if number > 1:
        findings.append(Finding(REPEATED, (identity,)))
    return replace(sample, identity=identity)


@dataclass(frozen=True)
class ImageFinder:
    """Finds the images of narratives in a folder.

    Attributes:
        folder: that of the images.
        patterns: names below the folder, such as ``train2017/{image_id:0>12}.jpg``, in the order in which they
            are looked for; without any, the image id as COCO writes it, and then as it is, with a common suffix.
    """

    folder: str
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not Path(self.folder).is_dir():
            problem = "not a folder" if Path(self.folder).exists() else "no such folder"
            raise ValueError(f"--images {self.folder}: {problem}")
        for pattern in self.patterns:
            _check_pattern(pattern)

    def find(self, narrative: Narrative) -> str:
        """The name, below the folder, of a narrative's image.

        Raises:
            RowError: there is none, it has no bytes, or its name would lead out of the folder.
        """
        image_id = narrative.image_id
        if self.patterns:
            names = [pattern.format(image_id=image_id, dataset_id=narrative.dataset_id) for pattern in self.patterns]
        else:
            # COCO: image 9 is 000000000009.jpg. Open Images and Flickr30k name images by their ids.
            stems = dict.fromkeys([image_id.zfill(COCO_DIGITS), image_id] if image_id.isdecimal() else [image_id])
            names = [stem + suffix for stem in stems for suffix in SUFFIXES]
        for name in names:
            # Ids are what somebody typed: none may name a file outside of the folder.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RowError("the name of the image leads out of --images", name)
            try:
                status = Path(self.folder, name).stat()
            except (OSError, ValueError):  # No such file, or no name that a file can have.
                continue
            if stat.S_ISREG(status.st_mode):
                if not status.st_size:
                    raise RowError("the image is an empty file", name)
                return name
        # The first name is the most likely one to have been meant.
        raise RowError("no image of that name", names[0])


def _check_pattern(pattern: str) -> None:
    expected = "write it as '{image_id:0>12}.jpg' or '{dataset_id}/{image_id}.jpg'"
    try:
        # Known fields only: "{0.__class__}" is a format too.
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        if "image_id" not in fields or not fields <= _PATTERN_FIELDS:
            raise ValueError(f"it names {', '.join(sorted(fields)) or 'no field'}")
        pattern.format(image_id="1", dataset_id="d")
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"--image_name {pattern}: {error}; {expected}") from error
