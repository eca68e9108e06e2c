"""Exports of every family of language models, loaded in environments that have torch and transformers and no more.

    python -m venv old && old/bin/pip install torch transformers==4.51.3 numpy pillow
    python benchmarks/export_environments.py --python old/bin/python ... --output benchmarks/export_environments.json

Checkpoints are tiny and random, made as the tests make theirs. Reported is the largest difference of a logit, in
float32, between the library on the checkpoint and transformers alone on the export.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.data.media import cut_views, fit_frames
from llava.io import write_json
from llava.model.export.__main__ import export_checkpoint
from llava.model.loading import LoadedModel, load_model
from llava.serve.generate import Captioner, Request
from llava.types import VisualInput

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tests.conftest import TINY_BACKBONES, TINY_VISION, TinyBackbones, make_tower  # noqa: E402
from tests.model.multimodal_encoder.tiny_towers import TINY_TOWERS, write_tower  # noqa: E402

TEXTS = [
    "Il gatto dorme sul divano: è così, e il cane guarda la strada.",
    " una  stella\n\tgialla 日本 \U0001f642",
    "a",
]


def make_tokenizer(folder: Path) -> Path:
    """The tests' tokenizer: byte-level BPE with an end of text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS * 4, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
    return folder


def make_checkpoint(folder: Path, plain: Path, tower: Path, **settings: Any) -> LoadedModel:
    """A checkpoint with vision whose embeddings, head and vision modules are random, written to a folder."""
    torch.manual_seed(3)
    loaded = load_model(str(plain), vision_tower=str(tower), **{**TINY_VISION, **settings})
    for parameter in (loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight):
        torch.nn.init.normal_(parameter, std=0.1)  # type: ignore[arg-type]
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return loaded


@torch.no_grad()
def write_expected(export: Path, loaded: LoadedModel) -> None:
    """What the library gives for the texts, beside the export."""
    model, rows, tensors = loaded.model.eval(), [], {}
    words = json.loads((export / "config.json").read_text())["vocab_size"]
    for number, text in enumerate(TEXTS):
        encoded = loaded.tokenizer(text, return_offsets_mapping=True)
        rows.append({"text": text, "ids": encoded["input_ids"], "offsets": encoded["offset_mapping"]})
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0]
        tensors[f"text.{number}"] = logits[:, :words].contiguous()
    write_json(export.with_name(f"{export.name}.json"), {"texts": rows})
    save_file(tensors, export.with_name(f"{export.name}.safetensors"))


COMBINATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "packer": ("llava_gpt2", "dinov2", {}),
    "packer_images": ("llava_gpt2", "dinov2", {"resample_images": True}),
    "patches": ("llava_llama", "clip_vision_model", {"resampler_type": "none"}),
    "pooler": ("llava_opt", "dinov2_with_registers", {"resampler_type": "none", "projector_type": "pooler"}),
    "perceiver": ("llava_qwen", "siglip_vision_model", {"resampler_type": "perceiver", "resample_images": True}),
    "qformer": ("llava_gemma", "siglip2_vision_model", {"resampler_type": "qformer", "qformer_latents": 4}),
    "spatial_pool": ("llava_mistral", "dinov3_vit", {"resampler_type": "spatial_pool", "projector_type": "linear"}),
    "masked_drop": ("llava_mixtral", "dinov2", {"resampler_type": "masked_drop", "projector_type": "mlp2x_res1x_gelu"}),
    "padded": ("llava_qwen_moe", "dinov2", {"image_aspect_ratio": "pad"}),
    "anyres": ("llava_mpt", "clip_vision_model", {"resampler_type": "none", "image_aspect_ratio": "anyres_max_2",
                                                  "patch_merge_type": "spatial_unpad"}),
    "lape": ("llava_gpt_neox", "dinov2", {"grounding": "lape", "num_temporal_tokens": 5, "num_spatial_tokens": 4}),
    "alternating": ("llava_gpt2", "dinov2", {"variant": "alternating"}),
    "alternating_cross": ("llava_llama", "dinov2", {"variant": "alternating_cross"}),
}  # fmt: skip
"""Family, tower and settings of each checkpoint that is exported with all its parts."""


@torch.no_grad()
def write_prompts(export: Path, loaded: LoadedModel) -> None:
    """What the library gives for texts with a picture or a clip, beside the export."""
    rows, tensors = [], {}
    writer = Captioner(loaded).prompts
    for number, (kind, text) in enumerate(
        (("images", "Il gatto"), ("images", "un <image> è giallo"), ("videos", "Il"))
    ):
        count = 3 if kind == "videos" else 1
        frames = torch.randint(256, (count, 50, 90, 3), dtype=torch.uint8)
        cut = loaded.vision.anyres is not None and kind == "images"
        views = cut_views(frames[0], loaded.vision) if cut else fit_frames(frames, loaded.vision)
        medium = VisualInput("video" if kind == "videos" else "image", views, (50, 90), (0.0,) * count)
        prompt = writer.write(Request([medium], text))
        media = {"images": [views], "modalities": [medium.kind], "image_sizes": [(50, 90)]}
        ids = torch.tensor([prompt.ids])
        answer = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), **media, max_new_tokens=8, do_sample=False
        )
        row = {"kind": kind, "text": text, "ids": prompt.ids, "answer": answer[0, len(prompt.ids) :].tolist()}
        rows.append(row)
        tensors[f"frames.{number}"] = frames
        tensors[f"logits.{number}"] = loaded.model(ids, **media).logits[0].contiguous()
    write_json(export.with_name(f"{export.name}.json"), {"prompts": rows})
    save_file(tensors, export.with_name(f"{export.name}.safetensors"))


def make_exports(folder: Path) -> list[Path]:
    """An export of each family as text, and of each combination with all its parts."""
    plain = TinyBackbones(folder / "plain", make_tokenizer(folder / "tokenizer"))
    tower = make_tower(folder / "tower")
    exports = []
    for name, (family, kind, settings) in COMBINATIONS.items():
        source = write_tower(folder / "towers" / name, kind, TINY_TOWERS[kind])
        loaded = make_checkpoint(folder / "checkpoints" / name, plain[family], source, **settings)
        exports.append(folder / "multimodal" / name)
        export_checkpoint(str(folder / "checkpoints" / name), str(exports[-1]), "multimodal")
        write_prompts(exports[-1], loaded)
    for name in TINY_BACKBONES:
        changed = plain[name] / "config.json"
        settings = json.loads(changed.read_text())
        if "rope_parameters" in settings:
            settings["rope_parameters"]["rope_theta"] = 123456.0
            changed.write_text(json.dumps(settings))
        checkpoint = folder / "checkpoints" / name
        loaded = make_checkpoint(checkpoint, plain[name], tower)
        exports.append(folder / "text" / name)
        export_checkpoint(str(checkpoint), str(exports[-1]), "text")
        write_expected(exports[-1], loaded)
    return exports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", required=True, help="the Python of each environment")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exports = make_exports(Path(folder))
        results = []
        for python in args.python:
            # Isolated (-I): nothing of this environment is seen there.
            command = [python, "-I", str(Path(__file__).with_name("export_loads.py")), *map(str, exports)]
            env = {**os.environ, "HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            if done.returncode:
                raise SystemExit(f"{python}: {done.stderr}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1], indent=1))
    write_json(Path(args.output), {"environments": results})


if __name__ == "__main__":
    main()
