"""Every flag of training, in three groups, with its help as the docstring under it; some lie in ``progress_arguments``.

A flag without a docstring takes type, default and help from the settings it becomes: ``kept(VisionConfig.num_frames)``
is the flag of that field. ``llava.train.command_line`` reads them all from this source, for ``--help``; the comments
between them are its headings. Programs that build the groups themselves, without a command line, get the same cache
folder, job and checks from the environment.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import transformers

from llava.command import read_json_object
from llava.config import GROUNDING_MODES, LAPE, NO_GROUNDING, GroundingConfig, VisionConfig
from llava.data.chunking import NONE, TEXT_CHUNKING
from llava.data.formats import CHAT, FORMATS, PLAIN_LM
from llava.data.media_files import MediaLimits
from llava.data.samplers import RANDOM, STRATEGIES
from llava.io import user_folder
from llava.model.lora import LoraSettings, check_peft
from llava.model.quantization import Quantization
from llava.train.engines import check_machine, check_optimization
from llava.train.milestones import parse_milestones, parse_words
from llava.train.progress_arguments import ProgressArguments
from llava.train.speed_arguments import SpeedArguments, StagingArguments
from llava.train.transformers_flags import check_flags, check_spelling
from llava.types import ERROR, ON_BAD_SAMPLE

T = TypeVar("T")

CONTENT, COORDINATES, INSTRUCTIONS = "1", "2", "3"
PARTS = ("mm_vision_tower", "mm_mlp_adapter", "mm_vision_resampler", "mm_language_model")
"""Names of a model's parts, as ``--mm_tunable_parts`` spells them."""
COORDINATES_PART = "mm_coordinates"
"""The tables of coordinates, which train from stage 2 on."""
DEFAULT_PARTS = "mm_mlp_adapter,mm_vision_resampler,mm_language_model"
CHOICES: dict[str, Sequence[str]] = {
    "stage": (CONTENT, COORDINATES, INSTRUCTIONS),
    "grounding": GROUNDING_MODES,
    "text_chunking": TEXT_CHUNKING,
    "check_data": ("files", "decode", "none"),
    "on_bad_sample": ON_BAD_SAMPLE,
    "train_sampling_strategy": STRATEGIES,
    "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
}
"""Flags that take one of a few words."""
_LEAST = {
    "num_frames": 1, "video_fps": 0, "frames_upbound": 0, "model_max_length": 1, "seed": 0, "data_seed": 0, "lora_r": 1,
    "mm_projector_width": 1,
}  # fmt: skip
"""The least that a number may be."""
_COUNTED = {"true": "all", "1": "all", "yes": "all", "false": "no", "0": "no", "none": "no"}


def kept(default: T) -> T | None:
    """None, for a flag that keeps the checkpoint's setting unless it is given; ``default`` is that of a new model."""
    return None


