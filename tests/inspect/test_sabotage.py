"""Recipes that would ruin a run, each in its own way: an inspection names what is wrong, and ends with status 1."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ITALIAN, turns
from looking import FLAGS, Look, make_look
from torch import Tensor
from transformers import AutoTokenizer

from llava.data.formats import FORMATS
from llava.data.formats.base import PlainFormat, Segment
from llava.model.multimodal_resampler import RESAMPLERS
from llava.model.multimodal_resampler.token_packer import TokenPacker
from llava.token_layout import RESAMPLER_SETTINGS, FastSlowSettings
from llava.types import MediaKind


@pytest.fixture
def look(gpt2_dir, tower_dir, mixed_data, tmp_path, capsys) -> Look:
    return make_look(gpt2_dir, tower_dir, mixed_data, tmp_path, capsys)


def findings_of(text: str) -> list[str]:
    return text.rpartition("findings\n")[2].splitlines()


def expect(result: tuple[int, str], *sentences: str) -> None:
    """The status is 1, and one finding of an error has all of the sentences."""
    status, text = result
    errors = [line for line in findings_of(text) if line.startswith("  error: ")]
    assert status == 1, text
    assert any(all(sentence in line for sentence in sentences) for line in errors), text


def test_the_good_recipe_passes(look) -> None:
    status, text = look()
    assert status == 0, text
    assert not [line for line in findings_of(text) if "error: " in line or "warning: " in line], text
    assert "nothing that would ruin this run" in text
    assert "video, fast, another sample's" in text
    assert "image, the whole image, zeros" in text
    assert "2 of text alone" in text


class LearnsSpans(PlainFormat):
    """A format of somebody's own that forgets to say what is visual."""

    def encode(self, turns) -> list[Segment]:
        return [replace(segment, visual=False) for segment in super().encode(turns)]


class LearnsNothing(PlainFormat):
    """A format of somebody's own whose every label is masked."""

    def encode(self, turns) -> list[Segment]:
        return [replace(segment, supervised=False) for segment in super().encode(turns)]


class LearnsNoEnd(PlainFormat):
    """A format of somebody's own that learns no end."""

    def encode(self, turns) -> list[Segment]:
        *first, last = super().encode(turns)
        return [*first, replace(last, supervised=False)]


def test_1_visual_tokens_are_supervised(look, monkeypatch) -> None:
    monkeypatch.setitem(FORMATS._parts, "learns_spans", LearnsSpans)
    expect(look(version="learns_spans"), "visual_supervised: ", "visual tokens have labels", "must be -100")


def test_2_all_labels_are_masked(look, monkeypatch) -> None:
    monkeypatch.setitem(FORMATS._parts, "learns_nothing", LearnsNothing)
    expect(look(version="learns_nothing"), "nothing_supervised: ", "samples have no label", "take a --version")


def test_the_end_is_not_learned(look, monkeypatch) -> None:
    monkeypatch.setitem(FORMATS._parts, "learns_no_end", LearnsNoEnd)
    status, text = look(version="learns_no_end")
    assert (status, "warning: end_not_learned" in text) == (0, True), text


@dataclass(frozen=True)
class Settings(FastSlowSettings):
    """Those of the TokenPacker."""


class ForgetsFast(TokenPacker):
    """A resampler of somebody's own whose fast tokens say nothing."""

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        tokens = super().resample(features, kind)
        if kind == "image":
            return tokens
        fast = features.shape[1] * self.settings.perceiver_latents_fast
        return torch.cat([torch.zeros_like(tokens[:, :fast]), tokens[:, fast:]], dim=1)


class FixedFast(ForgetsFast):
    """One whose fast tokens are the same for every clip, and not zeros."""

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        tokens = super().resample(features, kind)
        fast = features.shape[1] * self.settings.perceiver_latents_fast
        return tokens if kind == "image" else torch.cat([tokens[:, :fast] + 0.5, tokens[:, fast:]], dim=1)


@pytest.mark.parametrize(("part", "change"), [(ForgetsFast, "to zeros"), (FixedFast, "to another sample's")])
def test_3_the_fast_stream_is_disconnected(look, monkeypatch, part, change: str) -> None:
    monkeypatch.setitem(RESAMPLER_SETTINGS._parts, "forgetful", Settings)
    monkeypatch.setitem(RESAMPLERS._parts, "forgetful", part)
    result = look(mm_resampler_type="forgetful")
    expect(result, "stream_disconnected: ", "the fast stream of a video", change)
    assert "warning: no_gradient: all 27 tensors of vision_resampler.fast " in result[1], result[1]


class HasUnused(TokenPacker):
    """A resampler of somebody's own with a layer that it does not use."""

    def __init__(self, vision, hidden_size: int) -> None:
        super().__init__(vision, hidden_size)
        self.forgotten = torch.nn.Linear(2, 2)


class Fails(TokenPacker):
    """A resampler of somebody's own that cannot compute."""

    def resample(self, features: Tensor, kind: MediaKind) -> Tensor:
        return features @ features.new_ones(3, 3)


@pytest.mark.parametrize(
    ("part", "sentences"),
    [
        (HasUnused, ("no_gradient: 2 of ", "vision_resampler.forgotten.bias", "use them in the model's forward")),
        (Fails, ("step_failed: a step ends with RuntimeError: ",)),
    ],
)
def test_a_part_that_cannot_learn(look, monkeypatch, part, sentences: tuple[str, ...]) -> None:
    monkeypatch.setitem(RESAMPLER_SETTINGS._parts, "forgetful", Settings)
    monkeypatch.setitem(RESAMPLERS._parts, "forgetful", part)
    expect(look(mm_resampler_type="forgetful"), *sentences)


