"""Flags and environment variables of the LLaVA family's scripts: as flags of today, or refused with what to use.

The tables are data, and ``docs/migrating.md`` lists them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.messages import shorten

logger = logging.getLogger(__name__)

OFF = ("false", "0", "no", "none", "")
ON = ("true", "1", "yes")
ANY = ("*",)
"""Every value asks for nothing."""

RENAMED = {
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "mm_image_grid_pinpoints": "image_grid_pinpoints",
    "load_lora_path": "lora_weight_path",
}
"""Flags that have another name now; an empty value of ``MAY_BE_EMPTY`` asks for nothing."""

VERSIONS = {
    "vicuna_v1": "v1",
    "llava_llama_2": "llama_2",
    "llama_v2": "llama_2",
    "llava_llama_3": "llama_v3",
    "llama_3": "llama_v3",
    "qwen_1_5": "qwen",
    "qwen_2": "qwen",
    "gemma_instruct": "gemma",
    "v0_plain": "plain",
}
"""Values of ``--version`` that have another name now."""


@dataclass(frozen=True)
class FamilyFlag:
    """A flag that this library does not have.

    Attributes:
        neutral: values that ask for nothing, in lower case; ``ANY`` for a flag that has no effect.
        why: why there is nothing to ask for.
        instead: what to use for another value, if there is something.
    """

    neutral: tuple[str, ...]
    why: str
    instead: str = ""

    def is_neutral(self, value: str) -> bool:
        return self.neutral == ANY or value.lower() in self.neutral


_NO_SCALES = "a picture is one square, or tiles of it"
_NO_STRIDE = "all frames of a clip have the same stride"
_NO_MASKS = "masked_drop keeps a fixed share of every frame"
_TABLE_OF_PARTS = "projector and resampler begin at random"
_FRESH = "--pretrain_mm_mlp_adapter, which takes projector and resampler from a checkpoint"

UNKNOWN: dict[str, FamilyFlag] = {
    "lazy_preprocess": FamilyFlag(ANY, "samples are always read when they are needed"),
    "save_safetensors": FamilyFlag(ANY, "checkpoints are always safetensors"),
    "is_multimodal": FamilyFlag(ANY, "a sample's own media decide"),
    "delay_load": FamilyFlag(ANY, "the tower is read once, when the model is"),
    "verbose_logging": FamilyFlag(ANY, "what matters is logged"),
    "mm_use_im_patch_token": FamilyFlag(ANY, "visual tokens are always in the vocabulary"),
    "mm_use_im_start_end": FamilyFlag(OFF, "a span's first and last token take features too"),
    "lora_bias": FamilyFlag(OFF, "adapters have no biases"),
    "use_downsample_image": FamilyFlag(OFF, "images do not pass the resampler", "--mm_resample_images true"),
    "group_by_varlen": FamilyFlag(OFF, "samples come in random order", "--train_sampling_strategy group_by_length"),
    "s2": FamilyFlag(OFF, _NO_SCALES, "--image_aspect_ratio anyres"),
    "s2_scales": FamilyFlag(ANY, _NO_SCALES),
    "image_crop_resolution": FamilyFlag(OFF, _NO_SCALES, "--image_aspect_ratio anyres"),
    "image_split_resolution": FamilyFlag(OFF, _NO_SCALES, "--image_aspect_ratio anyres"),
    "add_faster_video": FamilyFlag(OFF, _NO_STRIDE, "--mm_resampler_type fast_slow_resampler"),
    "faster_token_stride": FamilyFlag(ANY, _NO_STRIDE),
    "mm_newline_position": FamilyFlag(("grid", "no_token"), "an image's rows end with a newline, a video's do not"),
    "use_pos_skipping": FamilyFlag(OFF, "positions are 0, 1, 2 ..."),
    "pos_skipping_range": FamilyFlag(ANY, "positions are 0, 1, 2 ..."),
    "rope_scaling_factor": FamilyFlag(OFF, "the model's config.json says it", "rope_scaling of its config.json"),
    "rope_scaling_type": FamilyFlag(OFF, "the model's config.json says it", "rope_scaling of its config.json"),
    "model_class_name": FamilyFlag(OFF, "the checkpoint's model_type chooses the class"),
    "cache_dir": FamilyFlag(OFF, "models are read from their folders", "HF_HOME of the environment"),
    "mpt_attn_impl": FamilyFlag(("triton", "torch"), "transformers picks the attention", "--attn_implementation"),
    "mm_vision_select_feature": FamilyFlag(("patch",), "features are those of patches"),
    "mm_perceiver_ff_mult": FamilyFlag(("4", "4.0"), "the perceiver's layers are four times as wide inside"),
    "mm_perceiver_pretrained": FamilyFlag(OFF, _TABLE_OF_PARTS, _FRESH),
    "mm_qformer_pretrained": FamilyFlag(OFF, _TABLE_OF_PARTS, _FRESH),
    "vision_tower_pretrained": FamilyFlag(OFF, "the tower comes with its weights", "--vision_tower FOLDER"),
    "mm_mask_drop_ratio_lower": FamilyFlag(OFF, _NO_MASKS, "--mm_mask_drop_ratio"),
    "mm_mask_drop_ratio_upper": FamilyFlag(OFF, _NO_MASKS, "--mm_mask_drop_ratio"),
    "mm_mask_drop_skip_percentage": FamilyFlag(("0", "0.0"), _NO_MASKS, "--mm_mask_drop_ratio"),
    "mm_spatial_pool_out_channels": FamilyFlag(ANY, "only pooling by a convolution has it, of which there is none"),
    "trainer_mode": FamilyFlag(("regular",), "gradients are those of back-propagation"),
    "zo_eps": FamilyFlag(ANY, "gradients are those of back-propagation"),
    "zo_num_directions": FamilyFlag(ANY, "gradients are those of back-propagation"),
}  # fmt: skip
"""Flags of LLaVA, LLaVA-NeXT and LLaVA-ST that are none here."""

SWITCHES = (
    "tune_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_backbone", "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler", "unfreeze_mm_vision_tower", "unfreeze_language_model",
)  # fmt: skip
"""Switches that say what trains, which ``--mm_tunable_parts`` does now."""
GROUPING = ("group_by_modality_length", "group_by_length", "group_by_modality_length_auto")
"""Switches that are values of ``--train_sampling_strategy`` now; the first that is on counts."""
UNGROUPED = "random"
FORCED_FRAMES = "force_sample"
"""Takes exactly ``--frames_upbound`` frames of each clip, where ``--video_fps`` would take so many a second."""

FAMILY_FLAGS = {*RENAMED, *UNKNOWN, *SWITCHES, *GROUPING, FORCED_FRAMES}
"""All flags that are translated, or asked whether they say anything."""

ENVIRONMENT = {
    "MM_PERCEIVER_LATENTS": "mm_perceiver_latents",
    "MM_PERCEIVER_LATENTS_FAST": "mm_perceiver_latents_fast",
    "BABYLM_WORD_LIMIT": "word_limit",
}
"""Variables of the fork's scripts, each the value of a flag that is not given."""
LATENTS = {32: 25}
"""Tokens a frame of the fork's packer that were never what they said: it took the whole root of 32, and ran 5 x 5."""

