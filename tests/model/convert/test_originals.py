"""Checkpoints of LLaVA-1.5 and LLaVA-NeXT: read as they are, they compute what the originals' own code computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llava.model.vocabulary import load_tokenizer


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece can read the file")
def test_tokenizer_that_needs_sentencepiece_is_named(tmp_path: Path):
    # What the published LLaVA-1.5 has: no tokenizer.json.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match=r"tokenizer\.model, which .* \(pip install sentencepiece protobuf\)"):
        load_tokenizer(str(tmp_path))
