"""``--as multimodal``: a whole checkpoint as a folder with the code of its model, for ``trust_remote_code``."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from llava.config import VisionConfig
from llava.io import write_json
from llava.model.backbones import BACKBONES, VARIANTS, plain_class, split_type
from llava.model.export.bundle import PACKAGE, Name, bundle
from llava.model.export.folder import edit_json
from llava.model.export.text import FLAG, compare_logits, pick_tokens, stored_dtype
from llava.model.export.tokenizer import check_offsets, compare_tokenizers, write_tokenizer
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import LoadedModel, load_model
from llava.model.lora import is_adapter_folder, merge_adapters
from llava.model.multimodal_encoder.base import TOWERS
from llava.model.multimodal_projector.projectors import PROJECTORS, parse_mlp
from llava.model.multimodal_resampler import RESAMPLERS
from llava.model.pretrained import locate_model, quiet_transformers, read_config

MODULE = "modeling_exported"
"""The generated module, a file of the folder."""
PROCESSOR = "MultimodalProcessor"

_ENCODER = "llava.model.multimodal_encoder"
_LEFT_OUT = {
    # How a tower is read from its own folder: in an export it is among the weights.
    Name(f"{_ENCODER}.base", "VisionTower"): ("describe", "load_weights"),
    Name(f"{_ENCODER}.hf", "HuggingFaceTower"): ("describe", "own_side", "load_weights", "read_weights"),
    Name(f"{_ENCODER}.hf", "Siglip2Tower"): ("own_side",),
    Name(f"{_ENCODER}.timm", "TimmTower"): ("describe",),
    Name("llava.model.llava_arch", "LlavaMetaModel"): ("from_pretrained",),
    # How adapters and DeepSpeed's copies are saved.
    Name("llava.model.llava_arch", "LlavaMetaForCausalLM"): ("load_vision_tower", "save_pretrained"),
}
_DECORATORS = ("register_backbone",)
_ALTERNATING = "llava.model.language_model.alternating"
_FAMILIES = "llava.model.language_model.families"


def class_names(model_class: type[LlavaMetaForCausalLM]) -> tuple[str, str, str]:
    """Names of configuration, decoder and language model."""
    return model_class.config_class.__name__, model_class.decoder_class.__name__, model_class.__name__


def write_module(model_class: type[LlavaMetaForCausalLM], vision: VisionConfig) -> str:
    """The source of the module that an export of a model needs.

    Args:
        model_class: of the model, one of this library's own or made of one.
        vision: names its tower, projector and resampler.

    Raises:
        ValueError: a part is a plug-in's, whose code is not this library's to copy.
    """
    family, variant = split_type(model_class.config_class.model_type)
    backbone = BACKBONES[family]
    base = f"{backbone.prefix}ForCausalLM"
    made = Name(_FAMILIES, "make_family")
    roots = [_root("language model", family, Name(backbone.module, base)) if backbone.module else made]
    roots += [Name(name.module, name.name) for name in _parts(vision)]
    roots += [
        Name("llava.model.export.remote", "WholeModel"),
        Name("llava.compat", "inherit_conversions"),
        Name("llava.data.processor", PROCESSOR),
    ]
    if variant != "base":
        roots.append(Name(_ALTERNATING, "make_variant"))
    body = bundle(roots, _LEFT_OUT, _DECORATORS, (_ALTERNATING,))
    return f"{_HEAD}\n{body}\n\n{_tail(model_class, family, variant, base)}"


_HEAD = '''"""A vision- and video-language model with its processor, for transformers' Auto classes.

