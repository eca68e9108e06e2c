"""The commands of `llava`: what each is for, the module that does it, and examples; `docs/commands.md` shows the same.

Only data: `llava --help` and the completion of a shell read it, and neither loads a module for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROGRAM = "llava"
LOOK, TRAIN, DATA, SCORE, USE, MODELS, SHELL = (
    "Before a run", "Training", "Data", "Scores", "Using a model", "Models and checkpoints", "Help",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of ``llava``.

    Attributes:
        name: its words behind ``llava``: one, or two for those of a family such as ``prepare webvid``.
        module: what ``python -m`` takes as well.
        group: its heading in ``llava --help``.
        summary: a line.
        examples: what stands behind the name; each is a command line that works where its files are there.
        start: module and function that take the words behind the name, where that is not ``main`` of the module.
        extra: what of this package to install for it.
    """

    name: str
    module: str
    group: str
    summary: str
    examples: tuple[str, ...]
    start: str = ""
    extra: str = ""

    @property
    def program(self) -> str:
        """How the command is started without ``llava``."""
        return f"python -m {self.module}"


_RUN = "--model_name_or_path path/to/gpt2 --vision_tower facebook/dinov2-large --data_path captions.json"

COMMANDS = (
    Command(
        "init-recipe", "llava.recipes", LOOK, "copy a complete, commented recipe to start from",
        ("", "italian_video --output my_run.yaml", "english_text --output my_run"),
    ),
    Command(
        "init-slurm", "llava.train.slurm.init", LOOK, "write a script for sbatch: many nodes, requeued by itself",
        ("", "--output captions.sbatch"),
    ),
    Command(
        "inspect", "llava.inspect", LOOK,
        "look at a run before it starts: data, batches, model, and what would ruin it",
        (
            f"{_RUN} --output_dir output/run",
            "--fast --config my_run.yaml --output_dir output/run",
            "--html inspect.html --memory 80 --config my_run.yaml --output_dir output/run",
        ),
    ),
    Command(
        "check", "llava.data.check", LOOK, "decode all media of data files, and list what is bad",
        (
            "captions.json",
            "captions.json --video_folder clips --report bad.jsonl",
            "train.jsonl --num_frames 8 --workers 4",
        ),
    ),
    Command(
        "train", "llava.train.train", TRAIN, "train a model on text, images and videos",
        (
            f"{_RUN} --output_dir output/run",
            "--config italian_video.yaml --model_name_or_path path/to/gpt2 --data_path captions.json "
            "--output_dir output/run",
            "--config my_run.yaml --output_dir output/run --resume_from_checkpoint auto",
        ),
        start="llava.train.train_mem:main",
    ),
    Command(
        "alternating", "llava.train.alternating", TRAIN, "train a model with alternating attention",
        (
            "--model_name_or_path path/to/qwen2 --variant alternating --force --data_path captions.json "
            "--output_dir output/alternating",
            "--backbone_model path/to/qwen2 --init_from_backbone --variant alternating --data_path captions.json "
            "--output_dir output/alternating",
            "--model_name_or_path path/to/qwen2 --dry_run",
        ),
        start="llava.train.alternating:start",
    ),
    Command(
        "launch", "llava.train.launch", TRAIN,
        "start a training on several GPUs: torchrun whose ranks can be asked to stop",
        (
            f"--nproc_per_node 4 -m llava train {_RUN} --output_dir output/run",
            "--standalone --nproc_per_node 2 -m llava train --deepspeed zero2 --config my_run.yaml "
            "--output_dir output/run",
        ),
    ),
    Command(
        "slurm", "llava.train.slurm", TRAIN,
        "start a training on all nodes of a Slurm job, and requeue it when its time is up",
        (
            f"--nproc_per_node 4 -m llava train {_RUN} --output_dir output/run",
            "--nproc_per_node gpu -m llava train --config my_run.yaml --output_dir output/run "
            "--resume_from_checkpoint auto",
        ),
    ),
    Command(
        "replay", "llava.train.replay", TRAIN, "run the step that stopped a run once more, and see where it breaks",
        ("output/run/bad_step-120", "output/run/bad_step-120 --rank 0 --device cpu"),
    ),
    Command(
        "card", "llava.train.model_card", TRAIN, "write a model's card with the scores that have come since",
        ("output/run", "output/run --license apache-2.0 --language it"),
    ),
    Command(
        "exposure", "llava.train.exposure", TRAIN, "count once more the words that a run has read, and compare",
        ("output/run", "output/run --data_path moved/captions.json --video_folder moved/clips"),
    ),
    Command(
        "tokenizer", "llava.data.train_tokenizer", DATA, "train a byte-level BPE tokenizer on text",
        (
            "--data corpus.txt.gz --output_dir output/tokenizer",
            "--data corpus.txt captions.json --vocab_size 16000 --output_dir output/tokenizer",
        ),
    ),
    Command(
        "cache", "llava.data.feature_cache", DATA,
        "compute the features of a frozen vision tower once, ahead of training",
        (
            "build --config my_run.yaml --feature_cache features",
            f"build {_RUN} --feature_cache features --processes 2",
            "info features",
            "verify features",
        ),
    ),
    Command(
        "prepare localized-narratives", "llava.data.localized_narratives", DATA,
        "captions with mouse traces -> text, images and boxes",
        (
            "narratives.jsonl --images coco/train2017 --out data/narratives",
            "narratives.jsonl.gz --images images --out data/narratives --words_per_box 3 --preview 8",
        ),
    ),
    Command(
        "prepare webvid", "llava.data.webvid", DATA, "rows of WebVid and their clips -> text, and captions of clips",
        (
            "--rows rows.csv --video_folder videos --out data/webvid",
            "--rows rows.jsonl --video_folder videos --out data/webvid --require_video --max_samples 100",
            "--rows rows.csv --caption_column name --language en --video_folder videos --out data/webvid",
        ),
    ),
    Command(
        "eval", "llava.eval.run", SCORE, "ask a model about annotated images and videos, and score its answers",
        (
            "--task caption --model_path output/run --data held_out.json --out output/scores",
            "--task rec --model_path output/grounded --data boxes.json --out output/scores --batch_size 4",
        ),
    ),
    Command(
        "babylm", "llava.eval.babylm", SCORE,
        "likelihood scores of sentences: BLiMP and other tasks, pairs of your own",
        (
            "--model_path output/run --data evaluation_data --out results",
            "--model_path output/run --tasks italian --out results",
            "--compare results/a/main results/b/main",
        ),
    ),
    Command(
        "study", "llava.eval.study", SCORE, "variants of a recipe x seeds: trained, scored, and in one table",
        ("study.yaml --dry_run", "study.yaml", "study.yaml --variants baseline --seeds 0 1"),
    ),
    Command(
        "generate", "llava.serve.cli", USE, "caption, answer or continue, in the terminal",
        (
            "--model_path output/run --video clip.mp4",
            '--model_path output/run --image photo.jpg --prompt "Una"',
            '--model_path output/grounded --image photo.jpg --prompt "Where is the star?" --draw star.png',
        ),
    ),
    Command(
        "serve", "llava.serve.web", USE,
        "a page in the browser and an OpenAI-compatible endpoint, on this machine",
        (
            "output/run",
            "output/run output/other_run --port 8000",
            "output/run --host 0.0.0.0 --token_file token.txt",
            "output/run --no_page",
        ),
        extra="web",
    ),
    Command(
        "demo", "llava.demo", USE, "a tiny GPT-2 learns to describe videos, from nothing, in minutes on a CPU",
        ("--output_dir demo_output", "--quick"),
    ),
    Command(
        "demo grounding", "llava.demo.grounding", USE, "another learns to say where in a picture and when in a clip",
        ("--output_dir demo_grounding_output", "--quick"),
    ),
    Command(
        "demo tower", "llava.demo.pretrain_tower", USE, "train the tiny vision tower that comes with the demos",
        ("--output_dir tower", "--output_dir tower --num_steps 100 --batch_size 8"),
    ),
    Command(
        "init", "llava.model.random_weights", MODELS,
        "a language model with random weights, from another's configuration",
        (
            "--model_path path/to/gpt2 --output_dir output/fresh --seed 1",
            "--model_path path/to/config --tokenizer output/tokenizer --output_dir output/fresh",
        ),
    ),
    Command(
        "export", "llava.model.export", MODELS, "a checkpoint as a folder that loads with transformers alone",
        ("output/run output/exported --as multimodal", "output/run output/text_model --as text --dtype bfloat16"),
    ),
    Command(
        "convert", "llava.model.convert", MODELS, "a checkpoint of the LLaVA family in this library's layout",
        ("path/to/llava-1.5 --dry_run", "path/to/llava-1.5 output/converted"),
    ),
    Command(
        "merge-lora", "llava.model.merge_lora", MODELS, "LoRA adapters and their base model -> one complete checkpoint",
        ("--model_path output/lora --output_dir output/merged",
         "--model_path output/lora --model_base path/to/gpt2 --output_dir output/merged"),
        extra="lora",
    ),
    Command(
        "models", "llava.inspect.models", MODELS,
        "everything that is registered: language models, towers, resamplers, formats",
        ("", "--plugins my_parts"),
    ),
    Command(
        "flags", "llava.inspect.flags", SHELL, "what each flag of transformers and of the LLaVA family does here",
        ("",),
    ),
    Command(
        "pictures", "llava.inspect.pictures", SHELL, "draw the pictures of the documents, and the losses of a run",
        ("docs/pictures", "pictures --run output/run"),
    ),
    Command(
        "completion", "llava.completion", SHELL, "completion of commands, flags, values and files by TAB",
        ("bash", "zsh", "fish"),
    ),
    Command(
        "commands", "llava.inspect.commands", SHELL, "all commands, with their modules and examples, as a page",
        ("",),
    ),
)  # fmt: skip
"""All commands, in the order of the help."""


