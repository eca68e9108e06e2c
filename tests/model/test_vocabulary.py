"""Rows for new tokens in embeddings and head, and the special tokens that configurations speak of."""

from __future__ import annotations

import json
import shutil
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llava.model.loading import load_model
from llava.model.vocabulary import grow_vocabulary
from llava.serve.generate import Captioner, Request

KNOWN, NEW = 20, 4


def build(rows: int, tied: bool):
    """A model of so many rows, whose first twenty are those of its tokenizer."""
    torch.manual_seed(1)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if tied:
        return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, **ids)).eval()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=False, **sizes, **ids)).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [KNOWN, KNOWN + 1, KNOWN + NEW - 1, KNOWN + NEW, KNOWN + NEW + 1, KNOWN + 40])
def test_there_are_rows_for_all_new_tokens_and_they_are_means_of_real_ones(rows: int, tied: bool) -> None:
    """With none too few, one too few, as many as are wanted, and some to spare."""
    model = build(rows, tied)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for table in tables:  # Spare rows hold what nobody trained.
            table.weight[KNOWN:] = 1e6
    before = [table.weight.clone() for table in tables]
    ids = torch.arange(KNOWN).unsqueeze(0)
    logits = model(ids).logits[..., :KNOWN]
    grow_vocabulary(model, range(KNOWN, KNOWN + NEW))
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for table, old in zip(tables, before, strict=True):
        assert len(table.weight) == max(rows, KNOWN + NEW)
        torch.testing.assert_close(table.weight[:KNOWN], old[:KNOWN], rtol=0, atol=0)
        mean = old[:KNOWN].mean(0)
        for new in range(KNOWN, KNOWN + NEW):
            torch.testing.assert_close(table.weight[new], mean)
        torch.testing.assert_close(table.weight[KNOWN + NEW :], old[KNOWN + NEW :], rtol=0, atol=0)
    assert model.config.vocab_size == max(rows, KNOWN + NEW)
    assert (tables[0].weight is tables[1].weight) == tied
    torch.testing.assert_close(model(ids).logits[..., :KNOWN], logits)


def test_without_new_tokens_nothing_changes() -> None:
    model = build(KNOWN, True)
    before = model.get_input_embeddings().weight
    grow_vocabulary(model, [])
    assert model.get_input_embeddings().weight is before


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def test_configurations_speak_of_the_tokenizers_special_tokens(gpt2_dir: Path, tower_dir: Path, tmp_path: Path) -> None:
    """GPT-2's own ids, 50256, lie outside of an Italian vocabulary; a run that ends there never ends."""
    base = tmp_path / "base"
    shutil.copytree(gpt2_dir, base)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((base / name).read_text()) | {key: 300 + i for i, key in enumerate(SPECIAL)}
        (base / name).write_text(json.dumps(content))
    tokenizer_config = json.loads((base / "tokenizer_config.json").read_text())
    pad = "Ġgatto"
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"pad_token": pad}))
    loaded = load_model(str(base), vision_tower=str(tower_dir))
    expected = [loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id]
    assert expected[:2] == [0, 0]
    assert expected[2] not in (0, None, 302)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    for config in (loaded.model.config, loaded.model.generation_config, again.model.generation_config):
        assert [getattr(config, name) for name in SPECIAL] == expected
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "saved" / name).read_text())
        assert [saved[key] for key in SPECIAL] == expected, name


@pytest.mark.parametrize("fails", [False, True])
def test_beams_leave_the_vocabulary_size_as_it_was(load_tiny, monkeypatch, fails: bool) -> None:
    """While they run it counts the bins too; a model that is saved afterwards must not."""
    captioner = Captioner(load_tiny(grounding="lape"), "cpu")
    model, sizes = captioner.model, []
    size = model.config.vocab_size
    forward = type(model).forward

    @wraps(forward)
    def record(self, *args, **kwargs):
        sizes.append(self.config.vocab_size)
        if fails:
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", record)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            captioner.answer([Request([], "il gatto")], num_beams=3, max_new_tokens=3)
    else:
        captioner.answer([Request([], "il gatto")], num_beams=3, max_new_tokens=3)
    grounding = captioner.grounding
    assert set(sizes) == {grounding.first_bin + grounding.total_bins}
    assert grounding.first_bin + grounding.total_bins > size == model.config.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == size