Generated from the sources of llava (llava.model.export); needs torch, transformers, numpy and pillow.
"""
'''


def _parts(vision: VisionConfig) -> list[Name]:
    """Where the parts of a model that are chosen by name are defined."""
    parts: list[tuple[str, str, Any]] = [
        ("vision tower", str(vision.vision_config["model_type"]), TOWERS.get(vision.vision_config["model_type"]))
    ]
    if parse_mlp(vision.projector_type) is None:
        parts.append(("projector", vision.projector_type, PROJECTORS.get(vision.projector_type)))
    if vision.resampler_type is not None:
        parts.append(("resampler", vision.resampler_type, RESAMPLERS.get(vision.resampler_type)))
    return [_root(kind, name, Name(part.__module__, part.__qualname__)) for kind, name, part in parts]


def _root(kind: str, name: str, part: Name) -> Name:
    if part.module.split(".")[0] != PACKAGE:
        raise ValueError(
            f"the {kind} {name!r} is a plug-in's ({part.module}), whose code is not copied into an export; export with "
            "--as text, or train with a part of the library"
        )
    return part


def _tail(model_class: type[LlavaMetaForCausalLM], family: str, variant: str, base: str) -> str:
    """What makes a family's classes and a variant of these, and lets weights be read under their stored names."""
    config, decoder, model = class_names(model_class)
    plain, plain_config = plain_class(model_class).__name__, BACKBONES[family].plain_type
    lines = []
    if BACKBONES[family].module is None:
        lines.append(f'{base} = make_family("{BACKBONES[family].prefix}", "{family}", "{plain_config}")')
    if variant != "base":
        assert variant in VARIANTS
        lines.append(f'{model} = make_variant({base}, "{variant}")')
    if lines:
        lines += [
            f"{decoder}, {config} = {model}.decoder_class, {model}.config_class",
            f"for _made in ({config}, {decoder}, {model}):",
            "    _made.__module__ = __name__",
        ]
    lines += [
        f"class {model}(WholeModel, {model}):",
        "    pass",
        f'inherit_conversions("{plain_config}", {config}.model_type)',
        f'inherit_conversions("{plain}", "{model}")',
    ]
    return "\n".join(lines) + "\n"


# The folder.


def read_model(
    checkpoint: str, dtype: torch.dtype | None, model_base: str | None = None, vision_tower: str | None = None
) -> LoadedModel:
    """Load a whole checkpoint, its tower included, adapters merged, in the type of its weights or in ``dtype``.

    Raises:
        ValueError: it cannot be loaded, does not see, or its tokenizer cannot be exported.
    """
    path = locate_model(checkpoint, FLAG)
    loaded = load_model(path, model_base=model_base, vision_tower=vision_tower, flag=FLAG)
    if loaded.vision is None:
        raise ValueError(f"{FLAG} {path!r} does not see; export it with --as text")
    check_offsets(loaded.tokenizer, path)
    if is_adapter_folder(path):
        merge_adapters(loaded.model)
    loaded.model.to(dtype or stored_dtype(read_config(path, FLAG))).eval()  # type: ignore[arg-type]
    return loaded


def export_multimodal(loaded: LoadedModel, folder: Path) -> list[str]:
    """Write model, tokenizer, processor and the code of all three to a folder.

    Returns:
        What was done, a line each.

    Raises:
        ValueError: a part is a plug-in's.
    """
    model, vision = loaded.model, loaded.vision
    assert vision is not None
    source = write_module(type(model), vision)
    text_format = build_separator(model.config)
    # The tower is among the weights; where it lay on this machine is nobody's business.
    name = vision.vision_tower if not Path(vision.vision_tower).is_absolute() else Path(vision.vision_tower).name
    model.set_vision(replace(vision, save_vision_tower=True, vision_tower=name))
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=stored_weights(model))
    write_tokenizer(loaded.tokenizer, folder)
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")
    config, _, language_model = class_names(type(model))
    # Text pipelines ask for the first class, those with pictures for the second.
    models = dict.fromkeys(("AutoModelForCausalLM", "AutoModelForImageTextToText"), f"{MODULE}.{language_model}")
    auto_map = {"AutoConfig": f"{MODULE}.{config}", **models}
    processor = {"AutoProcessor": f"{MODULE}.{PROCESSOR}"}
    edit_json(folder / "config.json", {"auto_map": auto_map | processor, "llava_separator": text_format})
    write_json(folder / "processor_config.json", {"processor_class": PROCESSOR, "auto_map": processor})
    lines = [
        f"vision modules: {vision.vision_config['model_type']}, {vision.projector_type}, "
        f"{vision.resampler_type or 'no resampler'}, all in {str(model.dtype).removeprefix('torch.')}",
        f"code: {MODULE}.py, {len(source.splitlines())} lines; load with trust_remote_code=True",
    ]
    if vision.vision_config["model_type"] == "timm_wrapper":
        lines.append("its vision tower needs timm, wherever the folder is loaded")
    written = getattr(model.config, "llava_format", PLAIN_LM)
    if written != PLAIN_LM and loaded.tokenizer.chat_template is None:
        lines.append(f"prompts: it was trained with --version {written}, which has no chat template; write its markup")
    return lines


