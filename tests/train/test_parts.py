"""What trains, at which rate, and the tables that say so."""

from __future__ import annotations

import pytest
import torch

from llava.train.arguments import PARTS
from llava.train.parts import fuse_gelu, parameter_groups, part_of, parts_table, set_trainable_parts, unfused_gelus

RATES = {"mm_vision_tower": 1e-6, "mm_mlp_adapter": 1e-3, "mm_vision_resampler": 2e-3, "mm_language_model": 3e-4}


def trained_parts(model) -> set[str]:
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("parts", [PARTS[:1], PARTS[1:2], PARTS[1:3], PARTS[1:], PARTS])
def test_exactly_the_named_parts_train(load_tiny, parts: tuple[str, ...]) -> None:
    model = load_tiny().model
    set_trainable_parts(model, parts)
    assert trained_parts(model) == set(parts)


def test_the_language_model_is_all_of_it(load_tiny) -> None:
    for name in ("llava_gpt2", "llava_llama"):
        model = load_tiny(name).model
        set_trainable_parts(model, ["mm_language_model"])
        assert model.get_input_embeddings().weight.requires_grad
        assert model.get_output_embeddings().weight.requires_grad
        assert all(p.requires_grad for n, p in model.named_parameters() if part_of(n) == "mm_language_model")


def test_only_a_freeze_flag_freezes_embeddings(load_tiny) -> None:
    model = load_tiny("llava_llama").model
    set_trainable_parts(model, ["mm_language_model"], freeze_embeddings=True)
    assert not model.get_input_embeddings().weight.requires_grad
    assert not model.get_output_embeddings().weight.requires_grad
    assert model.get_model().layers[0].mlp.up_proj.weight.requires_grad


def test_a_trained_tower_joins_the_checkpoint(load_tiny, tmp_path) -> None:
    from safetensors.torch import load_file

    model = load_tiny().model
    set_trainable_parts(model, ["mm_vision_tower"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any("vision_tower" in name for name in saved)
    unused = [name for name, p in model.named_parameters() if part_of(name) == PARTS[0] and not p.requires_grad]
    assert unused == ["transformer.vision_tower.vision_tower.embeddings.mask_token"]


def test_every_trained_tower_parameter_is_used(load_tiny, mixed_data) -> None:
    from llava.data.collator import SupervisedCollator, model_inputs
    from llava.data.dataset import SupervisedDataset
    from llava.data.records import read_records

    loaded = load_tiny()
    set_trainable_parts(loaded.model, ["mm_vision_tower"])
    dataset = SupervisedDataset(read_records(str(mixed_data)), loaded.tokenizer, loaded.vision, 512)
    loaded.model.train()(**model_inputs(SupervisedCollator(0)([dataset[0]]))).loss.backward()
    for name, parameter in loaded.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_text_model_without_the_named_part_is_an_error(gpt2_dir) -> None:
    from llava.model.loading import load_model

    with pytest.raises(ValueError, match="trains nothing: this model has only mm_language_model"):
        set_trainable_parts(load_model(str(gpt2_dir)).model, ["mm_mlp_adapter"])


def test_groups_cover_each_trainable_parameter_once(load_tiny) -> None:
    model = load_tiny("llava_llama").model
    set_trainable_parts(model, PARTS[1:])
    groups = parameter_groups(model, RATES, 0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        assert group["lr"] == RATES[group["part"]]
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}


def test_table_says_what_trains(load_tiny) -> None:
    model = load_tiny().model
    set_trainable_parts(model, PARTS[1:2])
    rows = {line.split()[0]: line.split()[1:] for line in parts_table(model, RATES).splitlines()[1:]}
    assert rows["mm_mlp_adapter"] == ["2,112", "2,112", "0.001"]
    assert rows["mm_language_model"][1:] == ["0", "frozen"]
    assert rows["all"][0] == f"{sum(p.numel() for p in model.parameters()):,}"


def test_a_fused_gelu_is_the_same_function(load_tiny) -> None:
    model = load_tiny().model.eval()
    ids = torch.arange(5, 25).unsqueeze(0)
    plain = model(input_ids=ids).logits
    assert len(unfused_gelus(model)) == model.config.num_hidden_layers
    fuse_gelu(model)
    assert unfused_gelus(model) == []
    fused = model(input_ids=ids).logits
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="--fused_gelu: no activation of this model is gelu_new"):
        fuse_gelu(model)
