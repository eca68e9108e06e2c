"""Loads exported folders where there is no library but torch and transformers, and compares what they give.

Run by ``export_environments.py`` with the Python of each environment; takes folders, prints a line of JSON. Beside
each folder ``NAME`` lie ``NAME.json`` and ``NAME.safetensors``, what the checkpoint gives in the library.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer


def compare_text(folder: Path, expected: dict, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """Ids, offsets and logits of each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    largest = 0.0
    for number, text in enumerate(expected["texts"]):
        encoded = tokenizer(text["text"], return_offsets_mapping=True)
        assert encoded["input_ids"] == text["ids"], (folder, text["text"])
        assert [list(pair) for pair in encoded["offset_mapping"]] == text["offsets"], (folder, text["text"])
        inputs = {name: torch.tensor([encoded[name]]) for name in encoded if name != "offset_mapping"}
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        largest = max(largest, float((logits - tensors[f"text.{number}"]).abs().max()))
    return {"class": type(model).__name__, "tokenizer": type(tokenizer).__name__, "text": largest}


def compare_multimodal(folder: Path, expected: dict, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """Ids, pixels, logits and what is generated for each text with media, as the BabyLM pipeline calls them."""
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    largest = 0.0
    for number, prompt in enumerate(expected["prompts"]):
        frames = [Image.fromarray(frame.numpy()) for frame in tensors[f"frames.{number}"]]
        media = {prompt["kind"]: frames if prompt["kind"] == "videos" else frames[0]}
        inputs = processor(text=prompt["text"], **media, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt["ids"], (folder, prompt["text"])
        options = {name: inputs[name] for name in ("modalities", "image_sizes") if name in inputs}
        with torch.no_grad():
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"], **options,
            ).logits[0]  # fmt: skip
        largest = max(largest, float((logits - tensors[f"logits.{number}"]).abs().max()))
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.tolist() == prompt["answer"], (folder, prompt["text"], answer.tolist(), prompt["answer"])
    return {"class": type(model).__name__, "processor": type(processor).__name__, "media": largest}


def main() -> None:
    assert importlib.util.find_spec("llava") is None, "the library must not be there"
    transformers.logging.set_verbosity_error()
    results: dict[str, object] = {}
    for name in sys.argv[1:]:
        folder = Path(name)
        if folder.parent.name == "multimodal" and int(transformers.__version__.partition(".")[0]) < 5:
            continue  # Its code is for the releases that the library is for; text exports are for older ones too.
        expected = json.loads(folder.with_name(f"{folder.name}.json").read_text())
        try:
            compare = compare_text if "texts" in expected else compare_multimodal
            found = compare(folder, expected, load_file(folder.with_name(f"{folder.name}.safetensors")))
        except Exception as error:  # noqa: BLE001 (one that fails is a result)
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        results[f"{folder.parent.name}/{folder.name}"] = found
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "exports": results}))


if __name__ == "__main__":
    main()
