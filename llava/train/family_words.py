"""A command line of the LLaVA family, or of transformers 4, as words of today's, with a note for each change.

The tables are in ``family_flags``. What is done with a line's words, in order: flags that go together (the parts that
train, the order of samples, frames, warm-up), then one by one. Variables of the environment become words that stand
before those of the command line, which overrule them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.messages import shorten
from llava.train.family_flags import (
    DEEPSPEED,
    ENVIRONMENT,
    FAMILY,
    GROUPING,
    LATENTS_NOTE,
    LORA_NOTE,
    OFF,
    ON,
    OTHER_DEFAULTS,
    PARTS_SWITCHES,
    RENAMED,
    TRANSFORMERS_4,
    UNGROUPED,
    VALUES,
    WITHOUT_EFFECT,
)

_PACKER = "fast_slow_resampler"
_LATENTS = ("mm_perceiver_latents", "mm_perceiver_latents_fast")
_ALL_PARTS = ("mm_vision_tower", "mm_mlp_adapter", "mm_vision_resampler", "mm_language_model")
_SMALL_TRACK = 100_000_000
"""Words of BabyLM's smaller track."""


@dataclass
class _Given:
    """One flag of a command line: its name, its values, and the words that say both."""

    name: str
    values: list[str]
    words: list[str]

    @property
    def value(self) -> str:
        """The value; a switch alone is true."""
        return self.values[0] if self.values else "true"

    @property
    def text(self) -> str:
        return " ".join(["--" + self.name, *self.values])


class Line:
    """The flags of a command line, in order, and what is noted while they change."""

    def __init__(self, words: Sequence[str]) -> None:
        self.before: list[str] = []
        """Words before the first flag."""
        self.flags: list[_Given] = []
        self.notes: list[str] = []
        self.resampler: str | None = None
        """``--mm_resampler_type``, of the line or of its recipe."""
        for word in words:
            if word.startswith("--") and len(word) > 2:
                name, equals, value = word[2:].partition("=")
                self.flags.append(_Given(name.replace("-", "_"), [value] if equals else [], [word]))
            elif self.flags:
                self.flags[-1].values.append(word)
                self.flags[-1].words.append(word)
            else:
                self.before.append(word)

    def get(self, name: str) -> str | None:
        """The value of a flag, the last where it is given several times; None where it is not."""
        return next((given.value for given in reversed(self.flags) if given.name == name), None)

    def is_on(self, name: str) -> bool:
        """Whether a switch is given, and on; a ValueError where it is neither on nor off."""
        value = self.get(name)
        if value is not None and value.lower() not in (*ON, *OFF):
            raise ValueError(f"--{name} is {shorten(value)}, expected true or false")
        return value is not None and value.lower() in ON

    def take(self, *names: str) -> list[str]:
        """Remove flags; returns what they were, as text."""
        taken = [given.text for given in self.flags if given.name in names]
        self.flags = [given for given in self.flags if given.name not in names]
        return taken

    def put(self, name: str, value: str, first: bool = False) -> None:
        """Add a flag, behind all others or before them, where one of the same name overrules it."""
        given = _Given(name, [value], [f"--{name}", value])
        self.flags.insert(0 if first else len(self.flags), given)

    @property
    def words(self) -> list[str]:
        return self.before + [word for given in self.flags for word in given.words]

    @property
    def is_of_family(self) -> bool:
        """Whether flags tell that the line was written for a trainer of the LLaVA family."""
        return any(given.name in FAMILY - TRANSFORMERS_4 for given in self.flags)


