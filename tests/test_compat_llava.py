"""Names that scripts of the LLaVA family import: found under their old paths, they give the library's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import FunctionType

import pytest
import torch
from conftest import ITALIAN, turns
from PIL import Image

from llava import compat_llava
from llava.compat_llava import GONE, GONE_MODULES, IMAGE_TOKEN_INDEX, OLD_MODULES
from llava.data.formats.conversation import conv_templates
from llava.serve.generate import Captioner, Request
from llava.types import Media

QUESTION = "che cos'è?"


@pytest.fixture(scope="module")
def checkpoint(load_tiny, tmp_path_factory) -> str:
    """A checkpoint that was trained on conversations, whose pictures matter to what it says."""
    loaded = load_tiny("llava_llama", resampler_type=None, image_aspect_ratio="pad", perceiver_latents=None,
                       perceiver_latents_fast=None, resampler_width=None, resampler_heads=None)  # fmt: skip
    loaded.model.config.llava_format = "v1"
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("family") / "llava-tiny"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_script_of_the_family_answers_as_the_captioner_does(checkpoint, media_dir):
    # As the family's model_vqa.py and run_llava.py have it, imports included.
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.utils import disable_torch_init

    from llava.constants import DEFAULT_IMAGE_TOKEN

    disable_torch_init()
    name = get_model_name_from_path(checkpoint)
    tokenizer, model, image_processor, context_len = load_pretrained_model(checkpoint, None, name, device="cpu")
    assert (name, context_len, model.config.mm_use_im_start_end) == ("llava-tiny", 512, False)
    answers = []
    for picture in ("a.png", "b.jpg"):
        image = Image.open(media_dir / picture)
        image_tensor = process_images([image], image_processor, model.config)
        conv = conv_templates["vicuna_v1"].copy()
        conv.append_message(conv.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + QUESTION)
        conv.append_message(conv.roles[1], None)
        prompt = conv.get_prompt()
        input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        stop_str = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
        output_ids = model.generate(
            input_ids, images=image_tensor, image_sizes=[image.size], do_sample=False, max_new_tokens=12,
            stopping_criteria=[KeywordsStoppingCriteria([stop_str], tokenizer, input_ids)], use_cache=True,
        )  # fmt: skip
        answers.append(tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip())
    captioner = Captioner.from_checkpoint(checkpoint, device="cpu")
    requests = [Request([Media("image", str(media_dir / picture))], QUESTION) for picture in ("a.png", "b.jpg")]
    assert answers == [text.strip() for text in captioner.generate(requests, max_new_tokens=12)]
    assert answers[0] != answers[1]


def test_pixels_are_those_of_training(checkpoint, media_dir):
    from llava.data.media import load_media

    _, model, processor, _ = compat_llava.load_pretrained_model(checkpoint, device="cpu")
    image = Image.open(media_dir / "a.png")
    pixels = compat_llava.process_images([image, image], processor, model.config)
    frames = load_media(Media("image", str(media_dir / "a.png")), model.vision).frames
    assert torch.equal(pixels[1], processor.normalize(frames)[0])
    tower = model.get_model().vision_tower
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels[:1]), tower(frames), atol=1e-5, rtol=0)


def test_media_and_prompts_that_do_not_go_together_are_errors(checkpoint):
    tokenizer, model, _, _ = compat_llava.load_pretrained_model(checkpoint, device="cpu")
    shown = compat_llava.tokenizer_image_token("<image> e <image>", tokenizer, return_tensors="pt")[None]
    assert (shown == IMAGE_TOKEN_INDEX).sum() == 2
    frames = torch.zeros(1, 3, 56, 56)
    with pytest.raises(ValueError, match="more images or videos than the 1 that were given"):
        model.generate(shown, images=frames)
    with pytest.raises(ValueError, match="3 images or videos were given, but the prompts show 2"):
        model.generate(shown, images=[frames[0]] * 3)
    # Prompts of two lengths, each answered as if alone.
    prompts = [compat_llava.tokenizer_image_token(text, tokenizer) for text in ("<image> un gatto", "<image> il gatto")]
    together = model.generate(torch.tensor(prompts), images=[frames[0]] * 2, max_new_tokens=4)
    alone = [model.generate(torch.tensor([ids]), images=frames, max_new_tokens=4) for ids in prompts]
    assert torch.equal(together, torch.cat(alone))
    # Padded on the left, with a mask, as the family's scripts for batches have them; and text alone.
    longer = compat_llava.tokenizer_image_token("<image> un gatto bianco e nero", tokenizer)
    padding = len(longer) - len(prompts[0])
    padded = torch.tensor([[tokenizer.pad_token_id] * padding + prompts[0], longer])
    mask = torch.tensor([[0] * padding + [1] * len(prompts[0]), [1] * len(longer)])
    together = model.generate(padded, attention_mask=mask, images=[frames[0]] * 2, max_new_tokens=4)
    assert torch.equal(together[:1], alone[0])
    text = torch.tensor([tokenizer("un gatto").input_ids])
    assert model.generate(text, max_new_tokens=4, min_new_tokens=4).shape == (1, 4)


def test_templates_write_what_the_family_s_do():
    conv = conv_templates["qwen_1_5"].copy()
    for role, text in zip(conv.roles * 2, ("Chi è?", "un {gatto}", "E poi?", None), strict=True):
        conv.append_message(role, text)
    assert conv.get_prompt() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nChi è?<|im_end|>\n"
        "<|im_start|>assistant\nun {gatto}<|im_end|>\n<|im_start|>user\nE poi?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert conv_templates["qwen_1_5"].messages == []
    with pytest.raises(AttributeError, match="system"):
        conv.system = "You answer in Italian."  # It would not be written.
    conv = conv_templates["v1"].copy()
    for role, text in zip(conv.roles * 2, ("Chi è?", "un gatto", "E poi?", None), strict=True):
        conv.append_message(role, text)
    assert conv.get_prompt().endswith("questions. USER: Chi è? ASSISTANT: un gatto</s>USER: E poi? ASSISTANT:")
    assert conv.get_prompt().startswith("A chat between a curious user and an artificial")
    conv.version = conv_templates["llava_v1"].version
    assert conv.get_prompt().startswith("A chat between a curious human and an artificial")
    assert " the human's questions. USER: Chi" in conv.get_prompt()
    with pytest.raises(ValueError, match="expected a role of"):
        conv.append_message("human", "ciao")


def test_samples_of_training_come_as_they_are_read(visual_tokenizer, tmp_path):
    import json

    from llava.train.arguments import DataArguments
    from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset

    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"id": i, "conversations": turns("", text)} for i, text in enumerate(ITALIAN[:2])]))
    visual_tokenizer.model_max_length = 64
    samples = LazySupervisedDataset(str(path), visual_tokenizer, DataArguments([str(path)]))
    batch = DataCollatorForSupervisedDataset(visual_tokenizer)([samples[0], samples[1]])
    assert batch["sample_ids"] == ["0", "1"]
    assert visual_tokenizer.decode(samples[0].input_ids, skip_special_tokens=True).strip() == ITALIAN[0]


@pytest.mark.parametrize("module", OLD_MODULES)
def test_every_old_name_is_found_where_it_was(module):
    found = importlib.import_module(module)
    for name in OLD_MODULES[module]:
        assert getattr(found, name).__doc__, name
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'; docs/migrating\.md"):
        _ = found.nonsense


@pytest.mark.parametrize("name", GONE)
def test_a_name_that_is_gone_says_what_to_use(name):
    with pytest.raises(ImportError, match=rf"{name} of the LLaVA family is not kept; use "):
        exec(f"from llava.mm_utils import {name}")


def test_classes_of_models_are_found_where_they_were():
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.language_model.llava_qwen import LlavaQwenAlternatingConfig, LlavaQwenForCausalLM

    import llava.model

    assert LlavaQwenForCausalLM is llava.model.LlavaQwenForCausalLM
    assert LlavaConfig is llava.model.LlavaLlamaConfig
    assert LlavaQwenAlternatingConfig is llava.model.LlavaQwenAlternatingConfig
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("llava.model.language_model.llava_nonsense")


def test_the_program_has_no_names_but_its_own():
    # As other packages ask of __main__, with a default.
    import llava.train.train as program

    asked = FunctionType(program.__getattr__.__code__, {**vars(program), "__name__": "__main__"})
    with pytest.raises(AttributeError):
        asked("nonsense")


@pytest.mark.parametrize("package", GONE_MODULES)
def test_a_module_that_is_gone_says_what_to_use(package):
    for name in GONE_MODULES[package][1].split():
        with pytest.raises(ModuleNotFoundError, match=rf"{package}\.{name} of the LLaVA family is not kept; use "):
            importlib.import_module(f"{package}.{name}")


def test_a_module_that_was_never_there_is_missing():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("llava.nonsense")


def test_the_document_names_all_of_them():
    text = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
    for names in (*OLD_MODULES.values(), GONE):
        assert [name for name in names if f"`{name}`" not in text] == []
