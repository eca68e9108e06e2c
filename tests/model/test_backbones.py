"""transformers' Auto classes on this library's checkpoints, and the text classifiers on them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import llava.model as models
from llava.model import AVAILABLE_MODELS, BACKBONES
from llava.model.loading import load_model
from tests.conftest import FAMILIES

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
{first}
import llava.model
loaded = [name for name in sys.modules if name.startswith(("torch.", "transformers.", "llava.model.language_model"))]
assert {eager} or not loaded, loaded[:5]
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
    AutoModelForSequenceClassification, AutoModelForTokenClassification)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
assert "llava.model.language_model" not in sys.modules
for model_type, (config, decoder, language_model) in llava.model.AVAILABLE_MODELS.items():
    found = AutoConfig.for_model(model_type)
    assert type(found).__name__ == config, model_type
    prefix = language_model.removesuffix("ForCausalLM")
    for auto, name in ((AutoModel, decoder), (AutoModelForCausalLM, language_model),
        (AutoModelForImageTextToText, language_model),
        (AutoModelForSequenceClassification, prefix + "ForSequenceClassification"),
        (AutoModelForTokenClassification, prefix + "ForTokenClassification")):
        assert auto._model_mapping[type(found)].__name__ == name, (model_type, auto)
print(len(llava.model.AVAILABLE_MODELS))
"""


@pytest.mark.parametrize("first", ["", "from transformers import AutoModel, AutoTokenizer"], ids=["before", "after"])
def test_every_model_type_is_known_once_llava_model_is_imported(first: str, warm_python: str) -> None:
    """Before transformers and after it, and without loading a backbone's file."""
    python = warm_python if first else sys.executable
    done = subprocess.run(
        [python, "-c", PROGRAM.format(first=first, eager=bool(first))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(BACKBONES) * len(models.VARIANTS)


# The variants of all families are derived in one place: each family has one of them, in turn.
MODEL_TYPES = [
    models.variant_type(name, kind)
    for name, variant in zip(FAMILIES, cycle(kind for kind in models.VARIANTS if kind != "base"), strict=False)
    for kind in ("base", variant)
]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def checkpoint(request, backbone_dirs, tower_dir, tmp_path_factory) -> tuple[str, Path, models.Any]:
    """A checkpoint with vision, by its model type, its folder and what was saved."""
    model_type = request.param
    backbone, variant = models.split_type(model_type)
    folder = tmp_path_factory.mktemp(model_type)
    torch.manual_seed(1)
    loaded = load_model(
        str(backbone_dirs[backbone]),
        vision_tower=str(tower_dir),
        variant=variant,
    )
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return model_type, folder, loaded


IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def test_auto_classes_load_a_checkpoint(checkpoint) -> None:
    model_type, folder, loaded = checkpoint
    assert AutoConfig.from_pretrained(folder).model_type == model_type
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == loaded.tokenizer.get_vocab()
    saved = loaded.model.eval()
    images = torch.rand(1, 3, 56, 56)
    ids = torch.tensor([[5, *[saved.vision.visual_token_ids[0]] * saved.vision.layout.num_tokens("image", 1), 7]])
    expected = saved(input_ids=ids, images=images).logits
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        found = auto.from_pretrained(folder).eval()
        assert type(found) is type(saved)
        torch.testing.assert_close(found(input_ids=ids, images=images).logits, expected)
    decoder = AutoModel.from_pretrained(folder).eval()
    assert type(decoder).__name__ == AVAILABLE_MODELS[model_type][1]
    ours = saved.get_model()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(decoder.get_parameter(name), parameter, msg=name)
    assert not any(parameter.requires_grad for parameter in decoder.vision_tower.parameters())


@torch.no_grad()
def test_classifiers_are_the_text_model_with_a_fresh_head(checkpoint, tmp_path, caplog, monkeypatch) -> None:
    _, folder, loaded = checkpoint
    hidden = loaded.model.eval().get_model()(input_ids=IDS).last_hidden_state
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for auto, ending in (
        (AutoModelForSequenceClassification, "ForSequenceClassification"),
        (AutoModelForTokenClassification, "ForTokenClassification"),
    ):
        caplog.clear()
        found = auto.from_pretrained(folder, num_labels=3).eval()
        plain = getattr(transformers, _plain_prefix(loaded.model) + ending, None)
        assert plain is None or isinstance(found, plain)
        assert not [name for name, _ in found.named_modules() if "vision" in name or "mm_projector" in name]
        assert not [text for text in caplog.messages if "vision_tower" in text or "mm_projector" in text]
        body = getattr(found, found.base_model_prefix)
        torch.testing.assert_close(body(input_ids=IDS).last_hidden_state, hidden)
        assert found(input_ids=IDS).logits.shape[-1] == 3
        found.save_pretrained(tmp_path / ending)
        again = auto.from_pretrained(tmp_path / ending).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, found(input_ids=IDS).logits)


def _plain_prefix(model: torch.nn.Module) -> str:
    decoder = model.get_model()
    plain = next(base for base in type(decoder).__mro__ if base.__module__.startswith("transformers."))
    return plain.__name__.removesuffix("Model")


UNPICKLE = """
import pickle, sys
import llava.model
config, *classes = pickle.loads(sys.stdin.buffer.read())
assert type(config).__name__ == "LlavaGPT2AlternatingConfig" and config.n_layer == 3
from llava.model.language_model import llava_gpt2
for found in classes:
    assert found is getattr(llava.model, found.__name__) is getattr(llava_gpt2, found.__name__), found
"""


def test_derived_classes_stay_when_another_family_is_registered() -> None:
    variant = models.LlavaLlamaAlternatingForCausalLM
    # As the first look at another family's class does.
    models.register_backbone(models.LlavaGPT2ForCausalLM)
    assert pickle.loads(pickle.dumps(variant)) is variant is models.LlavaLlamaAlternatingForCausalLM


def test_derived_classes_are_found_by_name_in_any_process(warm_python: str) -> None:
    """Those with alternating attention and the classifiers, which no file writes out."""
    from llava.model.language_model import llava_gpt2, llava_llama
    from llava.model.language_model.llava_gpt2 import LlavaGPT2AlternatingConfig, LlavaGPT2AlternatingForCausalLM

    endings = ("Config", "Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    names = [f"LlavaGPT2{infix}{ending}" for infix in models.VARIANTS.values() for ending in endings]
    classes = [getattr(models, name) for name in names]
    assert classes == [getattr(llava_gpt2, name) for name in names]
    assert LlavaGPT2AlternatingForCausalLM.config_class is LlavaGPT2AlternatingConfig
    pickled = pickle.dumps([LlavaGPT2AlternatingConfig(n_layer=3), *classes])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([warm_python, "-c", UNPICKLE], input=pickled, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for module in (models, llava_llama):
        for name in ("LlavaGPT3AlternatingConfig", "LlavaGPT2AlternatingModul"):
            with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
                getattr(module, name)


@pytest.mark.parametrize("model_type", sorted(AVAILABLE_MODELS))
def test_configurations_have_the_familys_defaults(model_type: str, tmp_path: Path) -> None:
    """LLaVA's own: greedy, with at most 1,024 new tokens. They neither stop a save nor stand in its files."""
    config = AutoConfig.for_model(model_type)
    assert (config.temperature, config.max_new_tokens, config.do_sample, config.top_p) == (0.0, 1024, False, None)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"temperature", "max_new_tokens", "do_sample", "top_p"} & set(stored)
    assert AutoConfig.from_pretrained(tmp_path).max_new_tokens == 1024
    config.temperature = 0.7
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)