@dataclass
class ModelArguments:
    """Which model, which vision modules, what is trained."""

    # --- model ---
    model_name_or_path: str
    """Folder or hub name of a plain language model or of a multimodal checkpoint."""
    plugins: list[str] | None = None
    """Python modules to import first, which register parts of your own (docs/extending.md)."""

    # --- vision ---
    vision_tower: str | None = None
    """Folder or hub name of the vision model. Without it a plain language model trains on text alone."""
    save_vision_tower: bool = False
    """Store the frozen tower's weights in checkpoints too, not only its source and hash."""
    mm_vision_select_layer: int | None = kept(VisionConfig.vision_select_layer)
    mm_projector_type: str | None = kept(VisionConfig.projector_type)
    mm_projector_width: int | None = kept(VisionConfig.projector_width)
    mm_projector_args: str | None = None
    """Settings of a plug-in projector, as a JSON object such as '{"depth": 3}' (docs/extending.md)."""
    mm_resampler_type: str | None = kept(VisionConfig.resampler_type)
    mm_resampler_args: str | None = None
    """Settings of a plug-in resampler, as a JSON object such as '{"stride": 3}' (docs/extending.md)."""
    mm_perceiver_latents: int | None = kept(VisionConfig.perceiver_latents)
    mm_perceiver_latents_fast: int | None = kept(VisionConfig.perceiver_latents_fast)
    mm_perceiver_depth: int | None = kept(VisionConfig.perceiver_depth)
    mm_qformer_latents: int | None = kept(VisionConfig.qformer_latents)
    mm_qformer_depth: int | None = kept(VisionConfig.qformer_depth)
    mm_spatial_pool_stride: int | None = kept(VisionConfig.spatial_pool_stride)
    mm_spatial_pool_mode: str | None = kept(VisionConfig.spatial_pool_mode)
    mm_mask_drop_mode: str = "fixed"
    """fixed: masked_drop keeps the same number of patches of every frame. There is no other."""
    mm_mask_drop_ratio: float | None = kept(VisionConfig.mask_drop_ratio)
    mm_resampler_width: int | None = kept(VisionConfig.resampler_width)
    mm_resampler_heads: int | None = kept(VisionConfig.resampler_heads)
    mm_resample_images: bool | None = kept(VisionConfig.resample_images)
    mm_patch_merge_type: str | None = kept(VisionConfig.patch_merge_type)
    mm_slow_frames: int | None = kept(VisionConfig.slow_frames)

    # --- coordinates ---
    stage: str = CONTENT
    """1: content, images and videos without coordinates (default). 2: coordinates, whose tables join the model.
    3: instructions, from a checkpoint of stage 2. Each trains --mm_tunable_parts, 2 and 3 the tables as well."""
    grounding: str | None = None
    """What coordinates are to the model: lape, placeholder, none. lape (default from stage 2 on): tables that text and
    pictures share. placeholder: words that say nothing of where, an ablation. none: an error in the data (default in
    stage 1)."""
    num_temporal_tokens: int | None = kept(GroundingConfig.num_temporal)
    num_spatial_tokens: int | None = kept(GroundingConfig.num_spatial)
    freeze_coordinates: bool = False
    """Keep the tables of coordinates as they are (stages 2 and 3)."""

    # --- parts that train ---
    mm_tunable_parts: str = DEFAULT_PARTS
    """Comma-separated parts to train, of mm_vision_tower, mm_mlp_adapter, mm_vision_resampler, mm_language_model. The
    language model includes its embeddings and head; with --lora_enable it is adapters instead."""
    freeze_embeddings: bool = False
    """Keep token embeddings and head as they are while the rest of the language model trains."""
    pretrain_mm_mlp_adapter: str | None = None
    """Checkpoint folder or file (.safetensors, .bin) to take projector and resampler weights from."""

    def __post_init__(self) -> None:
        if self.mm_mask_drop_mode != "fixed":
            raise ValueError(
                f"--mm_mask_drop_mode is {self.mm_mask_drop_mode!r}, but only fixed exists: the text is written "
                "before a frame is masked, so the number of patches cannot vary"
            )
        _check_values(self)
        if self.stage == CONTENT and self.grounding not in (None, NO_GROUNDING):
            raise ValueError(f"--grounding {self.grounding} needs --stage 2: stage 1 trains content alone")
        if self.stage != CONTENT and self.grounding == NO_GROUNDING:
            raise ValueError(f"--stage {self.stage} trains coordinates, but --grounding is none; take --stage 1")
        self.vision_settings()  # Reads JSON, and says where it is none.
        parts = [part.strip() for part in self.mm_tunable_parts.split(",") if part.strip()]
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"--mm_tunable_parts names {', '.join(unknown)}; known: {', '.join(PARTS)}")
        if not parts:
            raise ValueError(f"--mm_tunable_parts is empty, nothing would be trained; known: {', '.join(PARTS)}")
        # From stage 2 on the tables of coordinates learn too.
        learns_coordinates = self.stage != CONTENT and not self.freeze_coordinates
        self.tunable_parts = [*parts, *([COORDINATES_PART] if learns_coordinates else [])]

    def vision_settings(self) -> dict[str, Any]:
        """The flags that are fields of ``VisionConfig``; None where a flag was not given."""
        settings = _settings_of(self, "mm_")
        for name in ("projector_args", "resampler_args"):
            if settings[name] is not None:
                settings[name] = read_json_object(settings[name], f"--mm_{name}")
        return settings

    def choose_grounding(self, trained: str | None) -> str | None:
        """What ``load_model`` makes of coordinates.

        Args:
            trained: what they are to the checkpoint; None for one without them.

        Raises:
            ValueError: the stage does not fit the checkpoint.
        """
        if self.stage == CONTENT and trained is not None:
            raise ValueError(
                f"the checkpoint has coordinates ({trained}), and --stage 1 trains content alone; take --stage 2 or 3"
            )
        if self.stage == INSTRUCTIONS and trained is None:
            raise ValueError("--stage 3 starts from a checkpoint of stage 2, and this one has no coordinates")
        return self.grounding or (LAPE if self.stage != CONTENT and trained is None else None)


