"""What a run says of its data before the first step, through the command line; and the first steps themselves."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
from conftest import ITALIAN, turns, write_video
from transformers import TrainerCallback

from llava.model.loading import load_model
from llava.model.random_weights import main as random_weights
from llava.train.parts import part_of
from llava.train.train import build_trainer, main


@pytest.fixture
def build(gpt2_dir, tower_dir, tmp_path):
    """A function that makes a trainer, or runs it, on data files (lists of samples by name)."""

    def run(files: dict[str, list[dict]], start=build_trainer, **flags):
        for name, samples in files.items():
            (tmp_path / name).write_text(json.dumps([{"id": i, **sample} for i, sample in enumerate(samples)]))
        values = {
            "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "output_dir": tmp_path / "out",
            "data_path": [tmp_path / name for name in files], "report_to": "none", "use_cpu": "true",
            "disable_tqdm": "true", "save_strategy": "no", "max_steps": 2, **flags,
        }  # fmt: skip
        words = []
        for name, value in values.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return start(words)

    return run


def text(answer: str) -> dict:
    return {"conversations": turns("", answer)}


TEXTS = [text(line) for line in ITALIAN]
PICTURE = {"image": "a.png", "conversations": turns("<image>", ITALIAN[0])}


def test_a_mixture_of_odd_spellings_trains_on_all_of_its_media_and_says_so(build, media_dir, tmp_path, capsys):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    for name in ("a.png", "b.jpg", "a.mp4"):
        shutil.copy(media_dir / name, tmp_path)
    answer = {"role": "assistant", "content": ITALIAN[0]}
    message = {"role": "user", "content": "<image>"}
    features = Features(
        picture_id=Value("string"),
        image=ImageFeature(),
        messages=List({"role": Value("string"), "content": Value("string")}),
    )
    rows = [{"picture_id": "x", "image": (tmp_path / "b.jpg").read_bytes(), "messages": [message, answer]}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "e.parquet")
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "che cos'è?"}]
    files = {
        "a.json": [{"images": ["a.png", "b.jpg"], "conversations": turns("<image><image>", "due")}],
        "b.json": [{"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>"}, answer]}],
        "c.json": [{"messages": [{"role": "user", "content": parts}, answer]}],
        "d.json": [
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, answer], "oddkey": 1}
        ],
    }
    paths = [str(tmp_path / name) for name in (*files, "e.parquet")]
    trainer = build(files, data_path=paths)
    examples = [trainer.train_dataset[i] for i in range(5)]
    assert [[m.kind for m in e.media] for e in examples] == [["image"] * 2, ["video"], ["image"], ["video"], ["image"]]
    printed = capsys.readouterr().out
    for path, counts in zip(paths, ["1 images", "1 videos", "1 images", "1 videos", "1 images"], strict=True):
        assert f"{path}: 1 samples, with {counts} (100.0%)" in printed
    assert f'note: {paths[3]}: nothing reads the key "oddkey", which 1 sample of 1 has' in printed
    assert f"note: {paths[4]}: 1 of 1 samples have no id" in printed


def test_missing_files_end_a_run_before_it_starts_unless_they_are_skipped(build, media_dir, tmp_path, caplog):
    shutil.copy(media_dir / "a.png", tmp_path)
    missing = {"image": "none.png", "conversations": turns("<image>", "x")}
    broken = {"image": "broken.png", "conversations": turns("<image>", "x")}
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = {"a.json": [*TEXTS, PICTURE, missing, missing]}
    with pytest.raises(ValueError, match=r"^sample '6' \(a\.json, sample 7\): .*none\.png: no such file; .*: 2 of 8"):
        build(files)
    (tmp_path / "eval.json").write_text(json.dumps([{"id": "e", **missing}]))
    with pytest.raises(ValueError, match=r"^sample 'e' \(eval\.json, sample 1\): .*1 of 1 samples"):
        build({"a.json": TEXTS}, eval_data_path=tmp_path / "eval.json")
    build(files, check_data="none")
    with caplog.at_level(logging.WARNING):
        build(files, on_bad_sample="skip")
    assert "2 of 8 samples name files that cannot be used and are skipped" in caplog.text
    build({"a.json": [*TEXTS, broken]})
    with pytest.raises(ValueError, match=r"sample '5' .*broken\.png: cannot be read as an image.*--on_bad_sample skip"):
        build({"a.json": [*TEXTS, broken]}, check_data="decode")
    with pytest.raises(ValueError, match="--check_data is 'all'; known: files, decode, none"):
        build(files, check_data="all")


def test_vision_without_media_and_media_without_vision_are_said_at_once(build, media_dir, tmp_path, caplog):
    shutil.copy(media_dir / "a.png", tmp_path)
    with caplog.at_level(logging.WARNING):
        build({"a.json": TEXTS})
    assert "--vision_tower is given, but not one of the 5 samples has an image or a video" in caplog.text
    with pytest.raises(ValueError, match=r"not one of the 5 .* only mm_mlp_adapter would be trained"):
        build({"a.json": TEXTS}, mm_tunable_parts="mm_mlp_adapter")
    with pytest.raises(ValueError, match=r"sample '5' .* as 1 of 6 samples have, but the model has no vision"):
        build({"a.json": [*TEXTS, PICTURE]}, vision_tower=None)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build({"a.json": TEXTS}, vision_tower=None, mm_projector_type="linear")
    assert "flags for vision were given (projector_type), but the model has none" in caplog.text


def test_images_are_not_refused_for_videos_that_are_not_there(build, media_dir, tmp_path):
    shutil.copy(media_dir / "a.png", tmp_path)
    # A video of 4 frames takes 64 tokens, an image 16.
    trainer = build({"a.json": [PICTURE]}, model_max_length=40)
    assert len(trainer.train_dataset[0].input_ids) <= 40


def test_the_first_steps_are_logged_one_by_one_then_as_asked(build):
    trainer = build({"a.json": TEXTS}, main, vision_tower=None, max_steps=26, logging_steps=8, learning_rate=1e-3)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [*range(1, 11), 16, 24, 26]
    assert not any(name.startswith("grad_norm/") for name in trainer.state.log_history[0])  # A single part trains.
    silent = build({"a.json": TEXTS}, main, vision_tower=None, output_dir=str(trainer.args.output_dir) + "2",
                   logging_strategy="no")  # fmt: skip
    assert [entry for entry in silent.state.log_history if "loss" in entry] == []
    other = build({"a.json": TEXTS}, vision_tower=None, output_dir=str(trainer.args.output_dir) + "3")
    assert other.args.logging_steps == 10


def test_the_gradient_norm_of_each_part_is_that_of_the_gradient_before_it_is_clipped(build, media_dir, tmp_path):
    shutil.copy(media_dir / "a.png", tmp_path)
    seen: dict[str, float] = {}

    class Watch(TrainerCallback):
        """The norms from the gradients by themselves, where nothing clips them."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
            for name, parameter in model.named_parameters():
                if state.global_step == 0 and parameter.grad is not None:
                    seen[part_of(name)] = seen.get(part_of(name), 0.0) + float(parameter.grad.norm() ** 2)

    whole = build({"a.json": [PICTURE]}, build_trainer, max_grad_norm=0, max_steps=12, logging_steps=5)
    whole.add_callback(Watch())
    whole.train()
    clipped = build({"a.json": [PICTURE]}, main, max_grad_norm=1e-3, max_steps=1, output_dir=str(tmp_path / "clipped"))
    lines = [entry for entry in whole.state.log_history if "loss" in entry]
    parts = {part: lines[0][f"grad_norm/{part}"] for part in seen}
    assert set(parts) == {"mm_mlp_adapter", "mm_language_model"}
    assert parts == pytest.approx({part: math.sqrt(square) for part, square in seen.items()}, rel=1e-4)
    assert parts == pytest.approx({part: clipped.state.log_history[0][f"grad_norm/{part}"] for part in seen}, rel=1e-4)
    for line in lines:
        assert math.hypot(*(line[f"grad_norm/{part}"] for part in seen)) == pytest.approx(line["grad_norm"], rel=1e-4)


