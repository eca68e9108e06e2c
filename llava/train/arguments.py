"""The three groups of arguments, and how a command line and a recipe become them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from llava.data.chunking import NONE, TEXT_CHUNKING
from llava.data.formats import BUILT_IN, CHAT, FORMATS, PLAIN_LM
from llava.data.samplers import RANDOM, STRATEGIES
from llava.geometry import DEFAULT_PINPOINTS
from llava.token_layout import POOL_MODES
from llava.train.bad_samples import BadSampleArguments
from llava.train.engines import (
    check_counts,
    check_deepspeed_config,
    check_launcher,
    check_precision,
    check_trackers,
    find_deepspeed_config,
)
from llava.train.flags import check_flags, check_spelling
from llava.train.grounding_arguments import CONTENT, GroundingArguments
from llava.train.lora import LoraArguments
from llava.train.media_arguments import MediaArguments
from llava.train.parts import COORDINATES_PART, PARTS

DEFAULT_PARTS = "mm_mlp_adapter,mm_vision_resampler,mm_language_model"
_TRUE = ("1", "true", "yes", "on")
_COUNTED = {"true": "all", "1": "all", "yes": "all", "false": "no", "0": "no", "none": "no"}


@dataclass
class ModelArguments(GroundingArguments):
    """Which model, which vision modules, what is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of a plain language model or of a multimodal checkpoint."}
    )
    plugins: list[str] | None = field(
        default=None,
        metadata={"help": "Python modules to import first, which register parts of your own (docs/extending.md)."},
    )
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of the vision model. Without it a plain language model trains on text alone."
        },
    )
    save_vision_tower: bool = field(
        default=False,
        metadata={"help": "Store the frozen tower's weights in checkpoints too, not only its source and hash."},
    )
    mm_vision_select_layer: int | None = field(
        default=None,
        metadata={"help": "Hidden state of the tower to use; -2 is the output of the last layer but one (default)."},
    )
    mm_projector_type: str | None = field(
        default=None,
        metadata={"help": "linear, identity, pooler, mlpNx_gelu or mlpNx_resMx_gelu (default mlp2x_gelu)."},
    )
    mm_resampler_type: str | None = field(
        default=None,
        metadata={
            "help": "fast_slow_resampler, perceiver, qformer, spatial_pool, masked_drop, or none (default): every "
            "patch becomes a token."
        },
    )
    mm_perceiver_latents: int | None = field(
        default=None,
        metadata={"help": "Tokens a frame of the perceiver, or in the slow stream, there a square (default 81)."},
    )
    mm_perceiver_latents_fast: int | None = field(
        default=None, metadata={"help": "Tokens a frame in the fast stream, a square (default 9)."}
    )
    mm_perceiver_depth: int | None = field(default=None, metadata={"help": "Layers of the perceiver (default 2)."})
    mm_qformer_latents: int | None = field(
        default=None, metadata={"help": "Tokens a frame of the Q-Former (default 32)."}
    )
    mm_qformer_depth: int | None = field(default=None, metadata={"help": "Layers of the Q-Former (default 3)."})
    mm_spatial_pool_stride: int | None = field(
        default=None, metadata={"help": "How many patches a side spatial_pool makes one (default 2)."}
    )
    mm_spatial_pool_mode: str | None = field(
        default=None, metadata={"help": f"How spatial_pool does so: {', '.join(POOL_MODES)} (default bilinear)."}
    )
    mm_mask_drop_mode: str = field(
        default="fixed",
        metadata={"help": "fixed: masked_drop keeps the same number of patches of every frame. There is no other."},
    )
    mm_mask_drop_ratio: float | None = field(
        default=None, metadata={"help": "Share of each frame's patches that masked_drop keeps (default 0.25)."}
    )
    mm_resampler_width: int | None = field(
        default=None, metadata={"help": "Inner width of the resampler's attention (default 1024)."}
    )
    mm_resampler_heads: int | None = field(
        default=None, metadata={"help": "Heads of the resampler's attention (default 8)."}
    )
    mm_resample_images: bool | None = field(
        default=None, metadata={"help": "Let images pass the resampler too (default false: one token a patch)."}
    )
    mm_patch_merge_type: str | None = field(
        default=None,
        metadata={
            "help": "How the tokens of an anyres image stand: flat (default: view by view) or spatial_unpad (its tiles "
            "as one grid without padding, a learned newline behind each row)."
        },
    )
    mm_slow_frames: int | None = field(
        default=None, metadata={"help": "Temporal length of the slow stream; 0 (default) keeps every frame."}
    )
    mm_tunable_parts: str = field(
        default=DEFAULT_PARTS,
        metadata={
            "help": f"Comma-separated parts to train, of {', '.join(PARTS)}. The language model includes its "
            "embeddings and head; with --lora_enable it is adapters instead."
        },
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={"help": "Keep token embeddings and head as they are while the rest of the language model trains."},
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder or file (.safetensors, .bin) to take projector and resampler weights from."
        },
    )

    def __post_init__(self) -> None:
        if self.mm_resampler_type == "none":
            self.mm_resampler_type = None
        if self.mm_mask_drop_mode != "fixed":
            raise ValueError(
                f"--mm_mask_drop_mode is {self.mm_mask_drop_mode!r}, but only fixed exists: the text is written "
                "before a frame is masked, so the number of patches cannot vary"
            )
        self.check_grounding()
        unknown = [part for part in self.named_parts if part not in PARTS]
        if unknown:
            raise ValueError(f"--mm_tunable_parts names {', '.join(unknown)}; known: {', '.join(PARTS)}")
        if not self.named_parts:
            raise ValueError(f"--mm_tunable_parts is empty, nothing would be trained; known: {', '.join(PARTS)}")

    @property
    def named_parts(self) -> list[str]:
        return [part.strip() for part in self.mm_tunable_parts.split(",") if part.strip()]

    @property
    def tunable_parts(self) -> list[str]:
        """The named parts and, from stage 2 on, the tables of coordinates."""
        learns_coordinates = self.stage != CONTENT and not self.freeze_coordinates
        return [*self.named_parts, *([COORDINATES_PART] if learns_coordinates else [])]

    def vision_settings(self) -> dict[str, Any]:
        """The flags that are fields of ``VisionConfig``; None where a flag was not given."""
        return {
            "vision_select_layer": self.mm_vision_select_layer,
            "projector_type": self.mm_projector_type,
            "resampler_type": self.mm_resampler_type,
            "perceiver_latents": self.mm_perceiver_latents,
            "perceiver_latents_fast": self.mm_perceiver_latents_fast,
            "perceiver_depth": self.mm_perceiver_depth,
            "qformer_latents": self.mm_qformer_latents,
            "qformer_depth": self.mm_qformer_depth,
            "spatial_pool_stride": self.mm_spatial_pool_stride,
            "spatial_pool_mode": self.mm_spatial_pool_mode,
            "mask_drop_ratio": self.mm_mask_drop_ratio,
            "resampler_width": self.mm_resampler_width,
            "resampler_heads": self.mm_resampler_heads,
            "resample_images": self.mm_resample_images,
            "patch_merge_type": self.mm_patch_merge_type,
            "slow_frames": self.mm_slow_frames,
        }


