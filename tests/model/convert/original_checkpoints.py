"""Writes small checkpoint folders laid out as LLaVA-1.5, LLaVA-NeXT (OneVision) and LLaVA-ST save theirs.

    python original_checkpoints.py FOLDER

Weights are a function of their names, and files are written without transformers, so that ``originals.json``, which the
originals' own code computed (``record_originals.py``), holds for every copy, whatever release reads it.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

TOWER_PREFIX = "model.vision_tower.vision_tower."
"""Before the names of a tower's weights within a checkpoint."""

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "hidden_act": "quick_gelu", "projection_dim": 16,
}  # fmt: skip
CLIP_PIXELS: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor", "crop_size": 56, "size": 56, "do_center_crop": True,
    "do_normalize": True, "do_resize": True, "resample": 3, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 384, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
SIGLIP_PIXELS: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 8192, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "float32", "transformers_version": "4.37.2", "tokenizer_padding_side": "right",
    "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "tower", "use_mm_proj": True, "freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False,
}  # fmt: skip
LLAVA_15: dict[str, Any] = _COMMON | {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None,
    "pretraining_tp": 1, "attention_bias": False, "image_aspect_ratio": "pad", "image_grid_pinpoints": None,
    "mm_patch_merge_type": "flat", "unfreeze_mm_vision_tower": False, "freeze_mm_vision_resampler": False,
    "tokenizer_model_max_length": 2048, "vocab_size": 274,
}  # fmt: skip
LLAVA_NEXT: dict[str, Any] = _COMMON | {
    "architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "bos_token_id": 256, "eos_token_id": 258,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": None,
    "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2,
    "image_aspect_ratio": "anyres_max_9", "image_crop_resolution": None, "image_split_resolution": None,
    "image_grid_pinpoints": [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
    "mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": None,
    "mm_newline_position": "one_token", "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower_lr": 2e-06, "vision_tower_pretrained": None, "pos_skipping_range": 4096, "use_pos_skipping": False,
    "tokenizer_model_max_length": 32768, "max_position_embeddings": 32768, "vocab_size": 264,
}  # fmt: skip
LLAVA_ST: dict[str, Any] = LLAVA_NEXT | {
    "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "mm_patch_merge_type": "flat", "max_frame": 100,
    "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_depth": 2, "mm_perceiver_latents": 81,
    "mm_perceiver_latents_fast": 9, "mm_perceiver_ff_mult": 4, "mm_perceiver_pretrained": None,
    "num_spatial_tokens": 100, "num_temporal_tokens": 100, "use_downsample_image": False, "vision_tower": "siglip-tiny",
}  # fmt: skip
PACKER_WIDTH = 32
"""Inner width of LLaVA-ST's packer; 1,024, a constant, in the original."""

SIZES = {"square": (400, 400), "wide": (330, 700), "tall": (620, 290)}
"""(height, width) of the pictures that features are recorded of."""
PROMPT = "USER: <image>\nWhat is in it? ASSISTANT:"
FRAMES = 3
"""Of the recorded video, which is the square picture and two like it."""


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights that are a function of their name: about one for norms, small for the rest."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        is_scale = name.endswith("weight") and ("norm" in name or "layrnorm" in name or ".ln_" in name)
        return torch.from_numpy((numbers * 0.1 + is_scale).astype(np.float32))
    return torch.from_numpy((numbers * 1.5 / math.sqrt(math.prod(shape[1:]))).astype(np.float32))


def draw(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of smooth colours with a hard-edged box, the same everywhere."""
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size).reshape(2, 1, 1)
    waves = [np.sin((3 + seed) * x + 2 * c) * np.cos((2 + c) * y + seed) for c in range(3)]
    pixels = np.stack(waves, -1) * 110 + 128
    pixels[size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = (250, 20 + 40 * seed, 60)
    return Image.fromarray(pixels.astype(np.uint8))


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tower_shapes(config: dict[str, Any], layers: int | None = None) -> Shapes:
    """A CLIP's or SigLIP's weights, under the names that transformers 4 had; a SigLIP's without its head."""
    width, inner, is_clip = config["hidden_size"], config["intermediate_size"], "clip" in config["model_type"][:4]
    positions = (config["image_size"] // config["patch_size"]) ** 2 + is_clip
    shapes: Shapes = {"embeddings.patch_embedding.weight": (width, 3, config["patch_size"], config["patch_size"])}
    shapes["embeddings.position_embedding.weight"] = (positions, width)
    if is_clip:
        shapes |= {"embeddings.class_embedding": (width,)} | _norm("pre_layrnorm", width)
    else:
        shapes["embeddings.patch_embedding.bias"] = (width,)
    for layer in range(config["num_hidden_layers"] if layers is None else layers):
        prefix = f"encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{prefix}self_attn.{part}", width, width)
        shapes |= _norm(f"{prefix}layer_norm1", width) | _norm(f"{prefix}layer_norm2", width)
        shapes |= _linear(f"{prefix}mlp.fc1", inner, width) | _linear(f"{prefix}mlp.fc2", width, inner)
    shapes |= _norm("post_layernorm", width)
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def model_shapes(config: dict[str, Any]) -> Shapes:
    """The language model's and the projector's weights, and the newline where there is one."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow), ("o_proj", width)):
            shapes[f"{prefix}self_attn.{part}.weight"] = (rows, width)
            if config["model_type"] == "llava_qwen" and part != "o_proj":
                shapes[f"{prefix}self_attn.{part}.bias"] = (rows,)
        for part, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
            shapes[f"{prefix}mlp.{part}.weight"] = shape
        shapes |= {f"{prefix}{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    shapes |= _linear("model.mm_projector.0", width, config["mm_hidden_size"])
    shapes |= _linear("model.mm_projector.2", width, width)
    if "unpad" in config["mm_patch_merge_type"]:
        shapes["model.image_newline"] = (width,)
    if config["mm_resampler_type"] is not None:
        for axis in ("temporal", "spatial_height", "spatial_width"):
            shapes |= {f"model.{axis}_{end}put_embeddings.weight": (100, width) for end in ("in", "out")}
        shapes |= {f"model.vision_resampler.{name}": shape for name, shape in packer_shapes(width).items()}
    return shapes | {"lm_head.weight": (config["vocab_size"], width)}


def packer_shapes(width: int) -> Shapes:
    """LLaVA-ST's packer: three blocks of one class, with torch's attention in them."""
    shapes: Shapes = {}
    for block in ("", "_slow", "_fast"):
        prefix = f"token_packer{block}.devide_attention."
        for letter in "qkv":
            shapes |= _linear(f"{prefix}to_{letter}.0", PACKER_WIDTH, width)
            shapes |= _linear(f"{prefix}to_{letter}.2", PACKER_WIDTH, PACKER_WIDTH)
            shapes |= {f"{prefix}ln_{letter}.{part}": (PACKER_WIDTH,) for part in ("weight", "bias")}
        shapes[f"{prefix}attn.in_proj_weight"] = (3 * PACKER_WIDTH, PACKER_WIDTH)
        shapes[f"{prefix}attn.in_proj_bias"] = (3 * PACKER_WIDTH,)
        shapes |= _linear(f"{prefix}attn.out_proj", PACKER_WIDTH, PACKER_WIDTH)
        shapes[f"{prefix}to_out.weight"] = (width, PACKER_WIDTH)
    return shapes


def projected_frames() -> Tensor:
    """(100, 729, 64): a stand-in for a video behind LLaVA-ST's projector, whose packer takes 100 frames alone."""
    numbers = np.random.default_rng(5).standard_normal((100, 729, 64))
    return torch.from_numpy(numbers.astype(np.float32))


def make_state(config: dict[str, Any], tower: Shapes | None) -> dict[str, Tensor]:
    """All weights of a checkpoint, with those of its tower where it holds them."""
    shapes = model_shapes(config) | {TOWER_PREFIX + name: shape for name, shape in (tower or {}).items()}
    return {name: fill(name, shape) for name, shape in shapes.items()}


def write_tower(folder: Path, config: dict[str, Any], pixels: dict[str, Any], seed: str = "tower.") -> Path:
    """The vision model that a checkpoint names; other weights than a checkpoint's own with another ``seed``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1))
    state = {name: fill(seed + name, shape) for name, shape in tower_shapes(config).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path, *, llama: bool) -> None:
    """A tokenizer of bytes: with Llama's normalizer and a first token, or as Qwen's."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if llama else list(map(_byte_character, range(256)))
    special = ["<unk>", "<s>", "</s>"] if llama else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *byte_tokens, "\u2581", *"USERATIN:what?"] if llama else [*byte_tokens, *special]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    plain: dict[str, Any] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added: list[dict[str, Any]] = [plain | {"id": vocabulary[t], "content": t, "special": True} for t in special]
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [],
        "byte_fallback": llama,
        "fuse_unk": llama,
    }
    model |= {"unk_token": "<unk>"} if llama else {}
    bytes_only: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    parts: dict[str, Any] = {"normalizer": None, "pre_tokenizer": bytes_only, "post_processor": None}
    parts["decoder"] = bytes_only
    if llama:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
        ids = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        parts = {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]},
            "pre_tokenizer": None,
            "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids},
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        }
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts, "model": model}
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": True, "pad_token": "<unk>"}
    if not llama:
        settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 4096}))