def test_a_caption_before_its_clip_learns_nothing_of_it(look, media_dir) -> None:
    path = media_dir / "behind.json"
    samples = [{"id": n, "video": n, "conversations": turns("", f"{ITALIAN[0]} <video>")} for n in ("a.mp4", "b.mp4")]
    path.write_text(json.dumps(samples))
    result = look(data_path=path)
    expect(result, "media_behind_text: 2 of 2 samples", "put <image> or <video> before the text")


def test_4_the_context_is_too_small_for_a_clip(look) -> None:
    expect(look(model_max_length=30), "refused: ", "a video of 3 frames takes", "raise --model_max_length")


def test_4_the_context_is_too_small_for_the_text(look, tmp_path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{' '.join([text] * 5)}\n" for text in ITALIAN))
    vision = dict.fromkeys(("vision_tower", *(name for name in FLAGS if name.startswith("mm_"))))
    result = look(model_max_length=32, data_path=path, **vision)
    expect(result, "context_too_small: ", "of its words", "raise --model_max_length", "--text_chunking document")
    assert " cut: " in result[1]
    status, text = look(model_max_length=32, data_path=path, text_chunking="document", **vision)
    assert status == 0, text


def test_5_the_projector_is_frozen_by_mistake(look) -> None:
    result = look(mm_tunable_parts="mm_vision_resampler,mm_language_model")
    expect(result, "frozen_random: ", "mm_mlp_adapter is not in", "add mm_mlp_adapter to --mm_tunable_parts")
    status, text = look("--accept", "frozen_random", mm_tunable_parts="mm_vision_resampler,mm_language_model")
    assert (status, "warning: frozen_random" in text) == (0, True), text


@pytest.fixture
def write_clips(mixed_data, tmp_path):
    """Writes data whose clips stand under a key."""

    def write(key: str, value: str) -> Path:
        path = tmp_path / "data.json"
        samples = [{"id": str(i), key: value, "conversations": turns("", text)} for i, text in enumerate(ITALIAN)]
        path.write_text(json.dumps(samples))
        return path

    return write


def test_6_media_under_a_key_that_nobody_reads(look, write_clips) -> None:
    # One that looks like media is refused by the trainer itself.
    expect(look(data_path=write_clips("clip_path", "a.mp4")), "refused: ", '"clip_path"', "trained on blind")
    expect(
        look(data_path=write_clips("riferimento", "00017")), "media_unread: ", '"riferimento"', "would be trained blind"
    )


def test_6_one_file_of_several_has_its_media_under_another_key(look, write_clips, mixed_data) -> None:
    other = write_clips("riferimento", "00017")
    status, text = look("--fast", "--data_path", str(mixed_data), str(other), data_path=None)
    assert status == 0, text
    assert f"warning: media_unread: {other}: none of its 5 samples has an image or a video" in text
    assert 'its keys "riferimento"' in text


@pytest.fixture(scope="session")
def trained_dir(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2, which has learned the Italian sentences."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("trained")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2_dir), AutoTokenizer.from_pretrained(gpt2_dir)
    rows = [torch.tensor([tokenizer(text).input_ids]) for text in ITALIAN]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        for row in rows:
            model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_7_the_tokenizer_is_another_models(look, trained_dir, tmp_path) -> None:
    assert look(model_name_or_path=trained_dir)[0] == 0
    other = shutil.copytree(trained_dir, tmp_path / "other")
    # As many tokens, and every one of them under another id: nothing but the model can tell.
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    first, *rest = sorted(vocabulary, key=vocabulary.get)
    stored["model"]["vocab"] = {token: i for i, token in enumerate([first, *reversed(rest)])}
    (other / "tokenizer.json").write_text(json.dumps(stored))
    expect(look(model_name_or_path=other), "tokenizer: ", "less probable than a blind guess", "another model's")


def test_7_the_tokenizer_has_more_tokens(look, gpt2_dir, tmp_path) -> None:
    other = shutil.copytree(gpt2_dir, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"parola{i}" for i in range(200)])
    tokenizer.save_pretrained(other)
    expect(look(model_name_or_path=other), "refused: ", "but the model has embeddings for")


@pytest.fixture
def checkpoint(load_tiny, tmp_path) -> Path:
    """A multimodal checkpoint, without its tower's weights."""
    loaded = load_tiny()
    loaded.model.save_pretrained(tmp_path / "checkpoint")
    loaded.tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("mean", "std", "sentence"),
    [
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "was made with mean (0.485, 0.456, 0.406)"),
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "are of another scale"),
    ],
)
def test_8_the_towers_mean_and_deviation_are_wrong(look, checkpoint, mean, std, sentence: str) -> None:
    settings = json.loads((checkpoint / "config.json").read_text())
    settings |= {"mm_image_mean": mean, "mm_image_std": std}
    (checkpoint / "config.json").write_text(json.dumps(settings))
    flags = dict.fromkeys(("vision_tower", *(name for name in FLAGS if name.startswith("mm_"))))
    expect(look(model_name_or_path=checkpoint, **flags), "tower_statistics: ", sentence, "mm_image_mean")