_PARTS = ("mm_mlp_adapter", "mm_vision_resampler", "mm_language_model")
"""What trained in the family unless a switch said otherwise."""


@dataclass
class _Word:
    """A flag of a command line with its values, and the words it was written with."""

    name: str
    values: list[str]
    words: list[str]

    @property
    def value(self) -> str:
        return self.values[0] if self.values else ""

    def is_on(self) -> bool:
        """What a switch says, which alone is on."""
        if not self.values or self.value.lower() in ON:
            return True
        if self.value.lower() in OFF:
            return False
        raise ValueError(f"--{self.name} is {shorten(self.value)}, expected true or false")


def translate(words: Sequence[str], empty: Sequence[str] = ()) -> list[str]:
    """A command line of the family as one of today, with a line of the log for each flag that is another now.

    Args:
        words: of the command line, or of a recipe.
        empty: flags of which an empty value says "none".

    Raises:
        ValueError: a flag asks for what there is not; says what to use.
    """
    given, notes = _choose_warmup(_split(words)), list[str]()
    front: list[str] = []  # Before all others, so that flags of today override them.
    kept: list[_Word] = []
    for word in given:
        if word.name in UNKNOWN:
            notes.append(_explain(word))
        elif word.name in RENAMED:
            new = RENAMED[word.name]
            notes.append(f"--{word.name} is now --{new}")
            kept += [_Word(new, word.values, [f"--{new}", *word.values])] if word.value or new not in empty else []
        elif word.name == "version" and word.value in VERSIONS:
            notes.append(f"--version {word.value} is now --version {VERSIONS[word.value]}")
            kept.append(_Word("version", [], ["--version", VERSIONS[word.value]]))
        elif word.name not in FAMILY_FLAGS:
            kept.append(word)
    front += _choose_parts({w.name: w.is_on() for w in given if w.name in SWITCHES}, given, notes)
    front += _choose_order({w.name: w.is_on() for w in given if w.name in GROUPING}, notes)
    if any(word.is_on() for word in given if word.name == FORCED_FRAMES):
        front += _choose_frames(given, notes)
        kept = [word for word in kept if word.name not in ("video_fps", "frames_upbound")]
    for note in dict.fromkeys(notes):
        logger.warning("%s", note)
    return [*front, *(part for word in kept for part in word.words)]


