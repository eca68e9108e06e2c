"""Linear layers in 8 and 4 bits: what is quantised, what is not, and that adapters train on them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES

from llava.model.loading import load_model
from llava.model.lora import add_adapters, is_adapter_parameter, merge_adapters
from llava.model.quantization import Quantization, check_bitsandbytes, count_weights, find_linear_layers, quantized_bits
from llava.train.arguments import PARTS
from llava.train.parts import parts_table, set_trainable_parts

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'llava-babylm[kbit]'"
)
FOUR, EIGHT = Quantization(4, device="cpu"), Quantization(8, device="cpu")


def make_batch(loaded, data: Path, rows: tuple[int, ...] = (0, 2, 5)) -> dict:
    from llava.data.collator import SupervisedCollator, model_inputs
    from llava.data.dataset import SupervisedDataset
    from llava.data.records import read_records

    dataset = SupervisedDataset(read_records(str(data)), loaded.tokenizer, loaded.vision, 512)
    return model_inputs(SupervisedCollator(loaded.tokenizer.pad_token_id)([dataset[i] for i in rows]))


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", [FOUR, EIGHT], ids=["4", "8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_adapted_layers_are_quantised(name: str, load_tiny, mixed_data: Path, quantization) -> None:
    plain, loaded = load_tiny(name), load_tiny(name, quantization=quantization)
    assert quantized_bits(loaded.model) == quantization.bits
    for key, parameter in loaded.model.named_parameters():
        layer = key.rpartition(".")[0]
        quantised = layer in find_linear_layers(plain.model) and key.endswith(".weight")
        assert (parameter.dtype in (torch.uint8, torch.int8)) == quantised, key
        assert quantised or parameter.dtype == torch.float32, key
    rows = loaded.vision.visual_token_ids
    for one, other in zip(
        (plain.model.get_input_embeddings(), plain.model.get_output_embeddings()),
        (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()),
        strict=True,
    ):
        assert torch.equal(one.weight[rows], other.weight[rows])
    batch = make_batch(plain, mixed_data, (5,))
    # In training mode: out of it, bitsandbytes repacks weights on some CPUs, for widths of 64 and more.
    expected, found = (each.model.train()(**batch).loss for each in (plain, loaded))
    assert 0 < abs(found - expected) < 0.1


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", [FOUR, EIGHT], ids=["4", "8"])
def test_adapters_train_on_quantised_weights_and_reload(
    load_tiny, backbone_dirs, mixed_data: Path, tmp_path: Path, quantization
) -> None:
    loaded = load_tiny(quantization=quantization)
    add_adapters(loaded.model, str(backbone_dirs["llava_gpt2"]), rank=4, alpha=8, dropout=0.0)
    set_trainable_parts(loaded.model, PARTS[1:])
    trained = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    batch, losses = make_batch(loaded, mixed_data), []
    for _ in range(3):
        loss = loaded.model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(p.requires_grad for key, p in loaded.model.named_parameters() if is_adapter_parameter(key))
    assert f"held in {quantization.bits} bits" in parts_table(loaded.model, dict.fromkeys(PARTS, 1e-3))

    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = load_model(str(tmp_path), quantization=quantization)
    # bitsandbytes has other kernels where no gradient is asked for.
    set_trainable_parts(again.model, PARTS[1:])
    assert torch.equal(again.model.train()(**batch).loss, loaded.model.train()(**batch).loss)
    with pytest.raises(ValueError, match="cannot be merged into quantised weights; load the model without --bits"):
        merge_adapters(again.model)
    assert quantized_bits(load_model(str(tmp_path)).model) is None


@needs_bitsandbytes
def test_packed_weights_are_counted_in_full(load_tiny) -> None:
    plain, packed = load_tiny().model, load_tiny(quantization=FOUR).model
    assert sum(map(count_weights, packed.parameters())) == sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in packed.parameters()) < sum(p.numel() for p in plain.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize(("quant_type", "double_quant"), [("fp4", True), ("nf4", False)])
def test_the_4_bit_code_is_what_was_asked_for(load_tiny, quant_type: str, double_quant: bool) -> None:
    model = load_tiny(quantization=Quantization(4, quant_type, double_quant, device="cpu")).model
    state = model.get_model().h[0].mlp.c_fc.weight.quant_state
    assert (state.quant_type, state.nested) == (quant_type, double_quant)


@needs_bitsandbytes
def test_a_device_that_bitsandbytes_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not work on 'meta'"):
        check_bitsandbytes(torch.device("meta"))


def test_without_bitsandbytes_the_error_names_the_extra(load_tiny, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llava-babylm\[kbit\]'"):
        check_bitsandbytes(torch.device("cpu"))


@pytest.mark.parametrize(
    ("values", "message"), [({"bits": 3}, "--bits is 3"), ({"bits": 4, "quant_type": "int4"}, "--quant_type is 'int4'")]
)
def test_unknown_codes_are_errors(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantization(**values)
