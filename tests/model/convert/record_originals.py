"""Writes ``originals.json``: what the originals' own code computes for the checkpoints of ``original_checkpoints.py``.

    python record_originals.py LLAVA LLAVA_NEXT LLAVA_ST FOLDER

The first three are clones of haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT and appletea233/LLaVA-ST, FOLDER is for the
checkpoints; run with Python 3.11, torch 2.13, transformers 4.40.0, numpy 1.26 and einops. What the clones import and
these models do not need is replaced by empty modules.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from original_checkpoints import (
    FRAMES,
    PACKER_WIDTH,
    PROMPT,
    SIZES,
    draw,
    projected_frames,
    write_llava_15,
    write_llava_next,
    write_llava_st,
)
from torch import Tensor

_UNUSED = ("deepspeed", "decord", "open_clip", "av", "timm", "cv2")
_EXPECTED = Path(__file__).with_name("originals.json")


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder:
    """Finds an empty module for each of ``_UNUSED``, and for whatever is imported from within them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        is_unused = name.split(".")[0] in _UNUSED or name.endswith((".imagebind", ".open_clip_encoder", ".hf_vision"))
        return ModuleSpec(name, self, is_package=True) if is_unused else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def summarize(features: Tensor) -> dict[str, Any]:
    """Some features (tokens, width) as they are, and a sum over all that tells their order."""
    rows = sorted({round(i * (len(features) - 1) / 11) for i in range(12)})
    weights = torch.cos(torch.arange(len(features), dtype=torch.float64) * 0.1)
    ordered = (weights @ features.double()) / math.sqrt(len(features))
    return {
        "tokens": len(features),
        "rows": rows,
        "features": [[round(v, 6) for v in features[row, :6].tolist()] for row in rows],
        "ordered_sum": [round(v, 6) for v in ordered[:16].tolist()],
    }


@torch.no_grad()
def run(model: Any, ids: list[int], images: list[Tensor], sizes: list[tuple[int, int]], kind: str) -> dict[str, Any]:
    """Features of the first image, logits at the end of the prompt, and the tokens that follow it greedily."""
    extra = {"modalities": [kind]} if "modalities" in model.forward.__code__.co_varnames else {}
    ids_tensor = torch.tensor([ids])
    _, _, _, _, embeddings, _ = model.prepare_inputs_labels_for_multimodal(
        ids_tensor, None, None, None, None, images, image_sizes=[size[::-1] for size in sizes], **extra
    )
    begin = ids.index(-200)
    end = embeddings.shape[1] - (len(ids) - begin - 1)
    result = summarize(embeddings[0, begin:end])
    logits, following = None, []
    for _ in range(6):
        step = model.lm_head(model.model(inputs_embeds=embeddings, use_cache=False)[0])[0, -1]
        logits = step if logits is None else logits
        following.append(int(step.argmax()))
        embeddings = torch.cat([embeddings, model.model.embed_tokens(torch.tensor([[following[-1]]]))], dim=1)
    assert logits is not None
    return result | {"logits": [round(v, 6) for v in logits[:24].tolist()], "following": following}


def pixels_mean(pixels: Tensor) -> list[float]:
    return [round(v, 6) for v in (pixels.mean().item(), pixels.std().item())]