@dataclass
class DataArguments(MediaArguments, BadSampleArguments):
    """Which data, and how media and text are read."""

    data_path: list[str] = field(
        metadata={
            "help": "Data to train on: .json or .jsonl files, patterns of them such as 'part{1,2}.json', YAML "
            "mixtures; several are joined."
        }
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "Data to evaluate on, in the same forms; see --eval_strategy."}
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the indexes that data files are read into once (default: ~/.cache/llava-babylm)."},
    )
    allow_duplicate_ids: bool = field(
        default=False, metadata={"help": "Let several samples of one data file have the same id."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "What relative image paths start from (default: the data file's folder)."}
    )
    video_folder: str | None = field(
        default=None, metadata={"help": "What relative video paths start from (default: the data file's folder)."}
    )
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={
            "help": "square (default: as the tower's processor does), pad (the whole picture), anyres (the whole "
            "picture and tiles of it) or anyres_max_N (of the tiles, about N tiles' worth of tokens at most)."
        },
    )
    image_grid_pinpoints: str | None = field(
        default=None,
        metadata={
            "help": "What anyres may cut an image into, width x height: (1x2),(2x1) in tiles, (1x1),...,(6x6) for a "
            f"range, or [[224, 448]] in pixels (default {DEFAULT_PINPOINTS})."
        },
    )
    num_frames: int | None = field(default=None, metadata={"help": "Frames sampled evenly from a video (default 4)."})
    video_fps: float | None = field(
        default=None, metadata={"help": "Sample so many frames a second instead of --num_frames; 0 (default) does not."}
    )
    frames_upbound: int | None = field(
        default=None, metadata={"help": "Most frames that --video_fps samples (default 32; 0: no bound)."}
    )
    add_time_instruction: bool | None = field(
        default=None,
        metadata={
            "help": "Tell the user's turn how long its videos are and when their frames were taken; needs --version.",
            "nargs": "?",
            "const": True,
        },
    )
    plain_lm: bool | None = field(
        default=None,
        metadata={
            "help": "Plain language modelling: all turns joined, all text learned (default without --version).",
            "nargs": "?",
            "const": True,
        },
    )
    version: str | None = field(
        default=None,
        metadata={
            "help": f"Format of conversations, of which only the assistant's turns are learned: {', '.join(BUILT_IN)}. "
            f"{CHAT} (default with --plain_lm false) is the tokenizer's own chat template."
        },
    )
    text_chunking: str = field(
        default=NONE,
        metadata={
            "help": f"What becomes of text that is longer than --model_max_length, of {', '.join(TEXT_CHUNKING)}: none "
            "(default) cuts it off, document trains on all of it in several samples (needs --plain_lm)."
        },
    )
    early_mix_text: bool = field(
        default=False, metadata={"help": "Do not keep text-only samples apart when grouping by modality."}
    )

    def __post_init__(self) -> None:
        # Recipes of the family leave folders empty to say "none".
        self.image_folder = self.image_folder or None
        self.video_folder = self.video_folder or None
        caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.data_cache_dir = self.data_cache_dir or os.path.join(caches, "llava-babylm")
        if os.environ.get("USE_PLAIN_LM", "").lower() in _TRUE:
            transformers.logging.get_logger(__name__).warning("USE_PLAIN_LM is honoured; its name now is --plain_lm")
            self.plain_lm, self.version = True, None
        if self.plain_lm and self.version not in (None, PLAIN_LM):
            raise ValueError(
                f"--version {self.version} asks for a chat format, but --plain_lm is true; leave one of them out, or "
                "give --plain_lm false where a recipe says true"
            )
        if self.plain_lm is None:
            self.plain_lm = self.version in (None, PLAIN_LM)
        FORMATS.get(self.format_name)
        if self.text_chunking not in TEXT_CHUNKING:
            raise ValueError(f"--text_chunking is {self.text_chunking!r}; known: {', '.join(TEXT_CHUNKING)}")
        self.check_media()
        check_counts(self)
        self.check_bad_samples()

    @property
    def format_name(self) -> str:
        """The preprocessing format that ``plain_lm`` and ``version`` ask for."""
        return PLAIN_LM if self.plain_lm else self.version or CHAT

    def vision_settings(self) -> dict[str, Any]:
        """The flags that are fields of ``VisionConfig``; None where a flag was not given."""
        names = (
            "image_aspect_ratio", "image_grid_pinpoints", "num_frames", "video_fps", "frames_upbound",
            "add_time_instruction",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass
class TrainingArguments(LoraArguments, transformers.TrainingArguments):
    """transformers' arguments, those of the parts, and LoRA's."""

    model_max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a sample, visual ones included (default: the model's context)."}
    )
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log the loss every so many steps (default 10) or, below 1, so large a share of the run; the first "
            "10 steps are logged one by one, but for --logging_strategy no."
        },
    )
    train_sampling_strategy: str = field(
        default=RANDOM,
        metadata={
            "help": f"Order of the samples: {', '.join(STRATEGIES)}. Those that group put samples of similar length "
            "into a step, the largest batch first; by modality, text-only samples apart from the others."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flash_attention_2 (default: what transformers picks)."}
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector (default: --learning_rate)."}
    )
    mm_vision_resampler_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the resampler (default: --learning_rate)."}
    )
    mm_vision_tower_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower, if trained (default: --learning_rate)."}
    )

    mm_coordinates_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the tables of coordinates (default: --learning_rate)."}
    )

    do_train: bool = field(
        default=True, metadata={"help": "Train; false evaluates the model as it is, with --do_eval (default true)."}
    )
    do_eval: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Evaluate when training has ended, or alone with --do_train false (default: where --eval_data_path "
            "is given and --eval_strategy is no).",
            "nargs": "?",
            "const": True,
        },
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={
            "help": "Count the tokens trained on, visual ones included: all, non_padding (without padding) or no.",
            "nargs": "?",
            "const": "all",
        },
    )

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a mixture of experts' load balancing loss (default: the checkpoint's); 0 leaves it out."
        },
    )

    stop_on_bad_numbers: bool = field(
        default=True,
        metadata={
            "help": "Stop where a loss or the gradient is NaN or infinite, before the weights are, and leave the batch "
            "in OUTPUT_DIR/bad_step-N with the command that replays it (default true)."
        },
    )

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Start anew in an --output_dir that holds a run, and remove what that run left: checkpoints, "
            "model, log of bad samples. Other files stay."
        },
    )
    resume_changed: bool = field(
        default=False,
        metadata={
            "help": "Go on from a checkpoint of another run: with another model, data or settings, which then count; "
            "or from one that does not say of which run it is."
        },
    )

    def __post_init__(self) -> None:
        check_counts(self)
        check_precision(self)
        check_trackers(self.report_to)
        if self.deepspeed:
            self.deepspeed = find_deepspeed_config(self.deepspeed)
            check_deepspeed_config(self.deepspeed)
            check_launcher("LOCAL_RANK" in os.environ)
        self.include_num_input_tokens_seen = _COUNTED.get(
            str(self.include_num_input_tokens_seen).lower(), self.include_num_input_tokens_seen
        )
        check_spelling(self)
        asked_to_evaluate = self.do_eval
        with warnings.catch_warnings():
            # Of its two names only the older one is known to all releases; recipes keep to it.
            warnings.filterwarnings("ignore", "`gradient_checkpointing.*is deprecated", FutureWarning)
            super().__post_init__()
        # transformers makes it true for --eval_strategy; here it asks for an evaluation at the end.
        self.do_eval = asked_to_evaluate
        check_flags(self)
        if self.stop_on_bad_numbers:
            # It would hide from the log what now cannot get there, at two waits for the device a micro-batch.
            self.logging_nan_inf_filter = False
        # Examples are dataclasses; a column filter has nothing to remove and would drop their media.
        self.remove_unused_columns = False
        # Every trainable parameter takes part in every step, on every rank: nothing to look for.
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if self.train_sampling_strategy not in STRATEGIES:
            raise ValueError(
                f"--train_sampling_strategy is {self.train_sampling_strategy!r}; known: {', '.join(STRATEGIES)}"
            )
        if self.attn_implementation not in (None, "sdpa", "eager", "flash_attention_2"):
            raise ValueError(
                f"--attn_implementation is {self.attn_implementation!r}; known: sdpa, eager, flash_attention_2"
            )
        if self.attn_implementation == "flash_attention_2":
            check_flash_attention()
        self.check_lora()

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


def scheduler_job() -> tuple[str, int]:
    """Slurm's number of the job that this process is in, and how often it was requeued; "" and 0 outside of one."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0


def check_flash_attention() -> None:
    """A ValueError that says how to get flash attention, where it is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "--attn_implementation flash_attention_2 needs the flash-attn package and a CUDA GPU: "
            "pip install 'llava-babylm[flash-attn]', or use sdpa, which needs nothing"
        )