def find_command(words: Sequence[str]) -> tuple[Command, list[str]] | None:
    """The command that a command line names, and the words behind its name; None if it names none."""
    for length in (2, 1):
        name = " ".join(words[:length]).replace("_", "-")
        for command in COMMANDS:
            if command.name == name and len(words) >= length:
                return command, list(words[length:])
    return None


def find_program(program: str) -> Command | None:
    """The command that ``llava NAME`` or ``python -m MODULE`` is, or None."""
    return next((one for one in COMMANDS if program in (f"{PROGRAM} {one.name}", one.program)), None)


def load_start(command: Command) -> Callable[[list[str]], int | None]:
    """The function that runs a command.

    Raises:
        ValueError: a package that its module needs is not installed.
    """
    module, _, function = command.start.partition(":")
    try:
        loaded = importlib.import_module(module or command.module)
        if hasattr(loaded, "__path__"):  # A package: what `python -m` runs of it.
            loaded = importlib.import_module(f"{loaded.__name__}.__main__")
        start: Callable[[list[str]], int | None] = getattr(loaded, function or "main")
    except ModuleNotFoundError as error:
        package = f"llava-babylm[{command.extra}]" if command.extra else str(error.name)
        if str(error.name).partition(".")[0] == PROGRAM:
            raise ValueError(f"{PROGRAM} {command.name} is not part of this installation: no {error.name}") from error
        raise ValueError(
            f"{PROGRAM} {command.name} needs the package {error.name}, which is not installed: pip install '{package}'"
        ) from error
    return start


