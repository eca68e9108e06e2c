"""What a study's YAML file asks for: its variants and seeds as cells, each with the words of its training command."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llava.io import read_yaml
from llava.messages import shorten

KEYS = {
    "base", "output_dir", "values", "seeds", "baseline", "prepare", "model", "train", "variants", "score", "processes",
    "plugins", "slurm",
}  # fmt: skip
_PREPARE_KEYS = {"run", "makes"}
_MODEL_KEYS = {"config", "tokenizer"}
_SCORE_KEYS = {"data", "tasks", "fast", "seed", "milestones"}
OWN_FLAGS = ("output_dir", "seed", "resume_from_checkpoint", "resume_changed", "overwrite_output_dir", "plugins")
"""Flags of training that a study gives itself."""
_NAME = re.compile(r"\w[\w.+-]*")
_TAKEN = ("model", "models", "prepared")
_HOLE = re.compile(r"\{(\w+)\}")

Value = str | int | float | bool | list[str | int | float | bool]
Flags = dict[str, Value]


@dataclass(frozen=True)
class Step:
    """A command that runs once, before the first cell, and the file or folder that it makes."""

    words: tuple[str, ...]
    makes: str


@dataclass(frozen=True)
class ModelPlan:
    """A language model that gets random weights, others for each seed: its configuration and its tokenizer."""

    config: str
    tokenizer: str | None = None


@dataclass(frozen=True)
class ScorePlan:
    """What a trained model is scored on.

    Attributes:
        data: folders and archives of tasks.
        tasks: names of tasks; empty: all that are found.
        fast: whether to take the official fast sizes.
        seed: of the choice of items where ``fast``.
        milestones: whether to score the checkpoints ``chck_*`` as well.
        milestones_fast: whether to take the fast sizes for these, whatever the final model is scored on.
    """

    data: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    fast: bool = False
    seed: int = 0
    milestones: bool = False
    milestones_fast: bool = False


@dataclass(frozen=True)
class Cell:
    """One training: a variant with a seed.

    Attributes:
        number: its place among all cells of the study, from 0.
        flags: of training, as the file has them, holes such as ``{output_dir}`` included.
        model: what its weights start from; None: ``--model_name_or_path`` says it.
    """

    number: int
    variant: str
    seed: int
    flags: Flags = field(hash=False)
    model: ModelPlan | None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        path: the YAML file.
        output_dir: where everything goes.
        values: texts that ``{name}`` stands for.
        models: of each variant, what its weights start from.
        folders: of the YAML file and of those that it is laid over, in which plug-ins are looked for.
    """

    path: Path
    output_dir: Path
    values: dict[str, str]
    seeds: tuple[int, ...]
    baseline: str
    prepare: tuple[Step, ...]
    variants: dict[str, Flags]
    models: dict[str, ModelPlan | None]
    score: ScorePlan | None
    processes: int
    plugins: tuple[str, ...]
    slurm: dict[str, str]
    folders: tuple[Path, ...]

    @cached_property
    def cells(self) -> list[Cell]:
        """Every variant with the first seed, then with the second, and so on: a study that is cut short compares."""
        pairs = [(seed, variant) for seed in self.seeds for variant in self.variants]
        return [
            Cell(number, variant, seed, self.variants[variant], self.models[variant])
            for number, (seed, variant) in enumerate(pairs)
        ]

    def folder(self, cell: Cell) -> Path:
        return self.output_dir / cell.variant / f"seed-{cell.seed}"

    def run_folder(self, cell: Cell) -> Path:
        """``--output_dir`` of a cell's training."""
        return self.folder(cell) / "run"

    def model_folder(self, cell: Cell) -> Path:
        """Where the random weights of a cell are. Variants with one model start from the same ones."""
        index = list(dict.fromkeys(self.models.values())).index(cell.model)
        return self.output_dir / "models" / f"{'model' if index == 0 else cell.variant}-seed-{cell.seed}"

    def fill(self, text: str) -> str:
        """A text with its holes filled: ``{output_dir}``, ``{here}``, and those of ``values``."""
        known = {"output_dir": str(self.output_dir), "here": str(self.folders[0]), **self.values}

        def value(match: re.Match[str]) -> str:
            if match[1] not in known:
                near = difflib.get_close_matches(match[1], known, n=1)
                raise ValueError(
                    f"{self.path}: {{{match[1]}}} in {shorten(text)} is no value of this study"
                    + (f"; did you mean {{{near[0]}}}?" if near else f"; known: {', '.join(known)}")
                )
            return known[match[1]]

        return _HOLE.sub(value, text)

    def train_words(self, cell: Cell) -> list[str]:
        """The flags of a cell's training as words of a command line."""
        flags: Flags = dict(cell.flags)
        if cell.model is not None:
            flags["model_name_or_path"] = str(self.model_folder(cell))
        if self.plugins:
            flags["plugins"] = list(self.plugins)
        flags |= {
            "seed": cell.seed, "output_dir": str(self.run_folder(cell)), "resume_from_checkpoint": "auto",
        }  # fmt: skip
        words = []
        for name, value in flags.items():
            # A flag with several values takes them as words of their own.
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(self.fill(as_word(part)) for part in values)]
        return words

    def train_command(self, cell: Cell) -> list[str]:
        """The whole command of a cell's training."""
        ranks = [] if self.processes == 1 else ["llava.train.launch", "--nproc_per_node", str(self.processes), "-m"]
        return [sys.executable, "-m", *ranks, "llava.train.train", *self.train_words(cell)]


