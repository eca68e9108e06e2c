"""The files of images, found by their ids."""

from __future__ import annotations

import json
import stat
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llava.data.localized_narratives.preview import PreviewChoice
from llava.data.localized_narratives.rows import Finding, Narrative, RowError, parse_narrative, read_rows
from llava.data.localized_narratives.samples import (
    GROUNDED,
    IMAGE,
    TEXT,
    BoxSettings,
    GroundedUtterance,
    NarrativeSample,
    find_ungrounded,
    ground_utterances,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
COCO_DIGITS = 12
_FIELDS = ("image_id", "dataset_id")


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
        names = self.names_of(narrative)
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise RowError("the name of the image leads out of --images", name)
            if (size := _find_size(Path(self.folder, name))) is not None:
                if not size:
                    raise RowError("the image is an empty file", name)
                return name
        raise RowError("no image of that name", names[0])

    def names_of(self, narrative: Narrative) -> list[str]:
        """The names that a narrative's image may have, the likeliest first."""
        image_id = narrative.image_id
        if self.patterns:
            return [pattern.format(image_id=image_id, dataset_id=narrative.dataset_id) for pattern in self.patterns]
        stems = dict.fromkeys([image_id.zfill(COCO_DIGITS), image_id] if image_id.isdecimal() else [image_id])
        return [stem + suffix for stem in stems for suffix in SUFFIXES]


def _find_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none, or the name can be none of a file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _check_pattern(pattern: str) -> None:
    expected = "write it as '{image_id:0>12}.jpg' or '{dataset_id}/{image_id}.jpg'"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        if "image_id" not in fields or not fields <= set(_FIELDS):
            raise ValueError(f"it names {', '.join(sorted(fields)) or 'no field'}")
        pattern.format(image_id="1", dataset_id="d")
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"--image_name {pattern}: {error}; {expected}") from error


# From all rows, one by one, to the three data files and the list of what was left out.

LEFT_OUT = "left_out.jsonl"
REPEATED = "an earlier row has the same dataset, image and annotator: the id got a number"


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

    def add(self, sample: NarrativeSample) -> None:
        """Count a sample."""
        self.samples += 1
        self.images += sample.image is not None
        self.utterances += len(sample.utterances)
        self.boxes += sum(utterance.box is not None for utterance in sample.utterances)

    @property
    def most_frequent(self) -> str:
        """The reason that left out most rows."""
        return _ordered(self.left_out)[0][0] if self.left_out else "they are empty"

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows: {self.samples} samples, {self.images} with an image; "
            f"{self.boxes} boxes for {self.utterances} utterances"
        ]
        for title, reasons in (("rows left out", self.left_out), ("rows kept with less", self.reduced)):
            if reasons:
                lines.append(f"{title}:")
                lines += [f"{count:>8}  {reason}" for reason, count in _ordered(reasons)]
        return "\n".join(lines)


def _ordered(reasons: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first."""
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
    with ExitStack() as files:
        left_out = files.enter_context((out / LEFT_OUT).open("w", encoding="utf-8", errors="backslashreplace"))
        samples = {
            kind: files.enter_context(_write_beside(out / f"{name}_{kind}.jsonl")) for kind in (TEXT, IMAGE, GROUNDED)
        }
        preparation = Preparation(finder, settings, left_out)
        for row, where in read_rows(rows):
            if (sample := preparation.prepare_row(row, where)) is not None:
                for kind, built in sample.build().items():
                    _write_line(samples[kind], built)
                preview.offer(sample)
        if not preparation.summary.samples:
            raise ValueError(
                f"no sample is left of the {preparation.summary.rows} rows in {' '.join(rows)}; most often: "
                f"{preparation.summary.most_frequent}; {out / LEFT_OUT} lists all"
            )
    return preparation.summary


class Preparation:
    """Makes samples of rows, and keeps account of them.

    Args:
        finder: where the images are.
        settings: how samples are made.
        left_out: where findings are written.

    Attributes:
        summary: of the rows so far.
    """

    def __init__(self, finder: ImageFinder, settings: Settings, left_out: TextIO) -> None:
        self.summary = Summary()
        self._finder = finder
        self._settings = settings
        self._left_out = left_out
        self._ids: set[str] = set()

    def prepare_row(self, row: Any, where: str) -> NarrativeSample | None:
        """The sample of a row, None for one that is left out; what is wrong with either is written down."""
        self.summary.rows += 1
        findings: list[Finding] = []
        try:
            narrative = parse_narrative(row)
            image = self._find_image(narrative, findings)
        except RowError as error:
            self._report(row, where, error.finding, kept=False)
            return None
        utterances = self._ground(narrative, findings) if image is not None else []
        sample = NarrativeSample(self._choose_id(narrative, findings), narrative, image, utterances)
        for finding in findings:
            self._report(row, where, finding, kept=True)
        self.summary.add(sample)
        return sample

    def _find_image(self, narrative: Narrative, findings: list[Finding]) -> str | None:
        try:
            return self._finder.find(narrative)
        except RowError as error:
            if not self._settings.keep_without_image:
                raise
            findings.append(error.finding)
            return None

    def _ground(self, narrative: Narrative, findings: list[Finding]) -> list[GroundedUtterance]:
        utterances = ground_utterances(narrative, self._settings.boxes, self._settings.words_per_box)
        # Without a trace no utterance has points: that is said once.
        findings += narrative.findings or find_ungrounded(utterances)
        return utterances

    def _choose_id(self, narrative: Narrative, findings: list[Finding]) -> str:
        """An id that no sample before has: several annotators may describe one image, and one may do so twice."""
        names = (narrative.dataset_id, narrative.image_id, narrative.annotator_id)
        identity = plain = "_".join(name for name in names if name)
        number = 1
        while identity in self._ids:
            number += 1
            identity = f"{plain}_{number}"
        if identity != plain:
            findings.append(Finding(REPEATED, (identity,)))
        self._ids.add(identity)
        return identity

    def _report(self, row: Any, where: str, finding: Finding, kept: bool) -> None:
        (self.summary.reduced if kept else self.summary.left_out)[finding.reason] += 1
        ids = {key: row.get(key) if isinstance(row, dict) else None for key in ("image_id", "annotator_id")}
        _write_line(
            self._left_out,
            {"row": where, **ids, "kept": kept, "reason": finding.reason, "details": list(finding.details)},
        )


@contextmanager
def _write_beside(path: Path) -> Iterator[TextIO]:
    """A file that gets its name when all of it is written, and is gone if that fails."""
    beside = path.with_name(f"{path.name}.part")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _write_line(file: TextIO, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