def _split(words: Sequence[str]) -> list[_Word]:
    """The flags of a command line, each with its values; what stands before the first has no name."""
    found: list[_Word] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append(_Word(name, [value] if equals else [], [word]))
        elif found:
            found[-1].values.append(word)
            found[-1].words.append(word)
        else:
            found.append(_Word("", [word], [word]))
    return found


def _explain(word: _Word) -> str:
    """Why a flag that is none here has nothing to ask for; a ValueError where it asks for something."""
    flag = UNKNOWN[word.name]
    # A switch that stands alone is on.
    value = word.value if word.values else "true"
    if not flag.is_neutral(value):
        remedy = f"use {flag.instead}" if flag.instead else "leave the flag out"
        raise ValueError(f"--{word.name} {value[:60]}: not available, {flag.why}; {remedy}")
    return f"--{word.name} is not needed any more: {flag.why}"


def _choose_parts(switches: Mapping[str, bool], given: Sequence[_Word], notes: list[str]) -> list[str]:
    """``--mm_tunable_parts`` of the switches that said so before there was this flag, as the family read them."""
    if not switches:
        return []
    names = " and ".join(f"--{name}" for name in switches)
    if any(word.name == "mm_tunable_parts" and word.value for word in given):
        notes.append(f"{names}: not looked at, --mm_tunable_parts says what trains")
        return []
    asked = {name for name, is_on in switches.items() if is_on}
    tuned = {f"tune_{part}": part for part in _PARTS[:2]}
    parts = {part for flag, part in tuned.items() if flag in asked} or set(_PARTS)
    parts -= {
        part for flag, part in (("freeze_backbone", _PARTS[2]), *((f"freeze_{p}", p) for p in _PARTS)) if flag in asked
    }
    parts |= {"mm_vision_tower"} if "unfreeze_mm_vision_tower" in asked else set()
    parts |= {"mm_language_model"} if "unfreeze_language_model" in asked else set()
    if not parts:
        raise ValueError(f"{names}: nothing would be trained; say what trains with --mm_tunable_parts")
    chosen = ",".join(part for part in ("mm_vision_tower", *_PARTS) if part in parts)
    notes.append(f"{names} is now --mm_tunable_parts {chosen}")
    return ["--mm_tunable_parts", chosen]