@dataclass
class DataArguments(StagingArguments):
    """Which data, and how media and text are read."""

    # --- data ---
    data_path: list[str]
    """Data to train on: files (.json, .jsonl, .parquet, .arrow; .txt, .train and .txt.gz with a text a line), folders,
    patterns such as 'part{1,2}.json' or '*.train', YAML mixtures, hub:OWNER/NAME; several are joined."""
    text_column: str | None = None
    """The column, or key, that holds the text of samples without turns, such as text."""
    eval_data_path: list[str] | None = None
    """Data to evaluate on, in the same forms; see --eval_strategy."""
    data_cache_dir: str | None = None
    """Folder of the indexes that data files are read into once (default: ~/.cache/llava-babylm)."""
    allow_duplicate_ids: bool = False
    """Let several samples of one data file have the same id."""
    ignore_keys: list[str] | None = None
    """Keys of samples that hold no image and no video, whatever they look like: nothing is said of them."""

    # --- images and videos ---
    image_folder: str | None = None
    """What relative image paths start from (default: the data file's folder); "" takes all paths as they are, relative
    ones from the current folder."""
    video_folder: str | None = None
    """What relative video paths start from (default: the data file's folder); "" as for images."""
    allow_outside_paths: bool = False
    """Let paths in data files lead out of --image_folder and --video_folder (or, without these, out of the data file's
    folder), be it by .., as absolute paths or through links."""
    check_data: str = "files"
    """What is done with media before training: files (default) looks whether they are there, decode decodes all of
    them (as python -m llava.data.check), none does nothing."""
    image_aspect_ratio: str | None = kept(VisionConfig.image_aspect_ratio)
    image_grid_pinpoints: str | None = kept(VisionConfig.image_grid_pinpoints)
    num_frames: int | None = kept(VisionConfig.num_frames)
    video_fps: float | None = kept(VisionConfig.video_fps)
    frames_upbound: int | None = kept(VisionConfig.frames_upbound)
    add_time_instruction: bool | None = kept(VisionConfig.add_time_instruction)
    max_image_pixels: int = MediaLimits.max_image_pixels
    max_image_bytes: int = MediaLimits.max_image_bytes
    max_video_pixels: int = MediaLimits.max_video_pixels
    max_video_frames: int = MediaLimits.max_video_frames

    # --- text ---
    plain_lm: bool | None = None
    """Plain language modelling: all turns joined, all text learned (default without --version)."""
    version: str | None = None
    """Format of conversations, of which only the assistant's turns are learned: chat, gemma, llama_2, llama_v3, mpt,
    plain, plain_lm, qwen, v1. chat (default with --plain_lm false) is the tokenizer's own chat template, which
    Qwen3, Phi, Gemma and SmolLM3 bring."""
    text_chunking: str = NONE
    """What becomes of text: none (default) cuts off what is longer than --model_max_length, document trains on all of
    it in several samples, concatenate fills every sample with the texts of a file one after the other, each with its
    end of text (both need --plain_lm; samples with media stay as they are)."""
    early_mix_text: bool = False
    """Do not keep text-only samples apart when grouping by modality."""

    # --- bad samples ---
    on_bad_sample: str = ERROR
    """error (default): a sample that cannot be used stops the run; skip: it is left out and written to
    bad_samples.jsonl in --output_dir."""
    max_bad_share: float = 0.05
    """With --on_bad_sample skip: stop when more than this share of the samples is bad."""
    decode_timeout: float = 60.0
    """Seconds that decoding one video may take before its sample is bad; 0: as long as it likes."""

    def __post_init__(self) -> None:
        caches = os.environ.get("XDG_CACHE_HOME") or user_folder(".cache")
        self.data_cache_dir = self.data_cache_dir or os.path.join(caches, "llava-babylm")
        if self.plain_lm and self.version not in (None, PLAIN_LM):
            raise ValueError(
                f"--version {self.version} asks for a chat format, but --plain_lm is true; leave one of them out, or "
                "give --plain_lm false where a recipe says true"
            )
        if self.plain_lm is None:
            self.plain_lm = self.version in (None, PLAIN_LM)
        # The preprocessing format that the two ask for.
        self.format_name = PLAIN_LM if self.plain_lm else self.version or CHAT
        FORMATS.get(self.format_name)
        _check_values(self)
        self.check_feature_cache()
        self.media_limits = MediaLimits(**{limit.name: getattr(self, limit.name) for limit in fields(MediaLimits)})
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share is {self.max_bad_share}; it is a share, from 0 to 1")
        if not 0 <= self.decode_timeout < math.inf:
            raise ValueError(f"--decode_timeout is {self.decode_timeout}; it is a number of seconds, or 0 for no limit")

    def vision_settings(self) -> dict[str, Any]:
        """The flags that are fields of ``VisionConfig``; None where a flag was not given."""
        return _settings_of(self)