def _names(*groups: str) -> dict[str, tuple[str, ...]]:
    spellings = [tuple(f"--{name}" for name in group.split()) for group in groups]
    return {name: tuple(other for other in group if other != name) for group in spellings for name in group}


OTHER_NAMES = _names(
    "output_dir out output",
    "model_path model_name_or_path model",
    "data_path data",
    "image_folder images",
    "video_folder videos video_dir",
    "num_processes workers processes",
    "overwrite overwrite_output_dir",
    "limit max_samples",
)
"""Flags with one meaning that commands have under several names: where a command has one of them, it takes all."""

PLACES = {
    "data": "--data_path",
    "out": "--output_dir",
    "output_dir": "--output_dir",
    "checkpoint": "--model_path",
    "models": "--model_path",
    "feature_cache": "--feature_cache",
}
"""What has a place on the command line of one command, and a flag in others: the flag is taken as well."""

MEANT = {
    f"--{name}": tuple(f"--{flag}" for flag in flags.split())
    for name, flags in {
        "batch_size": "per_device_train_batch_size batch_size batch_tokens",
        "checkpoint": "model_path model_name_or_path",
        "ckpt": "model_path model_name_or_path",
        "cpu": "use_cpu device",
        "device": "use_cpu",
        "epochs": "num_train_epochs",
        "fps": "video_fps",
        "frames": "num_frames",
        "gpus": "nproc_per_node num_processes",
        "lr": "learning_rate",
        "max_length": "model_max_length max_new_tokens",
        "max_tokens": "max_new_tokens max_tokens_per_batch",
        "num_workers": "dataloader_num_workers num_processes workers",
        "precision": "bf16 fp16 dtype",
        "resume": "resume_from_checkpoint",
        "steps": "max_steps",
        "vision_model": "vision_tower",
    }.items()
}
"""What people call a flag elsewhere, and the flags that may be meant: a message names those that a command has."""

TOPICS = {
    title: names.split()
    for title, names in {
        "model": "model_path model_name_or_path model_base vision_tower bits revision dtype plugins tokenizer",
        "data": "data data_path eval_data_path image_folder video_folder images image_name allow_outside_paths "
        "allow_duplicate_ids ignore_keys split box_format limit tasks pairs pair_columns prefix_column group_columns "
        "label_column caption_column language rows require_video max_samples fast name "
        "keep_without_image image video prompt system task",
        "images and clips": "num_frames video_fps frames_upbound decode_timeout max_image_pixels max_image_bytes "
        "max_video_pixels max_video_frames feature_cache feature_cache_strict on_bad_sample",
        "boxes": "words_per_box padding quantile min_points min_size decimals",
        "answers": "max_new_tokens min_new_tokens num_beams temperature top_k top_p repetition_penalty "
        "no_repeat_ngram_size length_penalty generation_config sub_bin seed",
        "output": "out output_dir report overwrite json draw num_pictures preview no_blind_check compare check",
        "machine": "device batch_size batch_tokens num_processes workers processes shard host port",
    }.items()
}
"""Headings of flags in the help of commands that have many."""