def translate(words: Sequence[str], recipe: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Words of a command line or a recipe as today's, and the notes of what has changed.

    Args:
        words: of the command line.
        recipe: words of today's that stand before them.

    Raises:
        ValueError: a flag has a value that is not available; says what to use.
    """
    line = Line(words)
    line.resampler = line.get("mm_resampler_type") or Line(recipe).get("mm_resampler_type")
    if line.is_of_family:
        _choose_frames(line)
        _choose_pooling(line)
        _choose_adapters(line)
        _name_defaults(line, {given.name for given in (*Line(recipe).flags, *line.flags)})
    _choose_parts(line)
    _choose_order(line)
    _choose_warmup(line)
    for given in list(line.flags):
        _translate_flag(line, given)
    return line.words, line.notes


def _translate_flag(line: Line, given: _Given) -> None:
    """One flag that needs no other: dropped, renamed, or its value replaced."""
    name, value = given.name, given.value
    if (gone := WITHOUT_EFFECT.get(name)) is not None:
        if gone.accepted is not None and value.lower() not in gone.accepted:
            raise ValueError(f"--{name} {value}: not available; {gone.instead}")
        line.flags.remove(given)
        line.notes.append(f"{given.text} is not needed any more: {gone.note}")
    elif name in RENAMED:
        line.notes.append(f"--{name} is now --{RENAMED[name]}" + (f": {LORA_NOTE}" if name == "load_lora_path" else ""))
        given.name, given.words = RENAMED[name], [f"--{RENAMED[name]}", *(given.values or [])]
    elif name == "deepspeed" and value.endswith(".json") and not Path(value).is_file():
        settings = DEEPSPEED.get(Path(value).stem)
        if settings is not None:
            line.notes.append(
                f"{given.text}: no such file here, so the library's own settings of --deepspeed {settings}"
            )
            given.words = ["--deepspeed", settings]
    elif value in VALUES.get(name, ()):
        if name == "mm_perceiver_latents" and line.resampler != _PACKER:
            return  # The perceiver's latents need no square.
        now = VALUES[name][value]
        line.notes.append(f"{given.text} is now {now}" + (f": {LATENTS_NOTE}" if name in _LATENTS else ""))
        given.values, given.words = [now], [f"--{name}", now]


def _choose_parts(line: Line) -> None:
    """The switches of parts as ``--mm_tunable_parts``."""
    on = {name: line.is_on(name) for name in PARTS_SWITCHES}
    taken = line.take(*PARTS_SWITCHES)
    if not taken:
        return
    if (parts_given := line.get("mm_tunable_parts")) is not None:
        line.notes.append(f"{', '.join(taken)} has no effect: --mm_tunable_parts {parts_given} says what trains")
        return
    tuned = {"mm_mlp_adapter": on["tune_mm_mlp_adapter"], "mm_vision_resampler": on["tune_mm_vision_resampler"]}
    # As there: with a part that is tuned, that part alone; else all but the tower.
    parts = dict.fromkeys(_ALL_PARTS, not any(tuned.values())) | (tuned if any(tuned.values()) else {})
    parts["mm_vision_tower"] = on["unfreeze_mm_vision_tower"]
    parts["mm_mlp_adapter"] &= not on["freeze_mm_mlp_adapter"]
    parts["mm_vision_resampler"] &= not on["freeze_mm_vision_resampler"]
    parts["mm_language_model"] = (parts["mm_language_model"] and not on["freeze_backbone"]) or on[
        "unfreeze_language_model"
    ]
    if not any(on.values()):
        line.notes.append(f"{', '.join(taken)} is not needed any more: see --mm_tunable_parts")
        return
    chosen = ",".join(part for part in _ALL_PARTS if parts[part])
    if not chosen:
        raise ValueError(f"{', '.join(taken)}: nothing would be trained; name the parts with --mm_tunable_parts")
    line.notes.append(f"{', '.join(taken)} is now --mm_tunable_parts {chosen}")
    line.put("mm_tunable_parts", chosen, first=True)


def _choose_order(line: Line) -> None:
    """The switches for grouping as ``--train_sampling_strategy``, which overrules them."""
    on = [name for name in GROUPING if line.is_on(name)]
    if taken := line.take(*GROUPING):
        strategy = GROUPING[on[0]] if on else UNGROUPED
        line.notes.append(f"{', '.join(taken)} is now --train_sampling_strategy {strategy}")
        line.put("train_sampling_strategy", strategy, first=True)


def _choose_warmup(line: Line) -> None:
    """Of ``--warmup_ratio`` and ``--warmup_steps`` the one that counts, as older transformers had it.

    Steps count unless they are 0.

    Raises:
        ValueError: the ratio is not below 1, and would be a number of steps.
    """
    given = {name: line.get(name) for name in ("warmup_ratio", "warmup_steps")}
    numbers = {name: _as_number(text) for name, text in given.items() if text is not None}
    if "warmup_ratio" not in numbers or None in numbers.values():
        return  # An unreadable number is explained by the parser.
    ratio, steps = numbers["warmup_ratio"] or 0.0, numbers.get("warmup_steps")
    if not 0 <= ratio < 1:
        raise ValueError(
            f"--warmup_ratio is {given['warmup_ratio']}; it is a share of the steps, at least 0 and below 1"
        )
    if steps is None:
        return
    if steps > 0 and ratio > 0:
        line.notes.append("--warmup_steps and --warmup_ratio are both given: the steps count")
    line.take("warmup_ratio" if steps > 0 else "warmup_steps")


def _choose_frames(line: Line) -> None:
    """How frames of a video are chosen, as LLaVA-NeXT, LLaVA-ST and their forks understand the flags."""
    is_forced = line.is_on("force_sample")
    forced = line.take("force_sample")
    bound, rate, number = (line.get(name) for name in ("frames_upbound", "video_fps", "num_frames"))
    if any(text is not None and not text.isdigit() for text in (bound, number)):
        return  # which the parser explains
    most = int(bound or 0)
    if (is_forced and most) or (number is not None and (rate is not None or 0 < most < int(number))):
        chosen = most if is_forced and most else min(int(number or 0), most or int(number or 0))
        taken = forced + line.take("frames_upbound", "video_fps", "num_frames")
        line.notes.append(f"{', '.join(taken)} is now --num_frames {chosen}: so many frames, evenly over each video")
        line.put("num_frames", str(chosen))
        line.put("video_fps", "0")
        return
    if forced:
        line.notes.append(f"{forced[-1]} is not needed any more: --num_frames and --video_fps say what is sampled")
    if most and rate is None and number is None and line.get("mm_resampler_type") != _PACKER:
        line.notes.append(f"--frames_upbound {most} goes with --video_fps 1, which was the default there")
        line.put("video_fps", "1")


def _choose_pooling(line: Line) -> None:
    """LLaVA-NeXT pools videos wherever a stride is given; here that is a resampler."""
    stride = line.get("mm_spatial_pool_stride")
    if stride is not None and line.get("mm_resampler_type") is None:
        line.notes.append(f"--mm_spatial_pool_stride {stride} goes with --mm_resampler_type spatial_pool")
        line.put("mm_resampler_type", "spatial_pool")


def _choose_adapters(line: Line) -> None:
    """With LoRA there, adapters train whatever parts are named; here they are those of ``mm_language_model``."""
    parts = line.get("mm_tunable_parts")
    if not line.is_on("lora_enable") or parts is None or "mm_language_model" in parts:
        return
    line.take("mm_tunable_parts")
    line.notes.append(
        f"--lora_enable with --mm_tunable_parts {parts}: mm_language_model is added, which is its adapters"
    )
    line.put("mm_tunable_parts", f"{parts},mm_language_model")


def _name_defaults(line: Line, told: set[str]) -> None:
    """Name the flags that were left out and have another default here."""
    if line.get("vision_tower") is None:
        return
    of_packer = ("num_frames", "mm_slow_frames")
    left_out = [
        f"--{name} ({here}; there {there})"
        for name, (here, there) in OTHER_DEFAULTS.items()
        if name not in told and (name not in of_packer or line.get("mm_resampler_type") == _PACKER)
    ]
    if left_out:
        line.notes.append(f"not given, and new models have another default than there: {', '.join(left_out)}")


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# Variables of the environment.


def read_environment(
    environ: Mapping[str, str], words: Sequence[str], recipe: Sequence[str] = ()
) -> tuple[list[str], bool, list[str]]:
    """What the family's variables ask for.

    Args:
        environ: names and values.
        words: of the command line, whose flags overrule variables.
        recipe: words of a recipe, which variables overrule.

    Returns:
        Words to stand between the recipe's and the command line's, whether ``--version`` has no effect, and notes.
    """
    line, in_recipe, found = Line(words), Line(recipe), Line(())
    given = {name: environ[name] for name in ENVIRONMENT if environ.get(name)}
    for name, flag in (("MM_PERCEIVER_LATENTS", _LATENTS[0]), ("MM_PERCEIVER_LATENTS_FAST", _LATENTS[1])):
        if name in given:
            _overrule(line, found, f"{name}={given[name]}", flag, given[name])
    _read_words(given, line, in_recipe, found)
    plain = given.get("USE_PLAIN_LM", "").lower() in ON
    if plain:
        plain = _overrule(line, found, f"USE_PLAIN_LM={given['USE_PLAIN_LM']}", "plain_lm", "true")
        if plain and (version := line.get("version")) is not None:
            found.notes.append(f"--version {version} has no effect: USE_PLAIN_LM overrules it")
    if "BABYLM_EVAL_BACKEND" in given:
        found.notes.append("BABYLM_EVAL_BACKEND has no effect: --score_tasks scores a model while it trains")
    if "WANDB_PROJECT" in given:
        told = next((one.values for one in reversed([*in_recipe.flags, *line.flags]) if one.name == "report_to"), [])
        what = "is read by wandb" if {"wandb", "all"} & set(told) else "has no effect without --report_to wandb"
        found.notes.append(f"WANDB_PROJECT={given['WANDB_PROJECT']} {what}")
    # Latents have values of another name, as on a command line.
    found.resampler = line.get("mm_resampler_type") or in_recipe.get("mm_resampler_type")
    for one in list(found.flags):
        _translate_flag(found, one)
    return found.words, plain, found.notes


def _overrule(line: Line, found: Line, variable: str, flag: str, value: str) -> bool:
    """Make a variable a flag, where the command line does not have it; whether that is so."""
    if (told := line.get(flag)) is not None:
        agrees = told == value or (told.lower() in ON and value in ON)
        found.notes.append(f"{variable} {'agrees with' if agrees else 'is overruled by'} --{flag} {told}")
        return agrees
    found.notes.append(f"{variable} is --{flag} {value}")
    found.put(flag, value)
    return True


def _read_words(given: Mapping[str, str], line: Line, recipe: Line, found: Line) -> None:
    """The fork's variables for BabyLM: a budget of words, and models on the way to it."""
    switch, limit = given.get("BABYLM_ENABLED", ""), given.get("BABYLM_WORD_LIMIT")
    if switch.lower() in OFF[:-1]:
        if limit is not None:
            found.notes.append(f"BABYLM_ENABLED={switch}: BABYLM_WORD_LIMIT has no effect")
        return
    if limit is not None:
        _overrule(line, found, f"BABYLM_WORD_LIMIT={limit}", "word_limit", limit)
    if switch.lower() not in ON:
        return
    if (told := line.get("milestones") or recipe.get("milestones")) is not None:
        found.notes.append(f"BABYLM_ENABLED={switch}: the milestones are those of --milestones {told}")
        return
    words = _as_number(line.get("word_limit") or limit or "")
    track = "strict" if words is None or words > _SMALL_TRACK else "strict_small"
    found.notes.append(f"BABYLM_ENABLED={switch} is --milestones {track}")
    found.put("milestones", track)
