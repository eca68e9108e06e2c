"""The table of the tour in test_mistakes.py: what is typed, and what must be said of it."""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """What is typed, and what must be said of it.

    Attributes:
        name: of the test.
        command: of ``COMMANDS``.
        words: of the command line; ``{name}`` stands for a path of the scene.
        says: patterns that the line must match, each.
        status: exit status.
        without: a flag of the command's usual ones that is left out.
    """

    name: str
    command: str
    words: str | list[str]
    says: tuple[str, ...]
    status: int = 2
    without: str = ""


LONG_NUMBER = "9" * 5000

MISTAKES = [
    # --- flags ---
    Mistake("word_for_float", "train", "--learning_rate abc", ("--learning_rate", "'abc'", "a number")),
    Mistake("word_for_int", "train", "--num_frames four", ("--num_frames", "'four'", "a whole number")),
    Mistake("fraction_for_int", "train", "--num_frames 4.5", ("--num_frames", "'4.5'", "a whole number")),
    Mistake("word_for_bool", "train", "--bf16 maybe", ("--bf16", "'maybe'", "true or false")),
    Mistake("not_a_number", "train", "--learning_rate nan", ("--learning_rate", "'nan'", "a finite number")),
    Mistake("infinite", "train", "--weight_decay inf", ("--weight_decay", "'inf'", "finite")),
    Mistake("empty_number", "train", ["--learning_rate", ""], ("--learning_rate", "''", "a number")),
    Mistake("empty_tower", "train", ["--vision_tower", ""], ("--vision_tower", "empty")),
    Mistake("empty_model", "train", ["--model_name_or_path", ""], ("--model_name_or_path", "empty")),
    Mistake("long_number", "train", ["--num_frames", LONG_NUMBER], ("--num_frames", "whole number", r"\.\.\.")),
    Mistake("nothing_behind_a_flag", "train", "--learning_rate --bf16 false", ("--learning_rate", "value")),
    Mistake("no_data_flag", "train", "", ("--data_path",), without="data_path"),
    Mistake("unknown_flag", "train", "--lerning_rate 1", ("--lerning_rate", "did you mean --learning_rate")),
    Mistake("unknown_choice", "train", "--eval_strategy sometimes", ("--eval_strategy", "'sometimes'", "epoch")),
    Mistake("unknown_optimizer", "train", "--optim adamm", ("--optim", "'adamm'", "adamw_torch")),
    Mistake("two_recipes", "train", "--config demo_text.yaml --config demo_video.yaml", ("--config", "twice")),
    Mistake("recipe_without_a_name", "train", "--config", ("--config", "italian_text.yaml")),
    Mistake("recipe_is_a_folder", "train", "--config {media}", ("--config", "folder|recipes")),
    Mistake("keys_twice", "train", "--config {keys_twice}", (r"twice\.yaml", "num_frames", "1", "3")),
    Mistake("recipe_of_bytes", "train", "--config {garbage}", ("--config", "UTF-8|YAML")),
    Mistake("recipe_of_a_number", "train", "--config {long_yaml}", (r"long\.yaml", "number|YAML")),
    Mistake("recipe_of_a_word", "train", "--config {wrong_yaml}", (r"wrong\.yaml|--num_frames", "'four'")),
    Mistake("mixture_keys_twice", "train", "--data_path {mixture_twice}", (r"mixture\.yaml", "json_path", "2", "3")),
    Mistake("batch_of_none", "train", "--per_device_train_batch_size 0", ("--per_device_train_batch_size", "0", "1")),
    Mistake("negative_batch", "train", "--per_device_train_batch_size -2", ("--per_device_train_batch_size", "-2")),
    Mistake("negative_frames", "train", "--num_frames -1", ("--num_frames", "-1", "1")),
    Mistake("negative_rate", "train", "--learning_rate -1e-4", ("--learning_rate", "-0.0001|-1e-4")),
    # --- machine and engines ---
    Mistake("fp16_on_a_cpu", "train", "--fp16", ("--fp16", "CPU", "bf16|leave")),
    Mistake("fp16_and_bf16", "train", "--fp16 --bf16", ("--fp16", "--bf16")),
    Mistake("tf32_on_a_cpu", "train", "--tf32 true", ("--tf32", "GPU")),
    Mistake("deepspeed_alone", "train", "--deepspeed zero2", ("--deepspeed", "torchrun")),
    Mistake("deepspeed_unknown", "train", "--deepspeed zero9", ("--deepspeed", "zero9", "zero2")),
    Mistake(
        "accelerator_unknown",
        "train",
        ["--accelerator_config", '{{"foo": true}}'],
        ("--accelerator_config", "foo", "known"),
    ),
    Mistake("deepspeed_not_json", "train", "--deepspeed {garbage}", ("--deepspeed", "JSON")),
    Mistake("tracker_missing", "train", "--report_to clearml", ("--report_to", "clearml", "pip install")),
    Mistake("tracker_unknown", "train", "--report_to wandbb", ("--report_to", "wandbb", "wandb")),
    Mistake("no_gpu", "cli", "--device cuda", ("--device", "cuda", "cpu")),
    Mistake("no_such_device", "cli", "--device gpu", ("--device", "gpu", "cuda")),
    Mistake("no_gpu_in_evaluation", "eval", "--device cuda:7", ("--device", "cuda:7", "cpu")),
    # --- folders ---
    Mistake("output_is_a_file", "train", "--output_dir {lines}", ("--output_dir", "file")),
    Mistake("output_below_a_file", "train", "--output_dir {lines}/out", ("--output_dir", "file")),
    Mistake("evaluation_into_a_file", "eval", "--out {lines}", ("--out", "not a folder")),
    Mistake("no_model", "train", "--model_name_or_path ./nothing/here", ("--model_name_or_path", "no folder")),
    Mistake("no_model_beside", "train", "--model_name_or_path {gpt2}x", ("--model_name_or_path", "no folder")),
    Mistake("model_is_a_file", "train", "--model_name_or_path {lines}", ("--model_name_or_path", "file")),
    Mistake(
        "model_with_a_backslash", "train", [r"--model_name_or_path=models\gpt2"], ("--model_name_or_path", "no folder")
    ),
    Mistake(
        "model_on_the_hub",
        "train",
        "--model_name_or_path nobody/nothing",
        ("--model_name_or_path", "hub"),
    ),
    Mistake(
        "tower_on_the_hub",
        "train",
        "--vision_tower nobody/nothing",
        ("--vision_tower", "hub"),
    ),
    Mistake("tower_is_not_there", "train", "--vision_tower ./nothing", ("--vision_tower", "no folder")),
    Mistake("tower_is_a_language_model", "train", "--vision_tower {gpt2}", ("vision tower|--vision_tower", "gpt2")),
    Mistake("captioning_nothing", "cli", "--model_path ./nothing", ("--model_path", "no folder")),
    Mistake(
        "captioning_the_hub",
        "cli",
        "--model_path nobody/nothing",
        ("--model_path", "hub"),
    ),
    Mistake("evaluating_nothing", "eval", "--model_path ./nothing", ("--model_path", "folder")),
    Mistake("random_weights_of_nothing", "random_weights", "--model_path ./nothing", ("--model_path", "folder")),
    Mistake("random_weights_bad_tokenizer", "random_weights", "--tokenizer ./nothing", ("--tokenizer", "folder")),
    Mistake("merging_a_model", "merge_lora", "", ("--model_path", "adapters")),
    Mistake("merging_nothing", "merge_lora", "--model_path ./nothing", ("--model_path", "no folder")),
    # --- checkpoints ---
    Mistake(
        "config_is_garbage", "train", "--model_name_or_path {bad_config}", ("--model_name_or_path", r"config\.json")
    ),
    Mistake(
        "config_of_another",
        "train",
        "--model_name_or_path {other_config}",
        ("--model_name_or_path", "config", "shape|size|fit"),
    ),
    Mistake(
        "cut_weights",
        "train",
        "--model_name_or_path {cut}",
        ("--model_name_or_path", r"model\.safetensors", "cut|damaged|read"),
    ),
    Mistake("cut_shard", "cli", "--model_path {cut_shard}", ("--model_path", "safetensors")),
    Mistake("missing_shard", "cli", "--model_path {missing_shard}", ("--model_path", "safetensors")),
    Mistake("weights_with_nan", "cli", "--model_path {nan}", ("--model_path", "NaN", "weight")),
    Mistake(
        "evaluating_nan", "eval", "--model_path {nan_seeing} --on_bad_sample skip", ("--model_path", "NaN", "weight")
    ),
    Mistake(
        "tokenizer_of_another", "train", "--model_name_or_path {other_tokenizer}", ("tokenizer", "vocabulary|tokens")
    ),
    Mistake(
        "resume_from_nothing", "train", "--resume_from_checkpoint ./nothing", ("--resume_from_checkpoint", "nothing")
    ),
    Mistake("config_list", "train", "--model_name_or_path {listed}", ("--model_name_or_path", r"config\.json")),
    Mistake("config_of_words", "cli", "--model_path {config_words}", ("--model_path", r"config\.json", "n_layer")),
    Mistake("cut_index", "train", "--model_name_or_path {cut_index}", ("--model_name_or_path", r"index\.json", "cut")),
    Mistake("tokenizer_list", "train", "--model_name_or_path {unspoken}", ("--model_name_or_path", "tokenizer")),
    Mistake("half_a_vision", "train", "--model_name_or_path {half_vision}", ("visual settings", r"config\.json")),
    Mistake("long_name", "train", ["--model_name_or_path", "x" * 300], ("--model_name_or_path", "no folder")),
    # --- more flags ---
    Mistake("seed_below_0", "train", "--seed -1", ("--seed", "-1", "0")),
    Mistake("seed_too_large", "train", "--seed 5000000000", ("--seed", "below")),
    Mistake("no_length", "train", "--model_max_length 0", ("--model_max_length", "0", "1")),
    Mistake("scheduler_words", "train", "--lr_scheduler_kwargs [1", ("--lr_scheduler_kwargs", "JSON")),
    Mistake("optimizer_words", "train", "--optim_args fast", ("--optim_args", "=value")),
    Mistake("no_folder_of_images", "train", "--image_folder ./gone", ("--image_folder", "no such folder")),
    Mistake("relative_plugin", "train", "--plugins .parts", ("--plugins", "whole name")),
    Mistake("pushed_to_nobody", "train", "--push_to_hub", ("needs a token of the hub|refused|reach|[Cc]onnect",)),
    # --- data ---
    Mistake("no_data", "train", "--data_path ./nothing.json", ("--data_path", "no such file")),
    Mistake("data_is_a_folder", "train", "--data_path {media}", ("--data_path", "folder|kind|file")),
    Mistake(
        "base64_picture", "train", "--data_path {base64} --vision_tower {tower}", ("sample 'b64'", r"base64\.json")
    ),
    Mistake("base64_picture_checked", "check", "{base64}", ("sample 'b64'",), status=1),
    Mistake("long_number_in_json", "train", "--data_path {long_json}", (r"long\.json", "digits|number")),
    Mistake(
        "no_picture",
        "train",
        "--data_path {no_picture} --vision_tower {tower}",
        ("sample 'x'", r"gone\.png", "no such file"),
    ),
    Mistake("check_nothing", "check", "./nothing.json", ("DATA|nothing.json", "no such file")),
    Mistake("check_workers", "check", "{text} --workers -1", ("--workers", "-1", "0")),
    Mistake("check_frames", "check", "{text} --num_frames many", ("--num_frames", "'many'", "whole number")),
    Mistake("check_report", "check", "{text} --workers 0 --report {media}", ("--report", "folder|director")),
    # --- captioning and evaluation ---
    Mistake("name_with_a_colon", "cli", ["--video", "10:30 clip.mp4"], ("10:30 clip.mp4", "no such file")),
    Mistake("nothing_to_say", "cli", "", ("--video",), without="prompt"),
    Mistake("bits", "cli", "--bits 3", ("--bits", "3", "16")),
    Mistake("tokens", "cli", "--max_new_tokens 0", ("--max_new_tokens", "0", "1")),
    Mistake("beams", "cli", "--num_beams 0", ("--num_beams", "0", "1")),
    Mistake("temperature", "cli", "--temperature -1", ("--temperature", "-1", "0")),
    Mistake("temperature_nan", "cli", "--temperature nan", ("--temperature", "nan", "number")),
    Mistake("seed", "cli", "--seed -1", ("--seed", "-1", "0")),
    Mistake("draw_on_nothing", "cli", "--draw a.png", ("--draw", "--image")),
    Mistake("unknown_in_cli", "cli", "--vidoe a.mp4", ("--vidoe", "did you mean --video")),
    Mistake("abbreviated", "cli", "--promp ciao", ("--promp", "did you mean --prompt")),
    Mistake("plugin", "cli", "--plugins no_such_module", ("--plugins", "no_such_module")),
    Mistake("task", "eval", "--task captions", ("--task|task", "'captions'", "caption")),
    Mistake("no_annotations", "eval", "--data nothing.json", ("--data|nothing.json", "no such file")),
    Mistake("batch", "eval", "--batch_size 0", ("--batch_size", "0", "1")),
    Mistake("timeout", "eval", "--decode_timeout -5", ("--decode_timeout", "-5", "0")),
    Mistake("prompt", "eval", ["--prompt", "{{colour}}"], ("--prompt", "colour")),
    # --- the other commands ---
    Mistake("alternating_variant", "alternating", "--variant zigzag", ("--variant", "'zigzag'", "auto")),
    Mistake("alternating_unknown", "alternating", "--dry_runn", ("--dry_runn", "did you mean --dry_run")),
    Mistake(
        "alternating_steps",
        "alternating",
        "--throughput_log_steps x",
        ("--throughput_log_steps", "'x'", "whole number"),
    ),
    Mistake("alternating_no_steps", "alternating", "--throughput_log_steps 0", ("--throughput_log_steps", "0", "1")),
    Mistake(
        "alternating_backbone",
        "alternating",
        "--init_from_backbone --backbone_model ./nothing",
        ("--backbone_model", "no folder"),
    ),
    Mistake("output_is_full", "random_weights", "--output_dir {media}", ("--output_dir", "empty folder")),
    Mistake("random_seed", "random_weights", "--seed x", ("--seed", "'x'", "whole number")),
    Mistake("below_a_file", "random_weights", "--output_dir {lines}/x", ("--output_dir", "file")),
    Mistake("tokenizer_size", "train_tokenizer", "--vocab_size 3", ("--vocab_size", "3", "257")),
    Mistake("tokenizer_data", "train_tokenizer", "--data ./nothing.txt", ("--data", "no such file")),
    Mistake("tokenizer_below_a_file", "train_tokenizer", "--output_dir {lines}/x", ("--output_dir", "file")),
    Mistake("no_rows", "narratives", "./nothing.jsonl", ("ROWS|nothing.jsonl", "no such file")),
    Mistake("narratives_padding", "narratives", "{lines} --padding wide", ("--padding", "'wide'", "a number")),
    Mistake("narratives_below_a_file", "narratives", "{rows} --out {lines}/x", ("--out", "file")),
    Mistake("webvid_rows", "webvid", "--rows ./nothing.csv", ("--rows", "no such file")),
    Mistake("webvid_count", "webvid", "--max_samples 0", ("--max_samples", "0", "1")),
    Mistake("webvid_word", "webvid", "--max_samples some", ("--max_samples", "'some'", "whole number")),
]