def _choose_order(switches: Mapping[str, bool], notes: list[str]) -> list[str]:
    """``--train_sampling_strategy`` of the switches for grouping."""
    if not switches:
        return []
    strategy = next((name for name in GROUPING if switches.get(name)), UNGROUPED).removesuffix("_auto")
    notes.append(f"{' and '.join(f'--{name}' for name in switches)} is now --train_sampling_strategy {strategy}")
    return ["--train_sampling_strategy", strategy]


def _choose_frames(given: Sequence[_Word], notes: list[str]) -> list[str]:
    """``--num_frames`` of ``--force_sample``: as many as ``--frames_upbound``, evenly, however long a clip is."""
    bound = next((word.value for word in reversed(given) if word.name == "frames_upbound"), "0")
    if not bound.isdigit() or int(bound) < 1:
        raise ValueError(
            f"--{FORCED_FRAMES} takes --frames_upbound frames of each clip, and that is {shorten(bound)}; give "
            "--num_frames N"
        )
    notes.append(f"--{FORCED_FRAMES} and --frames_upbound {bound} are now --num_frames {bound}, evenly over each clip")
    return ["--num_frames", bound, "--video_fps", "0"]


def _choose_warmup(given: list[_Word]) -> list[_Word]:
    """Of ``--warmup_ratio`` and ``--warmup_steps`` the one that counts, as older transformers had it.

    Steps count unless they are 0; flags of a command line, which come later, override those of its recipe.

    Raises:
        ValueError: the ratio is not below 1, and would be a number of steps.
    """
    found: dict[str, tuple[_Word, float]] = {}
    for word in given:
        if word.name in ("warmup_ratio", "warmup_steps"):
            number = _as_number(word.value)
            if number is None:
                return given  # which the parser explains
            if word.name == "warmup_ratio" and not 0 <= number < 1:
                raise ValueError(f"--warmup_ratio is {word.value}; it is a share of the steps, at least 0 and below 1")
            found[word.name] = (word, number)
    if len(found) < 2:
        return given
    steps_count = found["warmup_steps"][1] > 0
    if steps_count and found["warmup_ratio"][1] > 0:
        logger.warning("--warmup_steps and --warmup_ratio are both given: the steps count")
    left = found["warmup_ratio" if steps_count else "warmup_steps"][0]
    return [word for word in given if word is not left]


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def take_from_environment(group: object, environment: Mapping[str, str]) -> None:
    """Set the flags of a group of arguments that the fork's environment variables speak of, unless they are given.

    Raises:
        ValueError: a variable holds no number.
    """
    for variable, name in ENVIRONMENT.items():
        value = environment.get(variable, "").strip()
        if not value or not hasattr(group, name):
            continue
        if getattr(group, name) is not None:
            logger.warning("%s is not looked at: --%s is given", variable, name)
        elif name == "word_limit" and environment.get("BABYLM_ENABLED", "1").lower() in OFF:
            logger.warning("%s is not looked at: BABYLM_ENABLED says %s", variable, environment["BABYLM_ENABLED"])
        elif name != "word_limit" and not value.isdigit():
            raise ValueError(f"{variable} of the environment is {shorten(value)}, expected a number; or give --{name}")
        else:
            setattr(group, name, value if name == "word_limit" else int(value))
            logger.warning("%s is honoured; its name now is --%s", variable, name)


def explain_environment(environment: Mapping[str, str], trackers: str) -> None:
    """Say what becomes of variables that are no flag's value.

    Args:
        environment: the process's.
        trackers: what ``--report_to`` says.
    """
    if "BABYLM_ENABLED" in environment:
        logger.warning("BABYLM_ENABLED is not needed any more: words are always counted; --word_limit bounds them")
    if "WANDB_PROJECT" in environment:
        heard = "wandb" in trackers
        logger.warning("WANDB_PROJECT is %s", "honoured by wandb" if heard else "ignored: --report_to has no wandb")


def whole_roots(latents: int | None, flag: str) -> int | None:
    """The tokens a frame that the fork really had for a number of its recipe, with a line of the log."""
    if latents not in LATENTS:
        return latents
    logger.warning("--%s %d is taken for %d, as the fork ran it: 5 x 5", flag, latents, LATENTS[latents])
    return LATENTS[latents]
