"""Command lines and recipes: what they become, and what they are refused for."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from llava.train import arguments, engines
from llava.train.command_line import RECIPES, parse_arguments

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o", "--use_cpu"]


def test_defaults() -> None:
    model, data, training = parse_arguments(REQUIRED)
    assert model.tunable_parts == ["mm_mlp_adapter", "mm_vision_resampler", "mm_language_model"]
    assert (data.data_path, data.plain_lm, data.image_folder) == (["d.json"], True, None)
    assert training.remove_unused_columns is False
    assert all(value is None for value in {**model.vision_settings(), **data.vision_settings()}.values())


def test_a_recipes_feature_cache_can_be_turned_off() -> None:
    words = [*REQUIRED, "--config", "start.yaml"]
    assert parse_arguments(words)[1].feature_cache_fill
    _, data, _ = parse_arguments([*words, "--feature_cache", "none", "--stage_media", "/x"])
    assert (data.feature_cache, data.feature_cache_fill) == (None, False)


def test_ranks_that_would_not_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes .* would train as 1.*--use_cpu true"):
        parse_arguments(REQUIRED[:-1])


def test_flags_override_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "num_frames: 8\nlearning_rate: 5.0e-4\nbf16: false\ndata_path: [a.json, b.json]\nsave_steps: null\n"
    )
    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "--config", str(recipe), "--num_frames", "2"]
    _, data, training = parse_arguments(argv)
    assert (data.num_frames, data.data_path, training.learning_rate) == (2, ["a.json", "b.json"], 5e-4)


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_parses_by_its_name(recipe: str) -> None:
    parse_arguments([*REQUIRED, "--config", recipe])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mm_projector_typ", "linear"], "unknown flag --mm_projector_typ; did you mean --mm_projector_type"),
        (["--mm_proj", "linear"], "unknown flag --mm_proj"),
        (["--learning_rate", "1e-4", "stray"], "unexpected 'stray'"),
        (["--config", "nothing.yaml"], "no such file; recipes that come with llava"),
        (["--stage", "4"], "--stage is '4'"),
        (["--mm_tunable_parts", "mm_everything"], "--mm_tunable_parts names mm_everything; known: mm_vision_tower"),
        (["--mm_tunable_parts", ","], "--mm_tunable_parts is empty"),
        (["--attn_implementation", "fast"], "--attn_implementation is 'fast'"),
        (["--version", "qwen_9"], "unknown --version .* 'qwen_9'; known: chat, gemma, llama_2, llama_v3, mpt, plain"),
        (["--plain_lm", "true", "--version", "qwen"], "--version qwen asks for a chat format, but --plain_lm is true"),
        (["--config", "italian_text.yaml", "--version", "v1"], "give --plain_lm false where a recipe says true"),
        (
            ["--s2", "True"],
            "--s2 True: not available; several scales at once do not exist; use --image_aspect_ratio anyres",
        ),
    ],
)
def test_mistakes_are_one_clear_error(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*REQUIRED, *argv])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_framez: 8", "unknown flag --num_framez; did you mean --num_frames"),
        ("- a\n- b", "expected names and values, found list"),
        ("a: [", "not YAML"),
    ],
)
def test_a_broken_recipe_names_its_file(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.yaml.*{message}"):
        parse_arguments([*REQUIRED, "--config", str(recipe)])


def test_flags_of_older_scripts_are_mapped_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    old = ["--warmup_ratio", "0.1", "--evaluation_strategy", "no", "--lazy_preprocess", "True", "--force_sample=False"]
    with caplog.at_level(logging.WARNING):
        _, _, training = parse_arguments([*REQUIRED, *old, "--video_folder", "", "--num_frames", "4"])
    assert (training.warmup_steps, training.eval_strategy.value) == (0.1, "no")
    assert "--warmup_ratio is now --warmup_steps" in caplog.text
    assert "--lazy_preprocess True is not needed any more" in caplog.text


def test_older_flags_are_mapped_in_recipes_too(tmp_path: Path) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text("warmup_ratio: 0.2\nlazy_preprocess: true\n")
    assert parse_arguments([*REQUIRED, "--config", str(recipe)])[2].warmup_steps == 0.2


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        ([], "random"),
        (["--group_by_modality_length", "True"], "group_by_modality_length"),
        (["--group_by_length"], "group_by_length"),
        (["--group_by_length=False"], "random"),
        (["--group_by_length", "True", "--group_by_modality_length", "True"], "group_by_modality_length"),
        (["--group_by_modality_length", "True", "--group_by_length", "False"], "group_by_modality_length"),
        (["--train_sampling_strategy", "sequential", "--group_by_length", "False"], "sequential"),
        (["--train_sampling_strategy", "group_by_modality_length"], "group_by_modality_length"),
    ],
)
def test_switches_for_grouping_are_a_strategy(
    words: list[str], strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse_arguments([*REQUIRED, *words])[2].train_sampling_strategy == strategy
    if any("=" not in word and word.startswith("--group") for word in words):
        assert "is now --train_sampling_strategy" in caplog.text


def test_a_switch_for_grouping_is_on_or_off() -> None:
    with pytest.raises(ValueError, match="--group_by_length is 'maybe', expected true or false"):
        parse_arguments([*REQUIRED, "--group_by_length", "maybe"])


def test_a_switch_overrides_that_of_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "grouped.yaml"
    recipe.write_text("group_by_modality_length: true\n")
    argv = [*REQUIRED, "--config", str(recipe)]
    assert parse_arguments(argv)[2].train_sampling_strategy == "group_by_modality_length"
    assert parse_arguments([*argv, "--group_by_modality_length", "False"])[2].train_sampling_strategy == "random"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_sampling_strategy", "batch_rebalance"], "is 'batch_rebalance'; known: random, sequential, group"),
        (["--dataloader_in_order", "false"], "no resumed run can repeat"),
    ],
)
def test_an_order_that_cannot_be_kept_is_an_error(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*REQUIRED, *words])


def test_flash_attention_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llava-babylm\[flash-attn\]'"):
        engines.check_flash_attention()
    with pytest.raises(ValueError, match=r"pip install 'llava-babylm\[flash-attn\]'"):
        parse_arguments([*REQUIRED, "--attn_implementation", "flash_attention_2"])


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], "plain_lm"),
        (["--plain_lm"], "plain_lm"),
        (["--version", "plain_lm"], "plain_lm"),
        (["--plain_lm", "false"], "chat"),
        (["--version", "chat"], "chat"),
        (["--version", "qwen"], "qwen"),
        (["--plain_lm", "false", "--version", "v1"], "v1"),
        (["--config", "italian_text.yaml", "--plain_lm", "false"], "chat"),
    ],
)
def test_the_format_that_two_flags_ask_for(argv: list[str], name: str) -> None:
    data = parse_arguments([*REQUIRED, *argv])[1]
    assert (data.format_name, data.plain_lm) == (name, name == "plain_lm")


def test_use_plain_lm_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_PLAIN_LM", "1")
    assert parse_arguments([*REQUIRED, "--version", "llama_v2"])[1].plain_lm
    assert not parse_arguments([*REQUIRED, "--plain_lm", "false"])[1].plain_lm


def test_help_lists_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--config", "--vision_tower", "--num_frames", "--mm_projector_lr", "--bf16"))


@pytest.mark.parametrize("value", [True, False])
def test_the_older_name_of_checkpointing_is_no_warning(value: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = arguments.TrainingArguments(output_dir=str(tmp_path), gradient_checkpointing=value, use_cpu=True)
    assert args.gradient_checkpointing is value