def as_word(value: object) -> str:
    """A value of YAML as a word of a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_study(path: Path, output_dir: str | None = None, changed: Sequence[str] = ()) -> Study:
    """Read a study's file.

    Args:
        path: of the YAML file.
        output_dir: takes the place of the file's.
        changed: values as ``name=text``, which take the place of those under ``values``.

    Raises:
        ValueError: the file is not there, is no YAML, or asks for what makes no sense; one line, with the key.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a study' if path.is_dir() else 'no such file'}; give a YAML file")
    content, folders = _read_with_base(path)
    for key in ("variants", "train"):
        if key not in content:
            raise ValueError(f"{path}: has no {key!r}; docs/study.md shows a whole file")
    values = {name: as_word(value) for name, value in _mapping(content.get("values"), f"{path}: values").items()}
    for word in changed:
        name, equals, value = word.partition("=")
        if not equals or name not in values:
            known = ", ".join(values) or "none"
            raise ValueError(
                f"--set {shorten(word)}: expected name=value with a name under 'values' of {path}: {known}"
            )
        values[name] = value
    variants = _read_variants(content, path)
    baseline = str(content.get("baseline", next(iter(variants))))
    if baseline not in variants:
        raise ValueError(f"{path}: baseline is {baseline!r}, which is no variant; known: {', '.join(variants)}")
    models = {name: _read_model(content.get("model"), flags.pop("model", None), f"{path}: variants: {name}")
              for name, flags in _mapping(content["variants"], f"{path}: variants").items()
              for flags in [_mapping(flags, f"{path}: variants: {name}")]}  # fmt: skip
    for name, flags in variants.items():
        if models[name] is None and "model_name_or_path" not in flags:
            raise ValueError(f"{path}: variant {name} has neither 'model' nor 'model_name_or_path' to start from")
        if models[name] is not None and "model_name_or_path" in flags:
            raise ValueError(f"{path}: variant {name} has both 'model' and 'model_name_or_path'; leave one of them out")
    processes = content.get("processes", 1)
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ValueError(f"{path}: processes is {shorten(processes)}; expected a whole number from 1")
    folder = output_dir or content.get("output_dir")
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"{path}: has no 'output_dir'; name a folder there or give --output_dir")
    study = Study(
        path=path,
        output_dir=Path(folder),
        values=values,
        seeds=_read_seeds(content.get("seeds", [0]), path),
        baseline=baseline,
        prepare=_read_prepare(content.get("prepare"), path),
        variants=variants,
        models=models,
        score=_read_score(content.get("score"), path),
        processes=processes,
        plugins=tuple(_texts(content.get("plugins", []), f"{path}: plugins")),
        slurm={name: as_word(value) for name, value in _mapping(content.get("slurm"), f"{path}: slurm").items()},
        folders=tuple(dict.fromkeys(folders)),
    )
    _check_holes(study)
    return study