def test_text_that_is_cut_is_told_before_training_and_in_the_log(build, tmp_path, capsys):
    trainer = build({"a.json": [text(" ".join(ITALIAN)), text("ciao")]}, main, vision_tower=None, model_max_length=30)
    cut = len(trainer.processing_class(" ".join(ITALIAN))["input_ids"]) + 1 - 30
    assert f"{tmp_path / 'a.json'}: 1 of 2 samples lose {cut} tokens" in capsys.readouterr().out
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (losses[-1]["cut_samples"], losses[-1]["cut_tokens"]) == (2, 2 * cut)


def test_what_chunking_leaves_whole_is_counted_where_it_is_cut(build, media_dir, tmp_path, capsys):
    shutil.copy(media_dir / "a.png", tmp_path)
    long = " ".join(ITALIAN)
    picture = {"image": "a.png", "conversations": turns("<image>", long)}
    trainer = build({"a.json": [text(long), picture]}, main, model_max_length=40, text_chunking="document", max_steps=4)
    cut = trainer.train_dataset.documents.lengths[1] - 40
    assert "1 text longer than 40 tokens is trained in" in (printed := capsys.readouterr().out)
    assert f"{tmp_path / 'a.json'}: 1 of 2 samples lose {cut} tokens" in printed
    assert "text with images, videos or coordinates is not chunked" in printed
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (losses[-1]["cut_samples"], losses[-1]["cut_tokens"]) == (4, 4 * cut)
    assert cut > 10


