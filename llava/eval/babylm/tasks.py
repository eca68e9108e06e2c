"""The tasks: how each is found among data, what of a row is scored, and by what its items are grouped.

    task              candidates                      scored           groups (UID)
    blimp             good, bad sentence              all              paradigm, one of 67
    supplement        good, bad sentence              all              file, one of 5
    ewok              Context1 with Target1, Target2  the target       domain, one of 11
    entity_tracking   prefix with each option         the option       kind and number of operations, 18
    comps             two prefixes with the property  the property     base, wugs, wugs_dist_before, _in_between
    wug_adj, wug_past two forms of a made-up word     all              one; correlated with people's choices
    winoground        two captions of a picture       all              one
    vqa               question with each answer       the answer       one
    italian           good, bad sentence              all              paradigm, one of 34; part of the library

Source: the files and the reading of the BabyLM evaluation pipeline of 2025, as SPEC and docs/babylm.md have them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llava.eval.babylm.acceptability import check_labels
from llava.eval.babylm.sources import Collection, SourceFile, choose_collection, find_collections
from llava.eval.choices import Candidate, Choice
from llava.messages import shorten
from llava.types import Media

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a task.

    Attributes:
        id: the group and the number in it ("wh_island_12"), as official files of predictions have it.
        choice: what is scored.
        uid: its group, over which scores are averaged.
        gold: the index of the right candidate.
        predictions: what official files write for each candidate.
        fields: other groups that the item is in, such as the field of linguistics, by their kind.
        ratio: the share of people who chose the first candidate; None where one candidate is right.
        acceptable: of a single sentence, whether it is; None of candidates of which one is right.
    """

    id: str
    choice: Choice
    uid: str
    gold: int
    predictions: tuple[str, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    ratio: float | None = None
    acceptable: bool | None = None


@dataclass(frozen=True)
class Row:
    """A row of a file, whose values are checked as they are taken."""

    file: SourceFile
    number: int
    values: Mapping[str, Any]
    images: Path | None = None

    @property
    def source(self) -> str:
        return f"{self.file}, line {self.number}"

    def text(self, name: str) -> str:
        """A text that is there and not empty."""
        value = self._get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.source}: {name!r} is {shorten(value)}; expected a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._get(name)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
            raise ValueError(f"{self.source}: {name!r} is {shorten(value)}; expected a list of texts")
        return value

    def number_of(self, name: str) -> float:
        value = self._get(name)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{self.source}: {name!r} is {shorten(value)}; expected a number")
        return number

    def label(self, name: str) -> str:
        """A value that names something: a text or a number."""
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value).strip() == "":
            raise ValueError(f"{self.source}: {name!r} is {shorten(value)}; expected a text or a number")
        return str(value).strip()

    def optional(self, name: str) -> str:
        """A value as text; "" where there is none."""
        value = self.values.get(name)
        return "" if value is None else str(value)

    def image(self, *names: str) -> tuple[Media, ...]:
        """The picture that ``image`` names, or that is called as one of the names, in the folder of pictures."""
        if self.images is None:
            raise ValueError(f"{self.source}: has a picture, but no folder of pictures is given; give --image_folder")
        if named := self.optional("image"):
            found = self.images / named
            if found.is_file():
                return (Media("image", str(found.resolve())),)
            raise ValueError(f"{found}: there is no such picture ({self.source})")
        for name in names:
            for suffix in IMAGE_SUFFIXES:
                if (found := self.images / f"{name}{suffix}").is_file():
                    return (Media("image", str(found.resolve())),)
        raise ValueError(
            f"{self.source}: {self.images} has no picture {' or '.join(names)} ({', '.join(IMAGE_SUFFIXES)})"
        )

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{self.source}: has no {name!r}, but {', '.join(map(repr, self.values))}")
        return self.values[name]


