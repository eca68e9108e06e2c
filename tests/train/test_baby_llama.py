"""The English pipeline: its recipes and the commands of docs/recipes.md, one phase after the other, on a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.data.localized_narratives.__main__ import main as prepare
from llava.data.train_tokenizer import main as train_tokenizer
from llava.model.loading import load_model
from llava.model.random_weights import main as random_weights
from llava.train.arguments import DEFAULT_PARTS
from llava.train.command_line import parse_arguments
from llava.train.train import main as train

RECIPES = Path(__file__).parents[2] / "llava" / "recipes"
THINGS = ("a red ball", "a small dog", "an old chair", "the blue sky")


@pytest.fixture(scope="module")
def narratives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files of the three phases, made from rows with traces; the images lie beside them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("narratives")
    rows = []
    for number in range(6):
        Image.new("RGB", (90, 60), (40 * number, 90, 200)).save(folder / f"{number:012d}.jpg")
        thing, other = THINGS[number % 4], THINGS[(number + 1) % 4]
        timed = [("In this image there is", 0.0, 1.0), (f"{thing},", 1.5, 2.5), (f"{other}.", 3.0, 4.0)]
        trace = [{"x": 0.2 + 0.1 * (t % 3), "y": 0.3 + 0.05 * (t % 4), "t": t / 10} for t in range(11, 40)]
        rows.append(
            {
                "dataset_id": "coco", "image_id": str(number), "annotator_id": 1,
                "caption": " ".join(words for words, _, _ in timed), "traces": [trace],
                "timed_caption": [{"utterance": w, "start_time": s, "end_time": e} for w, s, e in timed],
            }
        )  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare([str(folder / "rows.jsonl"), "--images", str(folder), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def baby_llama(narratives: Path) -> Path:
    """A tiny Llama with random weights and a tokenizer of its own, by the commands that the documents give."""
    shape = json.loads((RECIPES / "baby_llama" / "config.json").read_text())
    shape |= {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 256}
    (narratives / "shape").mkdir()
    (narratives / "shape" / "config.json").write_text(json.dumps(shape))
    texts, tokenizer = str(narratives / "localized_narratives_t.jsonl"), str(narratives / "tokenizer")
    assert train_tokenizer(["--data", texts, "--vocab_size", "380", "--output_dir", tokenizer]) == 0
    assert random_weights(
        ["--model_path", str(narratives / "shape"), "--tokenizer", tokenizer, "--output_dir", str(narratives / "start")]
    ) == 0  # fmt: skip
    return narratives / "start"


def run(phase: str, start: Path, folder: Path, *flags: str) -> Path:
    """Two steps of a phase; returns its checkpoint."""
    output = folder / f"output_{phase}"
    train(
        [
            "--config", f"baby_llama_{phase}.yaml", "--model_name_or_path", str(start),
            "--data_path", str(folder / f"localized_narratives_{phase}.jsonl"), "--output_dir", str(output),
            "--max_steps", "2", "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1",
            "--use_cpu", "true", "--dataloader_num_workers", "0", "--save_strategy", "no", *flags,
        ]
    )  # fmt: skip
    return output


def test_the_three_phases_follow_one_another(narratives: Path, baby_llama: Path, tower_dir: Path) -> None:
    text = run("t", baby_llama, narratives)
    images = run("ti", text, narratives, "--vision_tower", str(tower_dir), "--mm_vision_select_layer", "-1")
    boxes = run("tim", images, narratives)
    plain, seeing, grounded = (load_file(folder / "model.safetensors") for folder in (text, images, boxes))
    assert not any("mm_projector" in name or "coordinates" in name for name in plain)
    assert any("mm_projector" in name for name in seeing)
    assert not any("coordinates" in name for name in seeing)
    assert {name.split(".")[-1] for name in grounded if "coordinates" in name} == {
        f"{axis}_{direction}" for axis in ("temporal", "height", "width") for direction in ("input", "output")
    }
    # Two steps from the phase before move weights a little; from random weights they would be others altogether.
    name = "model.layers.0.self_attn.q_proj.weight"
    for before, after in ((plain, seeing), (seeing, grounded)):
        moved = (after[name] - before[name]).abs().max()
        assert 0 < moved < 0.01
    model = load_model(str(boxes)).model
    assert model.grounding is not None
    assert model.vision is not None
    assert model.vision.image_aspect_ratio == "pad"
    assert torch.isfinite(model.get_model().coordinates.width_output).all()


def test_boxes_without_their_stage_are_an_error(
    narratives: Path, baby_llama: Path, tower_dir: Path, tmp_path: Path
) -> None:
    output = "--output_dir", str(tmp_path)
    with pytest.raises(ValueError, match=r"has coordinates \(variables\), but the model has none; give --stage 2"):
        run(
            "tim",
            baby_llama,
            narratives,
            *output,
            "--stage",
            "1",
            "--grounding",
            "none",
            "--vision_tower",
            str(tower_dir),
        )
    with pytest.raises(ValueError, match="--stage 3 starts from a checkpoint of stage 2"):
        run("tim", baby_llama, narratives, *output, "--stage", "3")
    with pytest.raises(ValueError, match="--grounding needs a model that sees; give --vision_tower"):
        run("tim", baby_llama, narratives, *output[:2])


@pytest.mark.parametrize("phase", ["t", "ti", "tim"])
def test_recipes_are_complete(phase: str, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    model, data, training = parse_arguments(["--config", f"baby_llama_{phase}.yaml", *flags])
    assert data.plain_lm
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert model.stage == ("2" if phase == "tim" else "1")
    assert ("mm_coordinates" in model.tunable_parts) == (phase == "tim")
    assert set(model.tunable_parts) - {"mm_coordinates"} <= set(DEFAULT_PARTS.split(","))
    assert model.vision_tower == ("facebook/dinov2-large" if phase == "ti" else None)


def test_the_shape_of_baby_llama() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(RECIPES / "baby_llama")
    assert (config.num_hidden_layers, config.hidden_size, config.max_position_embeddings) == (12, 768, 1024)