# Parts of the file. Each names the key in its errors.


def _read_with_base(path: Path, begun: tuple[Path, ...] = ()) -> tuple[dict[str, object], list[Path]]:
    """A file's keys over those of the file that it names as its ``base``; mappings are joined, all else is replaced.

    Returns:
        The keys, and the folders of both files and of those below.
    """
    content = _mapping(read_yaml(path, str(path)), str(path))
    _check_keys(content, KEYS, str(path))
    base = content.pop("base", None)
    here = path.resolve().parent
    if base is None:
        return content, [here]
    there = path.parent / str(base)
    if not there.is_file() or there.resolve() in begun:
        raise ValueError(f"{path}: base is {shorten(base)}; expected another study's file, from this one's folder")
    below, folders = _read_with_base(there, (*begun, path.resolve()))
    # Its {here} is filled in now, while it is known which folder that was.
    if folders[0] != here:
        below = _replace_here(below, str(folders[0]))  # type: ignore[assignment]
    joined = {key: {**below[key], **value} for key, value in content.items()  # type: ignore[dict-item]
              if isinstance(value, dict) and isinstance(below.get(key), dict)}  # fmt: skip
    return {**below, **content, **joined}, [here, *folders]


def _replace_here(value: object, folder: str) -> object:
    """Of a file in another folder, ``{here}`` is that one."""
    if isinstance(value, dict):
        return {key: _replace_here(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [_replace_here(part, folder) for part in value]
    return value.replace("{here}", folder) if isinstance(value, str) else value


def _read_variants(content: Mapping[str, object], path: Path) -> dict[str, Flags]:
    common = _mapping(content["train"], f"{path}: train")
    variants = _mapping(content["variants"], f"{path}: variants")
    if not variants:
        raise ValueError(f"{path}: variants is empty; give at least one name")
    found: dict[str, Flags] = {}
    taken: dict[str, str] = {}
    for name, own in variants.items():
        where = f"{path}: variants: {name}"
        if not _NAME.fullmatch(name) or name.lower() in _TAKEN:
            raise ValueError(f"{where}: the name becomes a folder: letters, digits and . _ + -, not {_TAKEN}")
        # Folders of some file systems have one name in both cases.
        if (other := taken.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{where}: differs from {other!r} in case alone; give another name")
        flags = {**common, **{key: value for key, value in _mapping(own, where).items() if key != "model"}}
        found[name] = {key: _flag(value, f"{where}: {key}") for key, value in flags.items() if value is not None}
        if given := [flag for flag in OWN_FLAGS if flag in found[name]]:
            raise ValueError(f"{where}: {given[0]} is given by the study itself{_remedy(given[0])}")
    # Two names for one training: hours for a difference of 0.
    same: dict[str, str] = {}
    for name, given_flags in found.items():
        told = json.dumps([given_flags, _mapping(variants[name], name).get("model")], sort_keys=True)
        if (first := same.setdefault(told, name)) != name:
            raise ValueError(f"{path}: variants {first} and {name} are the same; a comparison needs a difference")
    return found


def _remedy(flag: str) -> str:
    return {"seed": "; list them under 'seeds'", "plugins": "; list them under 'plugins' of the file"}.get(flag, "")


def _read_seeds(value: object, path: Path) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    for seed in seeds:
        # To Python true is the number 1.
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"{path}: seeds has {shorten(seed)}; expected whole numbers from 0, such as [0, 1, 2]")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds is {shorten(value)}; expected at least one, and each once")
    return tuple(seeds)


def _read_prepare(value: object, path: Path) -> tuple[Step, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"{path}: prepare is {shorten(value)}; expected a list of steps with 'run' and 'makes'")
    steps = []
    for number, entry in enumerate(value, 1):
        where = f"{path}: prepare, step {number}"
        step = _mapping(entry, where)
        _check_keys(step, _PREPARE_KEYS, where)
        run, makes = step.get("run"), step.get("makes")
        try:
            words = shlex.split(run) if isinstance(run, str) else _texts(run, f"{where}: run")
        except ValueError as error:
            raise ValueError(f"{where}: run is {shorten(run)}: {error}") from error
        if not words or not isinstance(makes, str):
            raise ValueError(f"{where}: expected 'run', a command, and 'makes', the file or folder that it writes")
        steps.append(Step(tuple(words), makes))
    made = [step.makes for step in steps]
    if twice := [name for name in made if made.count(name) > 1]:
        raise ValueError(f"{path}: prepare: two steps make {twice[0]!r}")
    return tuple(steps)


def _read_model(common: object, own: object, where: str) -> ModelPlan | None:
    if common is None and own is None:
        return None
    given = {**_mapping(common, f"{where}: model"), **_mapping(own, f"{where}: model")}
    _check_keys(given, _MODEL_KEYS, f"{where}: model")
    config, tokenizer = given.get("config"), given.get("tokenizer")
    if not isinstance(config, str) or not isinstance(tokenizer, str | None):
        raise ValueError(f"{where}: model: expected 'config', a folder with a config.json, and a 'tokenizer' folder")
    return ModelPlan(config, tokenizer)


def _read_score(value: object, path: Path) -> ScorePlan | None:
    if value is None:
        return None
    where = f"{path}: score"
    score = _mapping(value, where)
    _check_keys(score, _SCORE_KEYS, where)
    fast, milestones = score.get("fast", False), score.get("milestones", False)
    if not isinstance(fast, bool):
        raise ValueError(f"{where}: fast is {shorten(fast)}; expected true or false")
    if milestones not in (True, False, "fast"):
        raise ValueError(f"{where}: milestones is {shorten(milestones)}; expected true, false or fast")
    seed = score.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"{where}: seed is {shorten(seed)}; expected a whole number from 0")
    data = _texts(score.get("data", []), f"{where}: data")
    tasks = _texts(score.get("tasks", []), f"{where}: tasks")
    if not data and not tasks:
        raise ValueError(f"{where}: has no 'data'; name the folders or archives of the tasks")
    return ScorePlan(
        data=tuple(data),
        tasks=tuple(tasks),
        fast=fast,
        seed=seed,
        milestones=bool(milestones),
        milestones_fast=fast or milestones == "fast",
    )


def _check_holes(study: Study) -> None:
    """An unknown name in braces is found before anything runs."""
    for cell in study.cells:
        study.train_words(cell)
        for text in (cell.model.config, cell.model.tokenizer or "") if cell.model else ():
            study.fill(text)
    for text in (*(word for step in study.prepare for word in (*step.words, step.makes)),
                 *(study.score.data if study.score else ())):  # fmt: skip
        study.fill(text)


def _mapping(value: object, where: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected names and values, found {shorten(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where}: the name {shorten(key)} is no text; put it in quotes")
    return dict(value)


def _check_keys(given: Mapping[str, object], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _texts(value: object, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) and part != "" for part in values):
        raise ValueError(f"{where} is {shorten(value)}; expected a text or a list of texts")
    return [as_word(part) for part in values]


def _flag(value: object, where: str) -> Value:
    if isinstance(value, dict):  # Settings of a plug-in, which the flag takes as JSON.
        return json.dumps(value)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) for part in values):
        raise ValueError(f"{where} is {shorten(value)}; expected a text, a number, true or false, or a list of these")
    return value  # type: ignore[return-value]
