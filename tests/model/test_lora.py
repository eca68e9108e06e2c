"""LoRA on every backbone: what it wraps, what it trains, its files, and its merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

pytest.importorskip("peft", reason="LoRA needs peft: pip install 'llava-babylm[lora]'")

from llava.model.loading import load_model
from llava.model.lora import add_adapters, has_adapters, is_adapter_parameter, load_adapter_weights, merge_adapters
from llava.model.merge_lora import main as merge_main
from llava.model.quantization import find_linear_layers
from llava.model.visual import vision_module_of
from llava.train.arguments import PARTS
from llava.train.parts import parameter_groups, part_of, parts_table, set_trainable_parts
from tests.conftest import FAMILIES

every_backbone = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def load_adapted(load_tiny, backbone_dirs):
    """A function that loads a tiny backbone with adapters, of which none is zero."""

    def load(name: str = "llava_gpt2", **changes):
        loaded = load_tiny(name, **changes)
        add_adapters(loaded.model, str(backbone_dirs[name]), rank=4, alpha=8, dropout=0.0)
        torch.manual_seed(7)
        for key, parameter in loaded.model.named_parameters():
            if is_adapter_parameter(key):
                nn.init.normal_(parameter, std=0.2)
        return loaded

    return load


@pytest.fixture(scope="module")
def make_batch(make_batch):
    return lambda loaded, rows=(0, 2, 4, 5): make_batch(loaded, rows)


@pytest.fixture(scope="module")
def compute_logits(make_batch):
    def compute(loaded) -> torch.Tensor:
        batch = make_batch(loaded)
        with torch.no_grad():
            return loaded.model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits

    return compute


def save(loaded, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@every_backbone
def test_adapters_sit_on_linear_layers_of_the_blocks_alone_and_change_nothing_yet(
    name: str, load_tiny, backbone_dirs, compute_logits
) -> None:
    loaded = load_tiny(name)
    expected = compute_logits(loaded)
    layers = find_linear_layers(loaded.model)
    assert loaded.model.get_output_embeddings() not in [loaded.model.get_submodule(key) for key in layers]
    in_blocks = {int(part) for key in layers for part in key.split(".") if part.isdigit()}
    assert in_blocks == set(range(loaded.model.config.num_hidden_layers))
    add_adapters(loaded.model, str(backbone_dirs[name]), rank=4, alpha=8, dropout=0.0)
    wrapped = {key.partition(".lora_")[0] for key, _ in loaded.model.named_parameters() if is_adapter_parameter(key)}
    assert wrapped == set(layers)
    assert not any(vision_module_of(key) for key in wrapped)
    assert torch.equal(compute_logits(loaded), expected)


@every_backbone
def test_adapters_stand_for_the_language_model(name: str, load_adapted, make_batch) -> None:
    loaded = load_adapted(name)
    set_trainable_parts(loaded.model, PARTS[1:])
    loaded.model.train()(**make_batch(loaded, (0, 1, 2, 4, 5))).loss.backward()
    for key, parameter in loaded.model.named_parameters():
        trains = is_adapter_parameter(key) or part_of(key) in PARTS[1:3]
        assert parameter.requires_grad == trains, key
        assert (parameter.grad is not None) == trains, key
        if is_adapter_parameter(key):
            assert part_of(key) == "mm_language_model"
            assert parameter.grad.abs().sum() > 0, key


@every_backbone
def test_gradient_checkpointing_reaches_the_adapters(name: str, load_adapted, make_batch) -> None:
    # With a frozen projector no input of the first block asks for a gradient of its own accord.
    grads = []
    for checkpointing in (False, True):
        loaded = load_adapted(name)
        set_trainable_parts(loaded.model, PARTS[3:])
        if checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": True})
        loaded.model.train()(**make_batch(loaded, (0, 5))).loss.backward()
        grads.append([p.grad for key, p in loaded.model.named_parameters() if is_adapter_parameter(key)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@every_backbone
def test_merging_keeps_the_logits(name: str, load_adapted, compute_logits, tmp_path: Path, capsys) -> None:
    loaded = load_adapted(name)
    expected = compute_logits(loaded)
    save(loaded, tmp_path / "adapters")
    words = ["--model_path", str(tmp_path / "adapters"), "--output_dir", str(tmp_path / "merged")]
    assert merge_main(words) == 0
    merged = load_model(str(tmp_path / "merged"))
    assert not has_adapters(merged.model)
    assert merged.new_parameters == []
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(compute_logits(merged), expected, atol=1e-5, rtol=0)
    merge_adapters(loaded.model)
    assert not [key for key, _ in loaded.model.named_modules() if "lora" in key or "base_layer" in key]
    torch.testing.assert_close(compute_logits(loaded), expected, atol=1e-5, rtol=0)


@every_backbone
def test_save_and_reload_are_exact(name: str, load_adapted, compute_logits, tmp_path: Path) -> None:
    loaded = load_adapted(name)
    with torch.no_grad():
        for module in (loaded.model.get_model().mm_projector, loaded.model.get_model().vision_resampler):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # Rows of visual tokens are read, not computed again: another machine's mean may differ in a bit.
        loaded.model.get_output_embeddings().weight[loaded.vision.visual_token_ids] += 0.1
    expected = compute_logits(loaded)
    again = load_model(str(save(loaded, tmp_path)))
    assert has_adapters(again.model)
    assert again.vision == loaded.vision
    assert again.new_parameters == []
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert torch.equal(compute_logits(again), expected)


def test_adapters_of_a_kind_of_attention_reload_on_the_plain_base(load_adapted, compute_logits, tmp_path: Path) -> None:
    loaded = load_adapted("llava_qwen", variant="alternating")
    expected = compute_logits(loaded)
    again = load_model(str(save(loaded, tmp_path)))
    assert again.model.config.model_type == "llava_qwen_with_alternating_attn"
    assert torch.equal(compute_logits(again), expected)


def test_the_learned_newline_of_image_tiles_is_kept(load_adapted, tmp_path: Path) -> None:
    loaded = load_adapted(image_aspect_ratio="anyres", patch_merge_type="spatial_unpad", resampler_type=None)
    set_trainable_parts(loaded.model, PARTS[1:2] + PARTS[3:])
    newline = loaded.model.get_model().image_newline
    assert newline.requires_grad
    nn.init.normal_(newline)
    again = load_model(str(save(loaded, tmp_path)))
    assert torch.equal(again.model.get_model().image_newline, newline)


def names_in(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return set(stored.keys())


def test_files_are_pefts_and_hold_neither_base_nor_tower(load_adapted, backbone_dirs, tmp_path: Path) -> None:
    loaded = load_adapted("llava_llama")
    save(loaded, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(backbone_dirs["llava_llama"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    adapters = names_in(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in adapters)
    assert len(adapters) == 2 * 2 * 7
    others = names_in(tmp_path / "non_lora_trainables.safetensors")
    assert {name.split(".")[1] for name in others} == {"mm_projector", "vision_resampler", "input", "output"}


def test_peft_itself_reads_the_adapters(load_adapted, load_tiny, make_batch, tmp_path: Path) -> None:
    from peft import PeftModel

    loaded, plain = load_adapted(), load_tiny()
    save(loaded, tmp_path)
    wrapped = PeftModel.from_pretrained(plain.model, tmp_path)
    batch = make_batch(loaded)
    torch.testing.assert_close(wrapped.eval()(**batch).loss, loaded.model.eval()(**batch).loss, atol=1e-6, rtol=0)


def test_a_trained_tower_is_stored_and_reloads_without_its_source(
    load_adapted, tower_dir: Path, compute_logits, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tower_dir, tmp_path / "tower"))
    loaded = load_adapted(vision_tower=str(moved))
    set_trainable_parts(loaded.model, PARTS)
    with torch.no_grad():
        for parameter in loaded.model.get_vision_tower().parameters():
            parameter.mul_(1.1)
    expected = compute_logits(loaded)
    save(loaded, tmp_path / "saved")
    shutil.rmtree(moved)
    assert torch.equal(compute_logits(load_model(str(tmp_path / "saved"))), expected)


def test_a_frozen_tower_that_changed_is_an_error(load_adapted, tower_dir: Path, tmp_path: Path) -> None:
    from conftest import make_tower

    save(load_adapted(), tmp_path / "saved")
    other = make_tower(tmp_path / "other", layers=4)
    with pytest.raises(ValueError, match="not the one this model was trained with"):
        load_model(str(tmp_path / "saved"), vision_tower=str(other))


def test_text_models_take_adapters_too(backbone_dirs, tmp_path: Path) -> None:
    loaded = load_model(str(backbone_dirs["llava_gpt2"]))
    add_adapters(loaded.model, str(backbone_dirs["llava_gpt2"]), rank=2, alpha=2, dropout=0.0)
    for key, parameter in loaded.model.named_parameters():
        if is_adapter_parameter(key):
            nn.init.normal_(parameter)
    ids = torch.arange(20)[None]
    again = load_model(str(save(loaded, tmp_path)))
    assert torch.equal(again.model.eval()(ids).logits, loaded.model.eval()(ids).logits)


def test_generation_with_cache_equals_generation_without(load_adapted, make_batch) -> None:
    loaded = load_adapted("llava_llama")
    batch = make_batch(loaded, (0,))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "modalities")}
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = loaded.model.eval().generate(**inputs, **options)
    assert torch.equal(cached, loaded.model.generate(**inputs, **options, use_cache=False))


def test_a_base_model_that_moved_is_given(load_adapted, backbone_dirs, compute_logits, tmp_path: Path) -> None:
    base = Path(shutil.copytree(backbone_dirs["llava_gpt2"], tmp_path / "base"))
    loaded = load_adapted()
    loaded.model.peft_config["default"].base_model_name_or_path = str(base)
    save(loaded, tmp_path / "saved")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="cannot be read; give its folder with --model_base"):
        load_model(str(tmp_path / "saved"))
    again = load_model(str(tmp_path / "saved"), model_base=str(moved))
    assert torch.equal(compute_logits(again), compute_logits(loaded))


def test_a_relative_base_is_found_from_anywhere(load_tiny, backbone_dirs, monkeypatch) -> None:
    model = load_tiny().model
    monkeypatch.chdir(backbone_dirs["llava_gpt2"].parent)
    add_adapters(model, backbone_dirs["llava_gpt2"].name, rank=2, alpha=2, dropout=0.0)
    assert model.peft_config["default"].base_model_name_or_path == str(backbone_dirs["llava_gpt2"])


def test_a_base_of_another_type_is_an_error(load_adapted, backbone_dirs, tmp_path: Path) -> None:
    save(load_adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"is not the base model of the adapters .* it has model_type 'llava_llama'"):
        load_model(str(tmp_path), model_base=str(backbone_dirs["llava_llama"]))


def test_a_base_for_a_complete_checkpoint_is_an_error(backbone_dirs) -> None:
    folder = str(backbone_dirs["llava_gpt2"])
    with pytest.raises(ValueError, match=r"--model_base .* holds no adapters"):
        load_model(folder, model_base=folder)


def test_weights_of_another_rank_are_an_error(load_adapted, load_tiny, backbone_dirs, tmp_path: Path) -> None:
    save(load_adapted(), tmp_path)
    other = load_tiny()
    add_adapters(other.model, str(backbone_dirs["llava_gpt2"]), rank=2, alpha=8, dropout=0.0)
    with pytest.raises(
        ValueError, match=r"does not fit its base model in 16 tensors \(.*\): .* is \(4, 32\) in the file"
    ):
        load_adapter_weights(other.model, str(tmp_path))
    (tmp_path / "non_lora_trainables.safetensors").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint with adapters: it has no non_lora"):
        load_model(str(tmp_path))


def test_adapters_of_another_kind_are_an_error(load_adapted, tmp_path: Path) -> None:
    save(load_adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type 'IA3'"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [("plain", "merged", "holds no adapters"), ("adapters", "adapters", "holds adapters already")],
)
def test_merge_refuses(
    load_adapted, backbone_dirs, tmp_path: Path, capsys, model: str, output: str, message: str
) -> None:
    save(load_adapted(), tmp_path / "adapters")
    path = str(backbone_dirs["llava_gpt2"]) if model == "plain" else str(tmp_path / model)
    assert merge_main(["--model_path", path, "--output_dir", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err


def test_merging_nothing_is_an_error(load_tiny) -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_adapters(load_tiny().model)


def test_table_and_groups_know_the_adapters(load_adapted) -> None:
    model = load_adapted().model
    set_trainable_parts(model, PARTS[1:])
    rates = dict(zip(PARTS, (1.0, 2.0, 3.0, 4.0), strict=True))
    adapters = sum(p.numel() for key, p in model.named_parameters() if is_adapter_parameter(key))
    row = next(line for line in parts_table(model, rates).splitlines() if line.startswith("mm_language_model"))
    assert row.split()[2:] == [f"{adapters:,}", "4"]
    assert "rank 4 (alpha 8) on 8 linear layers" in parts_table(model, rates)
    groups = [group for group in parameter_groups(model, rates, 0.1) if group["part"] == "mm_language_model"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(4.0, 0.1)]
    assert sum(p.numel() for p in groups[0]["params"]) == adapters