def _byte_character(byte: int) -> str:
    """The character that byte-level tokenizers write for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sorted(set(range(256)) - set(printable)).index(byte))


def write_llava_15(folder: Path, *, tower_inside: bool = False, unfrozen: bool = False) -> Path:
    """LLaVA-1.5: a Llama, a CLIP, one padded square a picture.

    Args:
        folder: gets ``tower`` and the checkpoint ``llava-v1.5-tiny``, which is returned.
        tower_inside: the file holds a tower's weights, other ones than ``tower``.
        unfrozen: the configuration says that these are the model's (``unfreeze_mm_vision_tower``).
    """
    tower = write_tower(folder / "tower", CLIP, CLIP_PIXELS)
    config = LLAVA_15 | {"mm_vision_tower": str(tower), "unfreeze_mm_vision_tower": unfrozen}
    return _write(folder / "llava-v1.5-tiny", config, tower_shapes(CLIP) if tower_inside else None)


def write_llava_next(folder: Path, **settings: object) -> Path:
    """LLaVA-OneVision: a Qwen2, a SigLIP whose weights are in the file, tiles, a newline behind their rows."""
    tower = write_tower(folder / "siglip-tiny", SIGLIP, SIGLIP_PIXELS)
    # The originals drop the last layer, and the file has none of it.
    layers = SIGLIP["num_hidden_layers"] - 1
    config = LLAVA_NEXT | {"mm_vision_tower": str(tower), **settings}
    return _write(folder / "llava-onevision-tiny", config, tower_shapes(SIGLIP, layers))


def write_llava_st(folder: Path) -> Path:
    """LLaVA-ST: as LLaVA-NeXT, with a packer for videos and tables of coordinates."""
    tower = write_tower(folder / "siglip-tiny", SIGLIP, SIGLIP_PIXELS)
    layers = SIGLIP["num_hidden_layers"] - 1
    return _write(folder / "llava-st-tiny", LLAVA_ST | {"mm_vision_tower": str(tower)}, tower_shapes(SIGLIP, layers))


def _write(folder: Path, config: dict[str, Any], tower: Shapes | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(make_state(config, tower), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, llama=config["model_type"] == "llava_llama")
    return folder


if __name__ == "__main__":
    print(write_llava_15(Path(sys.argv[1])), write_llava_next(Path(sys.argv[1])))