PLAIN_LM = "plain_lm"


def stored_weights(model: LlavaMetaForCausalLM) -> dict[str, Tensor]:
    """The weights of a model, those of its tower under the names that the vision model's own files have.

    These are the same in all releases of transformers, and each of them reads them; names in memory differ (DINOv2's
    queries, keys and values are called otherwise from 5.23 on).
    """
    state = model.state_dict()
    prefix = next(
        name for name, module in model.named_modules() if module is model.get_model().vision_tower.vision_tower
    )
    own = {name for name in state if name.startswith(f"{prefix}.")}
    with TemporaryDirectory() as folder:
        model.get_model().vision_tower.vision_tower.save_pretrained(folder)
        files = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    tower = {f"{prefix}.{name}": tensor for weights in files for name, tensor in weights.items()}
    return {name: tensor for name, tensor in state.items() if name not in own} | tower


def build_separator(config: PretrainedConfig) -> str:
    """What stands between media and the words behind them, as training samples have it."""
    return " " if getattr(config, "llava_format", PLAIN_LM) == PLAIN_LM else "\n"


def load_exported(folder: Path, model_class: type[LlavaMetaForCausalLM]) -> tuple[Any, Any]:
    """The model and the processor of an export, from the code in its folder, as the Auto classes would load them."""
    spec = importlib.util.spec_from_file_location(f"llava_export_{id(folder)}", folder / f"{MODULE}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    try:
        spec.loader.exec_module(module)
        with quiet_transformers():
            model = getattr(module, class_names(model_class)[2]).from_pretrained(folder)
        return model.eval(), getattr(module, PROCESSOR).from_pretrained(folder)
    finally:
        del sys.modules[spec.name]


@torch.no_grad()
def check_multimodal(loaded: LoadedModel, folder: Path) -> dict[str, float]:
    """Reload an export and compare it with the checkpoint, on a text and behind a picture of the export's processor.

    Returns:
        The largest difference of a logit on each.

    Raises:
        ValueError: the logits or the tokenizer are others.
    """
    model, vision = loaded.model.float(), loaded.vision
    assert vision is not None
    exported, processor = load_exported(folder, type(model))
    exported.float()
    compare_tokenizers(loaded.tokenizer, processor.tokenizer)
    ids = pick_tokens(model.config, vision, model.grounding, loaded.tokenizer).unsqueeze(0)
    found = {"text": compare_logits(model(input_ids=ids).logits, exported(input_ids=ids).logits)}
    # Not a square, and no multiple of a patch: resizing and padding are part of what is compared.
    pixels = torch.randint(256, (61, 94, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(images=pixels, text="", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    # Behind the picture's tokens, as far as the context reaches.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)[
        :, : max(model.config.max_position_embeddings, length)
    ]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found["image"] = compare_logits(model(**inputs).logits, exported(**inputs).logits)
    return found