@dataclass(frozen=True)
class Parsed:
    """What a row says, before it has an id."""

    uid: str
    candidates: Sequence[Candidate]
    predictions: Sequence[str] = ()  # those of the candidates where this is empty
    media: tuple[Media, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    ratio: float | None = None
    acceptable: bool | None = None


def _whole(*texts: str) -> list[Candidate]:
    return [Candidate(text) for text in texts]


def _behind(prefix: str, completions: Iterable[str]) -> list[Candidate]:
    return [Candidate(prefix + completion, len(prefix)) for completion in completions]


def _parse_blimp(row: Row) -> Parsed:
    # The style of one field differs among BLiMP's own files.
    field_name = row.text("field").replace("syntax_semantics", "syntax/semantics")
    fields = {"field": field_name, "linguistics_term": row.optional("linguistics_term")}
    candidates = _whole(row.text("sentence_good"), row.text("sentence_bad"))
    return Parsed(row.text("UID"), candidates, fields={kind: name for kind, name in fields.items() if name})


def _parse_supplement(row: Row) -> Parsed:
    return Parsed(row.file.stem, _whole(row.text("sentence_good"), row.text("sentence_bad")))


def _parse_ewok(row: Row) -> Parsed:
    candidates = _behind(row.text("Context1"), [f" {row.text('Target1')}", f" {row.text('Target2')}"])
    kinds = {"context_type": "ContextType", "context_contrast": "ContextDiff", "target_contrast": "TargetDiff"}
    return Parsed(row.text("Domain"), candidates, fields={kind: row.text(name) for kind, name in kinds.items()})


def _parse_entity_tracking(row: Row) -> Parsed:
    uid = f"{row.file.stem}_{row.number_of('numops'):g}_ops"
    return Parsed(uid, _behind(row.text("input_prefix"), row.texts("options")))


_COMPS = {"comps_base": "base", "comps_wugs": "wugs", "comps_wugs_dist-before": "wugs_dist_before"}


def _parse_comps(row: Row) -> Parsed:
    phrase = row.text("property_phrase")
    prefixes = [row.text("prefix_acceptable"), row.text("prefix_unacceptable")]
    candidates = [Candidate(f"{prefix} {phrase}", len(prefix) + 1) for prefix in prefixes]
    uid = _COMPS.get(row.file.stem, "wugs_dist_in_between")
    return Parsed(uid, candidates, [candidate.text for candidate in candidates])


def _parse_wug(name: str) -> Callable[[Row], Parsed]:
    def parse(row: Row) -> Parsed:
        forms = row.text("sentences").split("\t")
        if len(forms) != 2 or not all(form.strip() for form in forms):
            raise ValueError(f"{row.source}: 'sentences' has {len(forms)} parts; expected two with a tab between")
        return Parsed(name, _whole(*forms), ratio=row.number_of("ratio"))

    return parse


def _parse_winoground(row: Row) -> Parsed:
    index, key = row.optional("image_idx"), row.optional("image_key")
    media = row.image(f"{index}_{key}", f"ex_{index}_img_{key[-1:]}")
    fields = {"type": row.optional("collapsed_tag"), "linguistic feature": row.optional("tag")}
    captions = _whole(row.text("caption_0"), row.text("caption_1"))
    return Parsed("winoground", captions, media=media, fields={kind: name for kind, name in fields.items() if name})


def _parse_vqa(row: Row) -> Parsed:
    answers = [row.text("target_ans"), *row.texts("distractors")]
    candidates = _behind(row.text("question"), [f" {answer}" for answer in answers])
    return Parsed("vqa", candidates, media=row.image(row.optional("idx_in_hf_dataset")))


@dataclass(frozen=True)
class Task:
    """How a task is found and read.

    Attributes:
        name: as ``--tasks`` has it.
        folders: how the names of its folders begin.
        columns: by which a folder of another name is known.
        parse: a row's meaning.
        official: what the official pipeline calls the task; the folder of its results.
        needs_images: whether its items have pictures.
        shipped: the file beside this one that holds it, of a task that needs no data; it is scored where it is named.
    """

    name: str
    folders: tuple[str, ...]
    columns: frozenset[str]
    parse: Callable[[Row], Parsed]
    official: str
    needs_images: bool = False
    shipped: str | None = None


def _task(
    name: str, columns: str, parse: Callable[[Row], Parsed], folders: tuple[str, ...] | None = None,
    official: str | None = None, needs_images: bool = False, shipped: str | None = None,
) -> Task:  # fmt: skip
    begins = (name,) if folders is None else folders
    return Task(name, begins, frozenset(columns.split()), parse, official or name, needs_images, shipped)


TASKS = {
    task.name: task
    for task in (
        _task("blimp", "sentence_good sentence_bad UID field", _parse_blimp),
        _task(
            "supplement", "sentence_good sentence_bad", _parse_supplement, official="blimp",
            folders=("supplement", "blimp_supplement"),
        ),
        _task("ewok", "Context1 Target1 Target2 Domain", _parse_ewok),
        _task("entity_tracking", "input_prefix options numops", _parse_entity_tracking),
        _task("comps", "prefix_acceptable prefix_unacceptable property_phrase", _parse_comps),
        _task("wug_adj", "", _parse_wug("wug_adj")),
        _task("wug_past", "", _parse_wug("wug_past")),
        _task("winoground", "caption_0 caption_1", _parse_winoground, needs_images=True),
        _task("vqa", "question target_ans distractors", _parse_vqa, needs_images=True),
        _task("italian", "", _parse_blimp, folders=(), shipped="italian_pairs.jsonl"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TaskData:
    """A task and the files that hold it.

    Attributes:
        task: how it is read.
        folder: the name of the folder that the files lie in, which official results are named by.
        files: of JSON lines.
        images: the folder of pictures.
    """

    task: Task
    folder: str
    files: tuple[SourceFile, ...]
    images: Path | None = None

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def is_fast(self) -> bool:
        """Whether these are the official fast data."""
        return self.folder.endswith("_fast")


@dataclass(frozen=True)
class FoundTasks:
    """What data hold.

    Attributes:
        tasks: in the order of ``TASKS``.
        missing: a line for each task that was asked for and is not there, with the reason.
    """

    tasks: list[TaskData]
    missing: list[str]


def find_tasks(
    data: Sequence[str], names: Sequence[str] | None = None, fast: bool = False, image_folder: str | None = None
) -> FoundTasks:
    """Look for tasks in folders, zips and files.

    Args:
        data: paths; a folder is searched through. Tasks that are part of the library need none.
        names: of tasks; None or none for all that are there.
        fast: whether the folder of the official fast data is taken where both are there.
        image_folder: where pictures lie, if not in ``images`` beside the items.

    Raises:
        ValueError: a name is not known, a path holds nothing, or a task is there twice.
    """
    if unknown := [name for name in names or () if name not in TASKS]:
        raise ValueError(f"--tasks {unknown[0]!r}: known are {', '.join(TASKS)}")
    there: dict[str, list[Collection]] = {}
    for collection in (one for path in data for one in find_collections(path)):
        if name := _recognize(collection):
            there.setdefault(name, []).append(collection)
    for task in (TASKS[name] for name in names or ()):
        if task.shipped:
            file = SourceFile(Path(__file__).with_name(task.shipped))
            there[task.name] = [Collection(task.name, (file,), None)]
    tasks, missing = [], []
    for name in names or TASKS:
        task = TASKS[name]
        if name not in there:
            if names:
                looked = f"a folder {task.folders[0]}* of {', '.join(sorted(task.columns)) or 'its files'}"
                where = f"{' '.join(data)} has no data of it" if data else "needs --data"
                missing.append(f"{name}: {where} ({looked})")
            continue
        chosen = choose_collection(there[name], name, fast)
        images = None
        if task.needs_images:
            images = Path(image_folder) if image_folder else _images_beside(chosen)
            if images is None or not images.is_dir():
                missing.append(f"{name}: its pictures are not there; give their folder with --image_folder")
                continue
        tasks.append(TaskData(task, chosen.name, chosen.files, images))
    return FoundTasks(sorted(tasks, key=lambda one: list(TASKS).index(one.name)), missing)


def _recognize(collection: Collection) -> str | None:
    """The task whose data a folder holds, by its name, else by the columns of its first row."""
    stem = collection.name.lower()
    # The longest first: blimp_supplement is no blimp.
    begins = sorted(((start, task.name) for task in TASKS.values() for start in task.folders), reverse=True)
    # A name decides before columns do: supplement has the columns of blimp.
    if named := next((name for start, name in begins if stem.startswith(start)), None):
        return named
    _, row = next(collection.files[0].read_rows())
    fitting = [task for task in TASKS.values() if task.columns and task.columns <= row.keys()]
    return max(fitting, key=lambda task: len(task.columns)).name if fitting else None


def _images_beside(collection: Collection) -> Path | None:
    return None if collection.folder is None else collection.folder / "images"


def read_items(data: TaskData, fast: bool = False, seed: int = 0) -> list[Item]:
    """The items of a task, file by file.

    Args:
        data: as it was found.
        fast: only as many of each group as the official fast data have; all where there are no more.
        seed: of their choice.

    Raises:
        ValueError: a file is empty, a line is broken, or a column is missing; names file and line.
    """
    counts: dict[str, int] = {}
    items = []
    rows = (Row(file, number, values, data.images) for file in data.files for number, values in file.read_rows())
    for row in rows:
        parsed = data.task.parse(row)
        # Numbered within the group from 0, in the order of the files: the ids of official predictions.
        number = counts[parsed.uid] = counts.get(parsed.uid, -1) + 1
        candidates = tuple(parsed.candidates)
        if len(candidates) < 2 and parsed.acceptable is None:
            raise ValueError(f"{row.source}: has {len(candidates)} candidates; expected two or more")
        predictions = tuple(parsed.predictions) or tuple(one.text[one.start :] for one in candidates)
        uid = f"{parsed.uid}_{number}"
        choice = Choice(uid, candidates, parsed.media, row.source)
        items.append(Item(uid, choice, parsed.uid, 0, predictions, parsed.fields, parsed.ratio, parsed.acceptable))
    # Official fast data are a choice already, and are taken whole.
    items = sample_groups(items, data.name, seed) if fast and not data.is_fast else items
    if not items:
        raise ValueError(f"{data.name}: the official fast data have no item of its groups {', '.join(counts)}")
    check_labels([item.acceptable for item in items], items[-1].choice.source)
    return items


def describe_repeats(name: str, items: Sequence[Item]) -> list[str]:
    """What looks wrong in items that can be scored all the same: lines for people, none where all is well."""
    first: dict[object, str] = {}
    repeated = []
    for item in items:
        key = (item.uid, item.choice.candidates, item.choice.media)
        # Repeats are kept: the official counts have them too.
        if (source := first.setdefault(key, item.choice.source)) != item.choice.source:
            repeated.append(f"{item.choice.source} (as {source})")
    equal = [one.choice.source for one in items if len(set(one.choice.candidates)) < len(one.choice.candidates)]
    lines = []
    if repeated:
        lines.append(f"{name}: {len(repeated)} rows say what an earlier one says, and count again: {repeated[0]}")
    if equal:
        lines.append(f"{name}: {len(equal)} rows have the same candidate twice, which always ties: {equal[0]}")
    return lines


@cache
def read_sizes() -> dict[str, dict[str, dict[str, int]]]:
    """How many items the official collation expects: in the full and in the fast data, of each task and group."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("sizes.json").read_text(encoding="utf-8"))
    return {kind: content[kind] for kind in ("full", "fast")}


_FAST_SIZE = 200
"""Items of a group in a fast choice of what the official fast data do not have."""


def sample_groups(items: Sequence[Item], task: str, seed: int) -> list[Item]:
    """A fast choice: of each group as many items as the official fast data have, or all of a smaller one, in order.

    Args:
        items: of the task.
        task: its name. The fast data of entity tracking have some groups alone, and so has the choice.
        seed: the same one makes the same choice.
    """
    sizes = read_sizes()["fast"].get(task, {})
    other = 0 if task == "entity_tracking" else max(sizes.values(), default=_FAST_SIZE)
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.uid, []).append(index)
    kept = {
        index
        for uid, indices in groups.items()
        # By name and not by place: a file more or less leaves the others' items as they are.
        for index in random.Random(f"{seed} {uid}").sample(indices, min(sizes.get(uid, other), len(indices)))
    }
    return [item for index, item in enumerate(items) if index in kept]
