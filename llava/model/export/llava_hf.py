"""``--as llava_hf``: a checkpoint as transformers' own ``LlavaForConditionalGeneration``, where its parts allow it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.config import VisionConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PATCH
from llava.io import write_json
from llava.model.backbones import plain_class, split_type
from llava.model.convert.names import PROJECTOR_LAYERS
from llava.model.convert.settings import NATIVE_TOWERS
from llava.model.export.folder import edit_json
from llava.model.export.text import compare_logits, pick_tokens, text_settings
from llava.model.export.tokenizer import compare_tokenizers, write_tokenizer
from llava.model.loading import LoadedModel
from llava.model.multimodal_encoder.hf import HuggingFaceTower, build_config
from llava.model.multimodal_projector.projectors import MlpShape, parse_mlp
from llava.model.pretrained import quiet_transformers
from llava.model.visual import is_added

_STAGES = ("stage_names", "out_features", "out_indices")


def find_reasons(loaded: LoadedModel) -> Iterator[str]:
    """What of a checkpoint ``LlavaForConditionalGeneration`` has nothing for."""
    vision, grounding = loaded.vision, loaded.model.grounding
    assert vision is not None
    variant = split_type(loaded.model.config.model_type)[1]
    if variant != "base":
        yield f"{variant} attention"
    if parse_mlp(vision.projector_type) != MlpShape(2, 0):
        yield f"the projector {vision.projector_type} (it has two layers with GELU between them, mlp2x_gelu)"
    if vision.projector_width not in (None, loaded.model.config.hidden_size):
        yield f"--mm_projector_width {vision.projector_width} (its layers are as wide as the language model)"
    if vision.layout.resamples("image"):
        yield f"the resampler {vision.resampler_type}, which images pass (it keeps a token a patch)"
    if vision.anyres is not None or vision.image_aspect_ratio == "pad":
        yield f"--image_aspect_ratio {vision.image_aspect_ratio} (it sees one square, stretched or cut)"
    if grounding is not None and grounding.has_tables:
        yield "tables of coordinates"
    if vision.vision_final_norm:
        yield "features that pass the tower's final norm"
    kind = str(vision.vision_config["model_type"])
    if kind not in NATIVE_TOWERS:
        yield f"the vision tower {kind} (it reads those of {', '.join(sorted(NATIVE_TOWERS))})"
    elif build_config(vision).image_size != vision.image_size:
        yield f"pictures of {vision.image_size} pixels, which are not the tower's own {build_config(vision).image_size}"
    embeddings = cast(nn.Embedding, loaded.model.get_input_embeddings())
    if embeddings.embedding_dim != loaded.model.config.hidden_size:
        yield "embeddings that are narrower than the layers"


def build_native(loaded: LoadedModel) -> LlavaForConditionalGeneration:
    """The model as transformers' own class, with all its weights.

    Raises:
        ValueError: a part has no place there; names it.
    """
    vision, model = loaded.vision, loaded.model
    assert vision is not None
    if reasons := list(find_reasons(loaded)):
        raise ValueError(
            f"LlavaForConditionalGeneration has nothing for {'; nor for '.join(reasons)}; export with --as multimodal"
        )
    tower = cast(HuggingFaceTower, model.get_model().vision_tower)
    # The layers up to the selected one, as they are here: the last hidden state is what it reads.
    # As the tower was built, but for DINOv2's names of stages, which are those of all its layers.
    built = tower.vision_tower.config
    vision_config = type(built).from_dict({name: v for name, v in built.to_dict().items() if name not in _STAGES})
    text_config = text_settings(model.config.to_dict(), plain_class(type(model.config)))
    # That class ties its head to a module of this name, which GPT-2's embeddings do not have; theirs is stored twice.
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    tied = tied and "embed_tokens" in dict(model.get_model().named_children())
    text_config.tie_word_embeddings = tied
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=vision.token_ids[IMAGE_PATCH],
        image_seq_length=vision.layout.num_tokens("image"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if NATIVE_TOWERS[vision_config.model_type] else "full",
        tie_word_embeddings=tied,
    )
    native = LlavaForConditionalGeneration(config).to(model.dtype)  # type: ignore[arg-type]
    decoder = {name: tensor for name, tensor in model.get_model().state_dict().items() if not is_added(name)}
    native.model.language_model.load_state_dict(decoder)
    with torch.no_grad():
        native.lm_head.weight.copy_(cast(nn.Linear, model.get_output_embeddings()).weight)
    for theirs, place in PROJECTOR_LAYERS.items():
        layer = model.get_model().mm_projector[int(place)]
        native.model.multi_modal_projector.get_submodule(theirs).load_state_dict(layer.state_dict())
    # Behind the selected layer that class has a norm, which a hidden state does not pass.
    loaded_keys = native.model.vision_tower.load_state_dict(tower.vision_tower.state_dict(), strict=False)
    assert all(tower.final_norm in name.split(".") for name in loaded_keys.missing_keys), loaded_keys.missing_keys
    assert not loaded_keys.unexpected_keys, loaded_keys.unexpected_keys
    suppressed = [*(model.generation_config.suppress_tokens or ()), *vision.visual_token_ids]
    special = {
        name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    native.generation_config = GenerationConfig(**special, suppress_tokens=sorted({*suppressed}))
    return native.eval()


def export_llava_hf(loaded: LoadedModel, folder: Path) -> list[str]:
    """Write a checkpoint as transformers' own class, with its processor; what was done, a line each.

    Raises:
        ValueError: as ``build_native``.
    """
    vision = loaded.vision
    assert vision is not None
    native = build_native(loaded)
    with quiet_transformers():
        native.save_pretrained(folder)
    write_tokenizer(loaded.tokenizer, folder, renamed={IMAGE_PATCH: DEFAULT_IMAGE_TOKEN})
    edit_json(folder / "config.json", {"torch_dtype": str(native.dtype).removeprefix("torch.")})
    # In the units of its processor: it counts tokens from pixels, by the side of a patch.
    patch = vision.image_size // vision.patches_per_side
    prefix = NATIVE_TOWERS[str(vision.vision_config["model_type"])]
    processor: dict[str, Any] = {
        "processor_class": "LlavaProcessor",
        "image_token": DEFAULT_IMAGE_TOKEN,
        "patch_size": patch,
        "num_additional_image_tokens": prefix,
        "vision_feature_select_strategy": native.config.vision_feature_select_strategy,
    }
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "preprocessor_config.json", _image_processor(vision))
    lines = [
        f"{DEFAULT_IMAGE_TOKEN} is the token of a patch, {IMAGE_PATCH} until now: the processor writes it "
        f"{vision.layout.num_tokens('image')} times for a picture",
        "pictures are resized by transformers' image processor: pixels may differ from training's by rounding",
    ]
    if vision.resampler is not None:
        lines.append(f"left out: the resampler {vision.resampler_type}, which clips alone pass; it sees pictures only")
    return lines


def _image_processor(vision: VisionConfig) -> dict[str, Any]:
    """``preprocessor_config.json``: pictures stretched to the square, or resized by their shorter side and cut."""
    square = {"height": vision.image_size, "width": vision.image_size}
    resize = vision.image_resize_size
    return {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if resize is None else {"shortest_edge": resize},
        "resample": 3,
        "do_center_crop": resize is not None,
        "crop_size": square,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


@torch.no_grad()
def check_llava_hf(loaded: LoadedModel, folder: Path) -> dict[str, float]:
    """Reload an export and compare it with the checkpoint, as ``check_multimodal`` does."""
    model, vision = loaded.model.float(), loaded.vision
    assert vision is not None
    with quiet_transformers():
        native = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
    compare_tokenizers(loaded.tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    ids = pick_tokens(model.config, vision, model.grounding, loaded.tokenizer).unsqueeze(0)
    found = {"text": compare_logits(model(input_ids=ids).logits, native(input_ids=ids).logits)}
    span = torch.full((1, vision.layout.num_tokens("image")), vision.token_ids[IMAGE_PATCH])  # (1, tokens of a picture)
    shown = torch.cat([span, ids], dim=1)[:, : model.config.max_position_embeddings]
    generator = torch.Generator().manual_seed(0)
    pixels: Tensor = torch.randn((1, 3, vision.image_size, vision.image_size), generator=generator)
    inputs = {"input_ids": shown, "attention_mask": torch.ones_like(shown), "pixel_values": pixels}
    found["image"] = compare_logits(model(**inputs).logits, native(**inputs).logits)
    return found