def test_what_only_decoding_shows_to_be_cut_is_counted(build, tmp_path):
    write_video(tmp_path / "a.mp4", num_frames=60)
    long = " ".join(ITALIAN)
    sample = {"video": "a.mp4", "conversations": turns("<video>", long)}
    flags = {"video_fps": 25, "frames_upbound": 0, "mm_resampler_type": "spatial_pool", "mm_spatial_pool_stride": 2}
    length = len(build({"a.json": [sample]}, **flags).train_dataset[0].input_ids)
    shutil.rmtree(tmp_path / "out")
    trainer = build({"a.json": [sample]}, main, model_max_length=length - 5, **flags)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (losses[-1]["cut_samples"], losses[-1]["cut_tokens"]) == (2, 10)


class TestTokenizers:
    def test_a_folder_without_a_tokenizer_is_named(self, gpt2_dir, tmp_path):
        for name in ("config.json", "model.safetensors"):
            shutil.copy(gpt2_dir / name, tmp_path)
        with pytest.raises(ValueError, match=rf"no tokenizer can be read from '{tmp_path}': it has no vocabulary; put"):
            load_model(str(tmp_path))

    def test_random_weights_need_one(self, gpt2_dir, tmp_path, capsys):
        shutil.copy(gpt2_dir / "config.json", tmp_path)
        assert random_weights(["--model_path", str(tmp_path), "--output_dir", str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --model_path: no tokenizer can be read from ")
        assert error.endswith("or name a folder that has one with --tokenizer\n")
        assert not (tmp_path / "new").exists()

    def change(self, source: Path, folder: Path, **entries) -> str:
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    def test_another_model_s_is_named(self, gpt2_dir, tmp_path, caplog):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(gpt2_dir)
        config.vocab_size = 5000
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
        for file in gpt2_dir.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "wide")
        with caplog.at_level(logging.WARNING):
            load_model(str(tmp_path / "wide"))
        assert "has 383 tokens, but the model has embeddings for 5000: if it is another model's" in caplog.text
        other = self.change(tmp_path / "wide", tmp_path / "other", eos_token_id=4999)
        with pytest.raises(
            ValueError, match=r"383 tokens, .* for 5000, and eos_token_id 0, where its config\.json has 4999"
        ):
            load_model(other)

    def test_ids_beyond_the_embeddings_are_an_error(self, gpt2_dir, tmp_path):
        folder = Path(self.change(gpt2_dir, tmp_path / "sparse"))
        entries = json.loads((folder / "tokenizer.json").read_text())
        token, _ = entries["model"]["vocab"].popitem()
        entries["model"]["merges"] = [pair for pair in entries["model"]["merges"] if "".join(pair) != token]
        entries["model"]["vocab"][token] = 9000
        (folder / "tokenizer.json").write_text(json.dumps(entries))
        with pytest.raises(
            ValueError, match="has 383 tokens with ids up to 9000, but the model has embeddings for 383"
        ):
            load_model(str(folder))

    def test_one_that_does_not_know_the_text_ends_a_run_before_it_starts(self, build, gpt2_dir, tmp_path):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {word: i for i, word in enumerate(["<eos>", "<unk>", *(f"word{i}" for i in range(381))])}
        raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        folder = self.change(gpt2_dir, tmp_path / "english")
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
        with pytest.raises(ValueError, match=r"does not know 100% of the text of the data"):
            build({"a.json": TEXTS}, model_name_or_path=folder, vision_tower=None)
