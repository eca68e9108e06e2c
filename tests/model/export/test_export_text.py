"""``python -m llava.model.export --as text``: plain language models, equal on text to their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava.constants import VISUAL_TOKENS
from llava.model.export.__main__ import main
from llava.model.loading import load_model
from tests.conftest import FAMILIES, TINY_BACKBONES

TEXT = "Il gatto dorme sul divano: è così, e il cane guarda la strada."


def save(loaded: Any, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module) -> None:
    """Embeddings that differ from row to row: new ones are all the mean of the others."""
    torch.manual_seed(1)
    for parameter in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture(scope="module")
def checkpoint(load_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_tiny()
    randomize(loaded.model)
    return save(loaded, tmp_path_factory.mktemp("checkpoint"))


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    return model.float().eval()(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_becomes_its_plain_class(name: str, load_tiny: Any, tmp_path: Path) -> None:
    loaded = load_tiny(name)
    randomize(loaded.model)
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == TINY_BACKBONES[name][0]
    assert [key for key in config if key.startswith(("mm_", "llava"))] == []
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == model.config.vocab_size == len(loaded.tokenizer) - len(VISUAL_TOKENS)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == loaded.tokenizer(TEXT)["input_ids"]
    expected = logits_of(loaded.model, ids)[:, : len(tokenizer)]
    torch.testing.assert_close(logits_of(model, ids), expected, atol=0, rtol=0)


def test_the_tokenizer_loads_under_transformers_4(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(checkpoint), str(out), "--as", "text"]) == 0
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    # 4 expects a mapping under the first name, and gives GPT-2 token types without the second.
    assert "extra_special_tokens" not in settings
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded = tokenizer(TEXT, return_offsets_mapping=True)
    assert set(encoded) == {"input_ids", "attention_mask", "offset_mapping"}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert not set(VISUAL_TOKENS) & set(tokenizer.get_vocab())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


def test_rotary_settings_are_told_by_their_old_names_too(load_tiny: Any, tmp_path: Path) -> None:
    loaded = load_tiny("llava_llama")
    loaded.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 123456.0}
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 123456.0
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 123456.0


def test_tables_of_coordinates_go(load_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_tiny(grounding="lape", num_temporal_tokens=5, num_spatial_tokens=4)
    randomize(loaded.model)
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text"]) == 0
    said = capsys.readouterr().out
    assert "tables of coordinates" in said
    assert "the removed tokens had at most" in said
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<TEMP-000>" not in tokenizer.get_vocab()
    ids = tokenizer(TEXT)["input_ids"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits_of(loaded.model, ids)[:, : len(tokenizer)]
    torch.testing.assert_close(logits_of(exported, ids), expected, atol=0, rtol=0)


def test_tokens_that_others_follow_are_kept_and_never_generated(
    load_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_tiny(grounding="placeholder")
    randomize(loaded.model)
    visual = sorted(loaded.vision.token_ids.values())
    # What it would say next if it could: the head is tied.
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[visual] *= 50
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text"]) == 0
    assert "kept: <im_start>" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.vocab_size == loaded.model.config.vocab_size
    ids = torch.tensor([[5, 6, 7]])
    answer = exported.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert not set(answer[0, 3:].tolist()) & set(visual)
    assert "<WIDTH-INPUT>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@pytest.mark.parametrize("variant", ["alternating", "alternating_cross"])
def test_alternating_attention_is_plain_on_text(variant: str, load_tiny: Any, tmp_path: Path) -> None:
    loaded = load_tiny("llava_llama", variant=variant)
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text"]) == 0
    ids = loaded.tokenizer(TEXT)["input_ids"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits_of(loaded.model, ids)[:, : exported.config.vocab_size]
    torch.testing.assert_close(logits_of(exported, ids), expected, atol=1e-6, rtol=1e-5)


def test_adapters_are_merged_and_the_dtype_is_that_asked_for(gpt2_dir: Path, tower_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from llava.model.lora import add_adapters

    loaded = load_model(str(gpt2_dir), vision_tower=str(tower_dir))
    add_adapters(loaded.model, str(gpt2_dir), 2, 8, 0.0)
    torch.manual_seed(4)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save(loaded, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text", "--dtype", "bfloat16"]) == 0
    assert "the checkpoint's, with weights in bfloat16, by at most" in (tmp_path / "out" / "export.json").read_text()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    ids = loaded.tokenizer(TEXT)["input_ids"]
    expected = logits_of(loaded.model, ids)[:, : exported.config.vocab_size]
    torch.testing.assert_close(logits_of(exported, ids), expected, atol=0.02, rtol=0.02)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(gpt2_dir), ids)
    assert (expected - plain[:, : expected.shape[1]]).abs().max() > 0.05, "the adapters do something"


def test_a_tower_that_is_gone_is_not_missed(load_tiny: Any, tmp_path: Path) -> None:
    save(load_tiny(), tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"mm_vision_tower": "/nowhere"}))
    assert main([str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--as", "text"]) == 0


def test_what_is_in_the_way_stays(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(out: Path, *flags: str) -> str:
        status = main([str(checkpoint), str(out), "--as", "text", *flags])
        return capsys.readouterr().err if status else ""

    assert "is the checkpoint itself" in run(checkpoint, "--overwrite")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("all my work")
    assert "is not empty" in run(other)
    assert "has no export.json" in run(other, "--overwrite")
    assert (other / "thesis.tex").read_text() == "all my work"
    out = tmp_path / "out"
    assert run(out) == ""
    assert "is not empty" in run(out)
    (out / "notes.txt").write_text("")
    assert "holds notes.txt beside the export" in run(out, "--overwrite")
    (out / "notes.txt").unlink()
    told = json.loads((out / "export.json").read_text())
    # An earlier export of another kind, whose files go.
    (out / "old.py").write_text("")
    (out / "export.json").write_text(json.dumps({**told, "files": [*told["files"], "old.py"]}))
    assert run(out, "--overwrite") == ""
    assert not (out / "old.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_an_export_that_differs_is_not_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava.model.export import text

    resize = text.PreTrainedModel.resize_token_embeddings

    def damage(model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.get_input_embeddings().weight[3:] *= 2
        return resize(model, *args, **kwargs)

    monkeypatch.setattr(text.PreTrainedModel, "resize_token_embeddings", damage)
    assert main([str(checkpoint), str(tmp_path / "out"), "--as", "text"]) == 2
    assert "differ from the checkpoint's by up to" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
