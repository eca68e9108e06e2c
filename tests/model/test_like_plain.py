"""Every backbone answers calls that know nothing of media as the plain class does, or refuses them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava.model import BACKBONES
from llava.model.loading import load_model
from tests.conftest import FAMILIES, TINY_BACKBONES

IDS = torch.tensor([[5, 6, 7, 8, 9, 20, 30]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def embed(model: Any) -> torch.Tensor:
    return model.get_input_embeddings()(IDS)


CALLS: dict[str, Callable[[Any], Any]] = {
    "labels": lambda model: model(IDS, labels=IDS, use_cache=False).to_tuple(),
    "tuple": lambda model: model(IDS, labels=IDS, return_dict=False, use_cache=False),
    "tuple without labels": lambda model: model(IDS, return_dict=False, use_cache=False),
    "generate": lambda model: (model.generate(IDS, **GREEDY),),
    "generate from embeddings": lambda model: (model.generate(inputs_embeds=embed(model), **GREEDY),),
    "generate from both": lambda model: (model.generate(IDS, inputs_embeds=embed(model), **GREEDY),),
    "beams from embeddings": lambda model: (model.generate(inputs_embeds=embed(model), num_beams=2, **GREEDY),),
    "without the cache": lambda model: (model.generate(inputs_embeds=embed(model), use_cache=False, **GREEDY),),
    "with an assistant": lambda model: (model.generate(IDS, assistant_model=model, **GREEDY),),
    "with prompt lookup": lambda model: (model.generate(IDS, prompt_lookup_num_tokens=2, **GREEDY),),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_text_model_answers_as_the_plain_class(name: str, backbone_dirs: dict[str, Path]) -> None:
    folder = str(backbone_dirs[name])
    plain, own = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(folder).model.eval()
    for what, call in CALLS.items():
        try:
            expected = call(plain)
        except (ValueError, RuntimeError) as error:  # MPT has no cache that an assistant could wind back.
            with pytest.raises(type(error), match=re.escape(str(error))):
                call(own)
            continue
        found = call(own)
        assert len(found) == len(expected), what
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=what)


@torch.no_grad()
def test_a_configuration_may_ask_for_tuples(llama_dir: Path) -> None:
    model = load_model(str(llama_dir)).model.eval()
    expected = model(IDS, labels=IDS, use_cache=False).to_tuple()
    model.config.return_dict = False
    found = model(IDS, labels=IDS, use_cache=False)
    assert isinstance(found, tuple)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_backbone_is_compared() -> None:
    assert {name for name in BACKBONES if "alternating" not in name and name.startswith("llava_")} == set(
        TINY_BACKBONES
    )


@torch.no_grad()
def test_embeddings_with_media_in_them_continue_like_the_prompt(load_tiny, mixed_data: Path) -> None:
    loaded = load_tiny("llava_llama")
    model, batch = loaded.model.eval(), prompt_with_a_clip(loaded, mixed_data)
    media = {name: batch[name] for name in ("images", "modalities", "image_sizes")}
    embeddings = model.embed_multimodal(batch["input_ids"], *media.values())
    whole = model.generate(batch["input_ids"], **media, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), whole[:, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("option", ["inputs_embeds", "assistant_model", "prompt_lookup_num_tokens"])
def test_media_and_what_cannot_take_them_are_refused(option: str, load_tiny, mixed_data: Path) -> None:
    loaded = load_tiny("llava_llama")
    batch = prompt_with_a_clip(loaded, mixed_data)
    given = {"inputs_embeds": embed(loaded.model), "assistant_model": loaded.model, "prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match=option):
        loaded.model.generate(**batch, **{option: given[option]}, **GREEDY)


def test_prompt_lookup_of_a_generation_config_is_refused_too(load_tiny, mixed_data: Path) -> None:
    loaded = load_tiny("llava_llama")
    loaded.model.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens guesses from the ids of a prompt"):
        loaded.model.generate(**prompt_with_a_clip(loaded, mixed_data), **GREEDY)


def test_alternating_attention_refuses_embeddings(load_tiny) -> None:
    model = load_tiny("llava_llama", variant="alternating").model
    with pytest.raises(ValueError, match="do not tell which positions are visual"):
        model.generate(inputs_embeds=embed(model), **GREEDY)


def prompt_with_a_clip(loaded: Any, mixed_data: Path) -> dict[str, Any]:
    """The first sample of the data, a clip and its caption, as a prompt."""
    from llava.data.collator import SupervisedCollator, model_inputs
    from llava.data.dataset import SupervisedDataset
    from llava.data.records import read_records

    assert "video" in json.loads(mixed_data.read_text())[0]
    dataset = SupervisedDataset(read_records(str(mixed_data)), loaded.tokenizer, loaded.vision, 256)
    batch = model_inputs(SupervisedCollator(loaded.tokenizer.pad_token_id)([dataset[0]]))
    return {name: value for name, value in batch.items() if name != "labels"}
