"""Loading: what is refused, what is translated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.loading import load_model
from llava.model.transfer import load_adapter


def copy_checkpoint(source: Path, target: Path, **changes) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_unknown_model_type_lists_the_known_ones(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(gpt2_dir, tmp_path / "m", model_type="bert")
    with pytest.raises(
        ValueError, match=r"unknown model_type 'bert'; known: gemma, gemma2, .*gpt2, .*, llava_gemma, .*--plugins"
    ):
        load_model(str(folder))


def test_a_name_is_a_hint_only_without_a_model_type(gpt2_dir: Path, tmp_path: Path) -> None:
    hinted = copy_checkpoint(gpt2_dir, tmp_path / "bambi-it", model_type=None)
    assert load_model(str(hinted)).model.config.model_type == "llava_gpt2"
    silent = copy_checkpoint(gpt2_dir, tmp_path / "other", model_type=None)
    with pytest.raises(ValueError, match="has no model_type"):
        load_model(str(silent))


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(gpt2_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = copy_checkpoint(gpt2_dir, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(5)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the model has embeddings for \d+"):
        load_model(str(folder))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing"])
def test_a_missing_folder_is_one_clear_error(path: str) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        load_model(path)


def test_a_folder_without_config_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        load_model(str(tmp_path))


def test_a_missing_tower_is_one_clear_error(gpt2_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"--vision_tower '\./no-tower' is no folder"):
        load_model(str(gpt2_dir), vision_tower="./no-tower")


def test_missing_weights_are_an_error(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = copy_checkpoint(gpt2_dir, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(key for key in weights if key.endswith("h.0.ln_1.weight")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its config\.json: it lacks"):
        load_model(str(folder))


@pytest.mark.parametrize(("setting", "value"), [("projector_type", "mlp9_gelu"), ("resampler_type", "sampler")])
def test_unknown_parts_list_the_known_ones(load_tiny, setting: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown --mm_{setting} '{value}'; known: "):
        load_tiny(**{setting: value})


@pytest.mark.parametrize("name", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_projectors_map_the_towers_width_to_the_models(load_tiny, name: str) -> None:
    projector = load_tiny(projector_type=name).model.get_model().mm_projector
    assert projector(torch.zeros(2, 5, 32)).shape == (2, 5, 32)
    assert sum(isinstance(m, torch.nn.Linear) for m in projector.modules()) == (3 if name == "mlp3x_gelu" else 1)


def test_structure_of_a_trained_checkpoint_cannot_be_changed(load_tiny, tmp_path: Path) -> None:
    loaded = load_tiny()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--mm_projector_type 'linear' was given, but the checkpoint"):
        load_model(str(tmp_path), projector_type="linear")
    assert load_model(str(tmp_path), num_frames=2, perceiver_latents=4).vision.layout.num_tokens("video", 2) == 16


def test_text_model_gains_vision_later(gpt2_dir: Path, tower_dir: Path, tmp_path: Path) -> None:
    text = load_model(str(gpt2_dir))
    assert text.vision is None
    assert not hasattr(text.model.get_model(), "mm_projector")
    text.model.save_pretrained(tmp_path)
    text.tokenizer.save_pretrained(tmp_path)
    seeing = load_model(str(tmp_path), vision_tower=str(tower_dir))
    assert seeing.vision is not None
    old = text.model.get_input_embeddings().weight
    assert torch.equal(seeing.model.get_input_embeddings().weight[: len(old)], old)


def test_adapter_weights_are_copied(load_tiny, tmp_path: Path) -> None:
    source, target = load_tiny(), load_tiny()
    with torch.no_grad():
        for parameter in source.model.get_model().mm_projector.parameters():
            parameter.add_(1.0)
    source.model.save_pretrained(tmp_path)
    copied = load_adapter(target.model, str(tmp_path))
    assert any(name.startswith("vision_resampler.") for name in copied)
    for one, other in zip(
        source.model.get_model().mm_projector.parameters(),
        target.model.get_model().mm_projector.parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_adapter_in_the_names_of_llava_st(load_tiny, tmp_path: Path) -> None:
    loaded = load_tiny()
    block = loaded.model.get_model().vision_resampler.slow
    prefix = "model.vision_resampler.token_packer_slow.devide_attention."
    theirs = {
        prefix + "attn.in_proj_weight": torch.cat([block.q_proj.weight, block.k_proj.weight, block.v_proj.weight]) + 1,
        prefix + "attn.out_proj.bias": block.o_proj.bias + 2,
        prefix + "to_k.0.weight": block.to_k[0].weight + 3,
    }
    expected = (block.k_proj.weight + 1, block.o_proj.bias + 2, block.to_k[0].weight + 3)
    torch.save({key: tensor.detach() for key, tensor in theirs.items()}, tmp_path / "mm_projector.bin")
    load_adapter(loaded.model, str(tmp_path))  # The folder, as the family's pretraining leaves it.
    for one, other in zip(expected, (block.k_proj.weight, block.o_proj.bias, block.to_k[0].weight), strict=True):
        torch.testing.assert_close(one, other)


def test_adapter_of_another_shape_or_place_is_an_error(load_tiny, tmp_path: Path) -> None:
    model = load_tiny().model
    with pytest.raises(ValueError, match="no such file"):
        load_adapter(model, str(tmp_path / "nothing.safetensors"))
    save_file({"mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"mm_projector\.0\.weight \(3, 3\)"):
        load_adapter(model, str(tmp_path / "a.safetensors"))
    for name in ("a.safetensors", "b.bin"):
        torch.save({"mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "b.bin")
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(ValueError, match=rf"--pretrain_mm_mlp_adapter .*{name} cannot be read: it is cut short"):
            load_adapter(model, str(tmp_path / name))