def load(checkpoint: Path, class_name: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    family = import_module(f"llava.model.language_model.llava_{'qwen' if 'Qwen' in class_name else 'llama'}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, info = getattr(family, class_name).from_pretrained(checkpoint, output_loading_info=True)
    print(checkpoint.name, {name: sorted(map(str, found))[:3] for name, found in info.items() if found})
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    return model.eval(), tokenizer


def record_llava_15(folder: Path) -> dict[str, Any]:
    from llava.mm_utils import process_images, tokenizer_image_token

    result: dict[str, Any] = {}
    for name, options in {
        "frozen": {}, "inside": {"tower_inside": True}, "unfrozen": {"tower_inside": True, "unfrozen": True},
    }.items():  # fmt: skip
        model, tokenizer = load(write_llava_15(folder / name, **options), "LlavaLlamaForCausalLM")
        ids = tokenizer_image_token(PROMPT, tokenizer)
        result["input_ids"] = ids
        for shape, size in SIZES.items() if name == "frozen" else [("wide", SIZES["wide"])]:
            pixels = process_images([draw(size)], model.get_vision_tower().image_processor, model.config)
            found = run(model, ids, list(pixels), [size], "image") | {"pixels": pixels_mean(pixels)}
            result[f"{name}_{shape}"] = found
    return result


def record_llava_next(folder: Path) -> dict[str, Any]:
    from llava.mm_utils import process_images, tokenizer_image_token

    builder = import_module("llava.model.multimodal_encoder.builder")
    # A tower that exists as a folder is taken for a CLIP there, whatever it is.
    vars(builder)["os"] = type("os", (), {"path": type("path", (), {"exists": staticmethod(lambda path: False)})})
    checkpoint = write_llava_next(folder)
    model, tokenizer = load(checkpoint, "LlavaQwenForCausalLM")
    ids = tokenizer_image_token(PROMPT, tokenizer)
    result: dict[str, Any] = {"input_ids": ids}
    processor = model.get_vision_tower().image_processor
    model.config.image_grid_pinpoints = [list(pair) for pair in model.config.image_grid_pinpoints]
    for shape, size in SIZES.items():
        pixels = process_images([draw(size)], processor, model.config)
        found = run(model, ids, list(pixels), [size], "image") | {"pixels": pixels_mean(pixels[0])}
        result[shape] = found | {"views": len(pixels[0])}
    model.config.image_aspect_ratio = "anyres_max_2"
    pixels = process_images([draw(SIZES["square"])], processor, model.config)
    result["shrunk_square"] = run(model, ids, list(pixels), [SIZES["square"]], "image")
    frames = [np.array(draw(SIZES["square"], seed)) for seed in range(FRAMES)]
    video = processor.preprocess(frames, return_tensors="pt")["pixel_values"]
    for position in ("one_token", "grid", "frame", "no_token"):
        model.config.mm_newline_position = position
        result[f"video_{position}"] = run(model, ids, [video], [SIZES["square"]], "video")
    return result


def record_llava_st(folder: Path) -> dict[str, Any]:
    packer = import_module("llava.model.multimodal_resampler.token_packer")
    # Its widths are constants of a model of seven thousand millions.
    whole_module = packer.TokenPackerModule
    narrow = {"visual_dim": 64, "hidden_size": 64, "embed_dim": PACKER_WIDTH}
    vars(packer)["TokenPackerModule"] = lambda **options: whole_module(**options | narrow)
    model, tokenizer = load(write_llava_st(folder), "LlavaQwenForCausalLM")
    word = tokenizer("A").input_ids[:1]
    with torch.no_grad():
        slow, fast = model.model.vision_resampler(projected_frames(), slow=False)
        # One token, which is all that it takes without media: its logits, and those of the bins behind them.
        logits = model(torch.tensor([word]), images=[], variables=[None]).logits[0, -1]
    return {
        "fast": summarize(fast.flatten(0, 1)),
        "slow": summarize(slow.flatten(0, 1)),
        "word": word[0],
        "logits": [round(v, 6) for v in logits[:12].tolist()],
        "bins": [round(v, 6) for v in logits[-300::25].tolist()],
    }


if __name__ == "__main__":
    if sys.argv[1] in ("llava_15", "llava_next", "llava_st"):
        sys.path.insert(0, sys.argv[2])
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
        recorded = globals()[f"record_{sys.argv[1]}"](Path(sys.argv[3]))
        Path(sys.argv[3], f"{sys.argv[1]}.json").write_text(json.dumps(recorded))
    else:  # Each in a process of its own: all are named llava.
        *clones, folder = sys.argv[1:]
        whole = {}
        for name, clone in zip(("llava_15", "llava_next", "llava_st"), clones, strict=True):
            Path(folder).mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, __file__, name, clone, folder], check=True)
            whole[name] = json.loads(Path(folder, f"{name}.json").read_text())
        _EXPECTED.write_text(json.dumps(whole, separators=(",", ":")) + "\n")