@dataclass
class TrainingArguments(SpeedArguments, ProgressArguments, transformers.TrainingArguments):
    """transformers' arguments, of which ``transformers_flags`` says what each does here, and this library's own."""

    # --- model ---
    attn_implementation: str | None = None
    """sdpa, eager or flash_attention_2 (default: what transformers picks)."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture of experts' load balancing loss (default: the checkpoint's); 0 leaves it out."""

    # --- text ---
    model_max_length: int | None = None
    """Most tokens of a sample, visual ones included (default, and at most: the model's context)."""

    # --- parts that train ---
    mm_projector_lr: float | None = None
    """Learning rate of the projector (default: --learning_rate)."""
    mm_vision_resampler_lr: float | None = None
    """Learning rate of the resampler (default: --learning_rate)."""
    mm_vision_tower_lr: float | None = None
    """Learning rate of the vision tower, if trained (default: --learning_rate)."""
    mm_coordinates_lr: float | None = None
    """Learning rate of the tables of coordinates (default: --learning_rate)."""

    # --- LoRA ---
    lora_enable: bool = False
    """Train LoRA adapters on the linear layers of the language model instead of the language model: its own weights,
    embeddings and head are frozen. Projector and resampler train as --mm_tunable_parts says."""
    lora_r: int | None = kept(LoraSettings.r)
    lora_alpha: int | None = kept(LoraSettings.alpha)
    lora_dropout: float | None = kept(LoraSettings.dropout)
    lora_weight_path: str | None = None
    """Checkpoint with adapters to train on, with --model_name_or_path as their base model."""
    bits: int = 16
    """8 or 4 holds the linear layers of the language model in so many bits, which needs --lora_enable; 16 (default)
    leaves all weights as they come."""
    quant_type: str = Quantization.quant_type
    double_quant: bool = Quantization.double_quant

    # --- steps and order ---
    train_sampling_strategy: str = RANDOM
    """Order of the samples: random, sequential, group_by_length, group_by_modality_length. Those that group put
    samples of similar length into a step, the largest batch first; by modality, text-only samples apart from the
    others."""
    do_train: bool = True
    """Train; false evaluates the model as it is, with --do_eval (default true)."""
    stop_on_bad_numbers: bool = True
    """Stop where a loss or the gradient is NaN or infinite, before the weights are, and leave the batch in
    OUTPUT_DIR/bad_step-N with the command that replays it (default true)."""

    num_train_epochs: float | None = None  # type: ignore[assignment]
    """Passes over the data (default: 3, or as many as --word_limit takes)."""

    # --- words ---
    word_limit: str | None = None
    """End the run, finished, with the step that brings the words it has trained on to this number: 10M, 200k, 1_000_000
    (docs/running.md says what counts). Without --max_steps and --num_train_epochs the learning rate's schedule ends
    there too."""
    milestones: str | None = None
    """Leave the model in OUTPUT_DIR/chck_1M, chck_2M, ... at the first step that brings the words trained on to each of
    these numbers: strict_small or strict, those of BabyLM's tracks, or a list such as 1M,2M,500k. none takes a
    recipe's away."""
    milestone_optimizer: bool = False
    """Give milestones what a run needs to go on from them too, as checkpoints have it."""

    # --- evaluation ---
    do_eval: bool | None = None  # type: ignore[assignment]
    """Evaluate when training has ended, or alone with --do_train false (default: where --eval_data_path is given and
    --eval_strategy is no)."""

    # --- logging ---
    logging_steps: float = 10
    """Log the loss every so many steps (default 10) or, below 1, so large a share of the run; the first 10 steps are
    logged one by one, but for --logging_strategy no."""
    report_to: list[str] | None = None  # type: ignore[assignment]
    """Trackers that get the log: tensorboard, trackio, wandb and others of transformers, all or none (default:
    tensorboard where it is installed, which writes to OUTPUT_DIR/runs, else none)."""
    include_num_input_tokens_seen: str = field(default="no", metadata={"nargs": "?", "const": "all"})
    """Count the tokens trained on, visual ones included: all, non_padding (without padding) or no."""

    # --- saving and resuming ---
    overwrite_output_dir: bool = False
    """Start anew in an --output_dir that holds a run, and remove what that run left: checkpoints, model, log of bad
    samples. Other files stay."""
    resume_changed: bool = False
    """Go on from a checkpoint of another run: with another model, data or settings, which then count; or from one that
    does not say of which run it is."""

    def __post_init__(self) -> None:
        _check_values(self)
        # torchrun and deepspeed tell each rank its number so.
        check_machine(self, self.attn_implementation, launched="LOCAL_RANK" in os.environ)
        self.include_num_input_tokens_seen = _COUNTED.get(
            str(self.include_num_input_tokens_seen).lower(), self.include_num_input_tokens_seen
        )
        check_spelling(self)
        self._read_words()
        self.prepare_reliability()
        # Checked before it: what transformers would fail on without naming a flag. After it: what it has read.
        asked_to_evaluate = self.do_eval
        with warnings.catch_warnings():
            # Of its two names only the older one is known to all releases; recipes keep to it.
            warnings.filterwarnings("ignore", "`gradient_checkpointing.*is deprecated", FutureWarning)
            super().__post_init__()
        # transformers makes it true for --eval_strategy; here it asks for an evaluation at the end.
        self.do_eval = asked_to_evaluate
        check_flags(self)
        check_optimization(self)
        if self.stop_on_bad_numbers:
            # It would hide from the log what now cannot get there, at two waits for the device a micro-batch.
            self.logging_nan_inf_filter = False
        # Examples are dataclasses; a column filter has nothing to remove and would drop their media.
        self.remove_unused_columns = False
        # Every trainable parameter takes part in every step, on every rank: nothing to look for.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        self._check_lora()
        self.check_progress()
        self.check_speed()

    def _read_words(self) -> None:
        """Read the numbers of words, and what is to say how long the run is."""
        self.word_limit_number = None if self.word_limit is None else parse_words(str(self.word_limit), "--word_limit")
        self.milestone_numbers = [] if self.milestones is None else parse_milestones(self.milestones)
        # The number of steps is then set once the data are read, see budget.py.
        self.lasts_for_words = self.word_limit is not None and self.max_steps <= 0 and self.num_train_epochs is None
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0

    def _check_lora(self) -> None:
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.bits != 16:
            Quantization(self.bits, self.quant_type)  # Its own checks.
        if self.lora_enable:
            check_peft()
        elif self.bits != 16:
            raise ValueError(f"--bits {self.bits} needs --lora_enable true: quantised weights cannot be trained")
        elif self.lora_weight_path:
            raise ValueError("--lora_weight_path was given without --lora_enable true; add it, or leave the path out")

    def part_learning_rates(self) -> dict[str, float]:
        """The learning rate of each part."""
        own = {
            "mm_mlp_adapter": self.mm_projector_lr,
            "mm_vision_resampler": self.mm_vision_resampler_lr,
            "mm_vision_tower": self.mm_vision_tower_lr,
            COORDINATES_PART: self.mm_coordinates_lr,
        }
        parts = (*PARTS, COORDINATES_PART)
        return {part: rate if (rate := own.get(part)) is not None else self.learning_rate for part in parts}

    def quantization(self) -> Quantization:
        """How ``--bits`` 8 or 4 and its companions hold the frozen weights."""
        compute = torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32
        return Quantization(self.bits, self.quant_type, self.double_quant, compute, self.device)


def scheduler_job() -> tuple[str, int]:
    """Slurm's number of the job that this process is in, and how often it was requeued; "" and 0 outside of one."""
    # run_lock.py tells by it that an earlier start of this job, which holds the lock, is gone.
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0


def _check_values(group: ModelArguments | DataArguments | TrainingArguments) -> None:
    """A ValueError for a word that is none of a flag's choices, or a number below its least."""
    for name, value in vars(group).items():
        if value is None:
            continue
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"--{name} is {value!r}; known: {', '.join(CHOICES[name])}")
        if name in _LEAST and value < _LEAST[name]:
            raise ValueError(f"--{name} is {value}; it must be at least {_LEAST[name]}")
        if name in ("seed", "data_seed") and value >= 2**32:
            raise ValueError(f"--{name} is {value}; it must be below 2**32")


def _settings_of(group: ModelArguments | DataArguments, prefix: str = "") -> dict[str, Any]:
    """The flags of a group that are fields of ``VisionConfig``, whose names they have behind a prefix."""
    flags = {field.name for field in fields(group)}
    names = [field.name for field in fields(VisionConfig) if f"{prefix}{field.name}" in flags]
    return {name: getattr(group, f"{prefix}{name}") for name in names}
