"""The demo from an empty folder to captions: reads as its table of contents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.demo.base_model import write_base_model
from llava.demo.dataset import DemoData, read_captions, write_dataset
from llava.demo.evaluation import CaptionedClip, Scores, caption_clips, choose_examples, score, write_captions
from llava.demo.picture import write_picture
from llava.demo.report import caption_table, score_lines, time_lines
from llava.demo.timing import phase

TOWER_FOLDER = Path(__file__).parent / "tower"

_ROWS_OF_TABLE = 12
_ROWS_OF_PICTURE = 8


@dataclass(frozen=True)
class DemoSettings:
    """What the command line sets."""

    output_dir: Path
    seed: int
    num_train_clips: int
    num_held_out_clips: int
    tower: Path = TOWER_FOLDER
    max_steps: int | None = None
    """Steps of each training phase; by default as many as its recipe says."""


def run_demo(settings: DemoSettings) -> Scores:
    """Write data, train, caption held-out clips, and report."""
    seconds: dict[str, float] = {}
    output = settings.output_dir
    with phase("writing clips", seconds):
        data = write_dataset(
            output / "data",
            seed=settings.seed,
            num_train_clips=settings.num_train_clips,
            num_held_out_clips=settings.num_held_out_clips,
        )
    with phase("tokenizer and model", seconds):
        write_base_model(output / "base_model", read_captions(data.text), seed=settings.seed)
    with phase("training on text", seconds):
        train_on_text(settings, data)
    with phase("training on video", seconds):
        train_on_video(settings, data)
    with phase("captioning held-out clips", seconds):
        clips = caption_held_out_clips(output / "checkpoint", data)
    write_captions(output / "captions.json", clips, seconds)
    write_picture(output / "captions.png", choose_examples(clips, _ROWS_OF_PICTURE))
    scores = score(clips)
    print()
    print(caption_table(choose_examples(clips, _ROWS_OF_TABLE)))
    print()
    print(score_lines(scores, len(clips)))
    print(time_lines(seconds))
    print(f"in {output}: data/, checkpoint/, captions.json, captions.png")
    print("describe a clip yourself:")
    print(f"  python -m llava.serve.cli --model_path {output / 'checkpoint'} --video {clips[0].video}")
    return scores


def train_on_text(settings: DemoSettings, data: DemoData) -> None:
    """Phase `_t_it`: the language model alone."""
    from llava.train.train import main as train

    output = settings.output_dir
    train(
        [
            *("--config", "demo_text.yaml"),
            *("--model_name_or_path", str(output / "base_model")),
            *("--data_path", str(data.text)),
            *("--output_dir", str(output / "text_model")),
            *common_flags(settings),
        ]
    )


def train_on_video(settings: DemoSettings, data: DemoData) -> None:
    """Phase `_vi_it`: projector, resampler and language model, on top of the frozen tower."""
    from llava.train.train import main as train

    output = settings.output_dir
    train(
        [
            *("--config", "demo_video.yaml"),
            *("--model_name_or_path", str(output / "text_model")),
            *("--vision_tower", str(settings.tower)),
            *("--data_path", str(data.train)),
            *("--output_dir", str(output / "checkpoint")),
            *common_flags(settings),
        ]
    )


def common_flags(settings: DemoSettings) -> list[str]:
    """The flags that both phases take."""
    # A second demonstration takes the first one's place.
    flags = ["--seed", str(settings.seed), "--overwrite_output_dir", "true"]
    return flags if settings.max_steps is None else [*flags, "--max_steps", str(settings.max_steps)]


def caption_held_out_clips(checkpoint: Path, data: DemoData) -> list[CaptionedClip]:
    """Load the checkpoint afresh, as any user would, and let it describe what it has never seen."""
    from llava.serve.generate import Captioner

    return caption_clips(Captioner.from_checkpoint(str(checkpoint)), data.held_out)
