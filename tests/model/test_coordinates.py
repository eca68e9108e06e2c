"""Coordinates in the model: tables, their gradients, two-hot targets, and batches that mix everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava.config import GroundingConfig
from llava.constants import AXES, IGNORE_INDEX
from llava.data.collator import SupervisedCollator, model_inputs
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.grounding.syntax import bin_tokens, box_text, span_text
from llava.model.coordinates import CoordinateTables, locate, propagate, two_hot_cross_entropy
from llava.model.loading import load_model
from tests.conftest import FAMILIES

TIN, TOUT = "temporal_input_locations", "temporal_output_locations"
HIN, HOUT = "spatial_height_input_locations", "spatial_height_output_locations"
WIN, WOUT = "spatial_width_input_locations", "spatial_width_output_locations"


def turns(human: str, assistant: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": assistant}]


SAMPLES = [
    {"id": "image", "image": "a.png", "conversations": turns("<image> una stella", f"gialla {box_text()}"),
     "variables": {WOUT: [0.1, 0.9], HOUT: [0.25, 0.75]}},
    {"id": "video", "video": "a.mp4", "conversations": turns("<video> dopo <TEMP-INPUT>", f"si muove {span_text()}"),
     "variables": {TIN: [0.5], TOUT: [0.1, 0.8]}},
    {"id": "ungrounded", "image": "b.jpg", "conversations": turns("<image>", "un cane")},
    {"id": "text", "conversations": turns("", "il gatto dorme")},
    {"id": "text with a place", "conversations": turns("", f"qui {box_text()}"),
     "variables": {WOUT: [1.0, 0.0], HOUT: [0.5, 0.5]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def data(media_dir: Path) -> Path:
    path = media_dir / "grounded.json"
    path.write_text(json.dumps(SAMPLES))
    return path


def load_grounded(load_tiny, name: str = "llava_gpt2", **changes):
    """A tiny model with tables that are large enough to matter."""
    loaded = load_tiny(name, grounding="lape", image_aspect_ratio="pad", **changes)
    torch.manual_seed(4)
    with torch.no_grad():
        for table in loaded.model.get_model().coordinates.parameters():
            table.normal_()
    return loaded


def make_batch(loaded, data: Path, rows: list[int] | None = None) -> dict:
    dataset = SupervisedDataset(
        read_records(str(data)), loaded.tokenizer, loaded.vision, 256, grounding=loaded.model.grounding
    )
    examples = [dataset[i] for i in (range(len(dataset)) if rows is None else rows)]
    return model_inputs(SupervisedCollator(loaded.tokenizer.pad_token_id)(examples))


# The tables.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_propagated_table_has_the_values_of_the_plain_one(dtype: torch.dtype) -> None:
    table = torch.randn(100, 48, dtype=dtype) * 1e3
    assert torch.equal(propagate(table), table)


def test_the_gradient_of_a_table_is_that_of_the_closed_form() -> None:
    table = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(30, 8, dtype=torch.float64)
    propagate(table).backward(gradient)
    spread = torch.tensor([[2.0 ** -abs(i - j) for j in range(30)] for i in range(30)], dtype=torch.float64)
    expected = (torch.eye(30, dtype=torch.float64) + spread.T) @ gradient
    torch.testing.assert_close(table.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_position_lies_between_the_floor_and_the_ceiling_of_its_bin() -> None:
    at = locate(torch.tensor([0.0, 0.5, 1.0, 0.26]), 11)
    assert at.lower.tolist() == [0, 5, 10, 2]
    assert at.upper.tolist() == [0, 5, 10, 3]
    torch.testing.assert_close(at.fraction, torch.tensor([0.0, 0.0, 0.0, 0.6]))


def test_two_hot_cross_entropy_equals_the_hand_computation() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    probabilities = logits.exp() / logits.exp().sum()
    by_hand = -(0.75 * probabilities[0, 1].log() + 0.25 * probabilities[0, 2].log())
    lower, upper, fraction = torch.tensor([1]), torch.tensor([2]), torch.tensor([0.25])
    torch.testing.assert_close(two_hot_cross_entropy(logits, lower, upper, fraction), by_hand)
    whole = two_hot_cross_entropy(logits, lower, lower, torch.zeros(1))
    torch.testing.assert_close(whole, F.cross_entropy(logits, lower))


def test_patches_are_told_the_mean_of_both_tables_at_their_centres() -> None:
    grounding = GroundingConfig(num_temporal=5, num_spatial=9, token_ids={}, first_bin=0)
    tables = CoordinateTables(grounding, 6)
    for table in tables.parameters():
        torch.nn.init.normal_(table)
    where = tables().patch_positions(num_frames=3, grid_side=2)
    assert where.shape == (3, 4, 6)

    def mean(name: str, row: float) -> torch.Tensor:
        both = tables.get_parameter(f"{name}_input") + tables.get_parameter(f"{name}_output")
        low = int(row)
        return ((1 - row + low) * both[low] + (row - low) * both[min(low + 1, len(both) - 1)]) / 2

    # Of 9 bins the centres of 2 patches, 1/4 and 3/4, are the third and the seventh; of 5 bins, 3 frames 0, 2, 4.
    for frame, patch in ((0, 0), (1, 1), (2, 2)):
        row, column = divmod(patch, 2)
        expected = mean("temporal", 2.0 * frame) + mean("height", 2 + 4.0 * row) + mean("width", 2 + 4.0 * column)
        torch.testing.assert_close(where[frame, patch], expected)


# The model.


@pytest.mark.parametrize("name", FAMILIES)
def test_every_backbone_embeds_and_predicts_coordinates(name: str, load_tiny, data: Path) -> None:
    loaded = load_grounded(load_tiny, name)
    model, batch = loaded.model.eval(), make_batch(loaded, data)
    output = model(**batch, return_logits=True)
    grounding = model.grounding
    assert output.logits.shape[-1] == grounding.first_bin + 300 == len(loaded.tokenizer)

    # The loss, position by position, from the logits.
    log_probabilities = output.logits.log_softmax(-1)
    expected, count = torch.zeros(()), 0
    for row, numbers in enumerate(batch["variables"]):
        waiting = {token: iter(numbers[list_name]) for token, list_name in _OUTPUTS.items()}
        for t, label in enumerate(batch["labels"][row].tolist()[1:], start=1):
            if label == IGNORE_INDEX:
                continue
            count += 1
            token = loaded.tokenizer.convert_ids_to_tokens(label)
            here = log_probabilities[row, t - 1]
            if token not in waiting:
                expected = expected - here[label]
                continue
            exact = next(waiting[token]) * 99
            first = grounding.first_bin_of(token[1:].split("-")[0])
            low, rest = int(exact), exact - int(exact)
            expected = expected - (1 - rest) * here[first + low] - rest * here[first + min(low + 1, 99)]
    torch.testing.assert_close(output.loss, expected / count, rtol=1e-4, atol=1e-5)


_OUTPUTS = {"<TEMP-OUTPUT>": TOUT, "<HEIGHT-OUTPUT>": HOUT, "<WIDTH-OUTPUT>": WOUT}


@pytest.mark.parametrize("name", ["llava_gpt2", "llava_llama"])
def test_a_mixed_batch_gives_every_table_a_gradient_and_splits_without_a_trace(name: str, load_tiny, data) -> None:
    loaded = load_grounded(load_tiny, name)
    model = loaded.model.train()
    batch = make_batch(loaded, data)
    num_items = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    def gradients(groups: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for rows in groups:
            loss = model(**make_batch(loaded, data, rows), num_items_in_batch=num_items).loss
            loss.backward()
            total += float(loss.detach())
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, whole = gradients([[0, 1, 2, 3, 4]])
    split_loss, split = gradients([[3], [0, 4], [1, 2]])
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for axis in ("temporal", "height", "width"):
        for direction in ("input", "output"):
            table = next(n for n in whole if n.endswith(f"coordinates.{axis}_{direction}"))
            assert whole[table].abs().max() > 0
    for key, gradient in whole.items():
        torch.testing.assert_close(split[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_text_alone_reaches_every_table(load_tiny, data: Path) -> None:
    """Ranks wait for each other's gradients: none may be missing, zeros where nothing was used."""
    model = load_grounded(load_tiny).model
    model(**make_batch(load_grounded(load_tiny), data, [3])).loss.backward()
    for name, table in model.get_model().coordinates.named_parameters():
        assert table.grad is not None, name
        assert bool(table.grad.abs().max() > 0) == name.endswith("output"), name


def test_a_place_in_the_text_moves_only_what_comes_behind_it(load_tiny, data: Path) -> None:
    loaded = load_grounded(load_tiny)
    model, batch = loaded.model.eval(), make_batch(loaded, data, [1])
    place_of = (batch["input_ids"][0] == loaded.model.grounding.token_ids["<TEMP-INPUT>"]).nonzero().item()
    first = model(**batch, return_logits=True).logits
    batch["variables"] = [{**batch["variables"][0], TIN: [0.9]}]
    second = model(**batch, return_logits=True).logits
    assert torch.equal(first[0, :place_of], second[0, :place_of])
    assert not torch.allclose(first[0, place_of], second[0, place_of])


def test_features_are_told_where_they_are(load_tiny, data: Path) -> None:
    loaded = load_grounded(load_tiny)
    decoder = loaded.model.get_model()
    frames = torch.full((2, 3, 56, 56), 0.5)
    tables = decoder.coordinate_embeddings()
    told, untold = (decoder.encode_media([frames], ["video"], tables=given)[0] for given in (tables, None))
    assert not torch.allclose(told, untold)
    # A flat picture has the same feature everywhere; only the tables tell its patches apart.
    image = decoder.encode_media([frames[:1]], ["image"], tables=tables)[0]
    plain = decoder.encode_media([frames[:1]], ["image"])[0]
    torch.testing.assert_close(image - plain, tables.patch_positions(1, 4)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [{**v[0], WOUT: [0.1]}], r"row 0 of the batch has 2 <WIDTH-OUTPUT>, but its variables have 1"),
        (lambda v: [None], r"row 0 of the batch has 2 <HEIGHT-OUTPUT>"),
        (lambda v: [*v, None], r"variables has 2 entries for a batch of 1"),
    ],
)
def test_coordinates_that_are_missing_are_an_error(load_tiny, data: Path, change, message: str) -> None:
    loaded = load_grounded(load_tiny)
    batch = make_batch(loaded, data, [0])
    batch["variables"] = change(batch["variables"])
    with pytest.raises(ValueError, match=message):
        loaded.model(**batch)


# Vocabulary, checkpoints, generation.


def test_bins_follow_all_other_tokens_and_are_words_of_an_answer(load_tiny) -> None:
    loaded = load_grounded(load_tiny)
    tokenizer, grounding = loaded.tokenizer, loaded.model.grounding
    ids = [tokenizer.convert_tokens_to_ids(token) for token in bin_tokens(grounding)]
    assert ids == list(range(grounding.first_bin, len(tokenizer)))
    assert [token[1:-5] for token in (bin_tokens(grounding)[i] for i in (0, 100, 200))] == list(AXES)
    text = "qui [<WIDTH-001><HEIGHT-002><WIDTH-003><HEIGHT-099>]"
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(i >= grounding.first_bin for i in encoded) == 4
    assert tokenizer.decode(encoded, skip_special_tokens=True) == text
    # No row of the embeddings is spent on a bin.
    assert loaded.model.get_input_embeddings().weight.shape[0] == grounding.first_bin


@pytest.mark.parametrize("name", ["llava_gpt2", "llava_opt"])
def test_a_grounded_checkpoint_is_saved_and_reloaded_exactly(name: str, load_tiny, data: Path, tmp_path) -> None:
    loaded = load_grounded(load_tiny, name)
    batch = make_batch(loaded, data)
    loss = loaded.model.eval()(**batch).loss
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert again.new_parameters == []
    assert again.model.grounding == loaded.model.grounding
    assert torch.equal(again.model.eval()(**make_batch(again, data)).loss, loss)
    with pytest.raises(ValueError, match="--num_spatial_tokens is 50, but the checkpoint was trained with 100"):
        load_model(str(tmp_path), num_spatial_tokens=50)
    with pytest.raises(ValueError, match="--grounding is placeholder, but the checkpoint was trained with lape"):
        load_model(str(tmp_path), grounding="placeholder")


def test_content_first_then_coordinates(load_tiny, data: Path, tmp_path) -> None:
    """A checkpoint of stage 1 gets its tables in stage 2, and loses nothing."""
    content = load_tiny()
    content.model.save_pretrained(tmp_path)
    content.tokenizer.save_pretrained(tmp_path)
    grounded = load_model(str(tmp_path), grounding="lape", image_aspect_ratio="pad")
    assert {name.split(".")[-2] for name in grounded.new_parameters} == {"coordinates"}
    old, new = dict(content.model.named_parameters()), dict(grounded.model.named_parameters())
    for name, parameter in old.items():
        rows = parameter.shape[0] if parameter.ndim else 0
        assert torch.equal(new[name][:rows] if parameter.ndim else new[name], parameter), name
    assert len(new) == len(old) + 6


def test_spare_rows_of_the_embeddings_are_no_bins(load_tiny, tmp_path, data: Path) -> None:
    plain = load_tiny()
    plain.model.resize_token_embeddings(500, mean_resizing=False)
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    grounded = load_model(str(tmp_path), grounding="lape", image_aspect_ratio="pad")
    assert grounded.model.get_input_embeddings().weight.shape[0] == 500 > grounded.model.grounding.first_bin
    logits = grounded.model(**make_batch(grounded, data, [0]), return_logits=True).logits
    assert logits.shape[-1] == grounded.model.grounding.first_bin + 300


@pytest.mark.parametrize("name", ["llava_gpt2", "llava_llama_with_alternating_attn"])
def test_generation_with_and_without_the_cache_agrees_on_bins(name: str, load_tiny, data: Path) -> None:
    backbone, _, variant = name.partition("_with_")
    loaded = load_grounded(load_tiny, backbone, **({"variant": "alternating"} if variant else {}))
    model, grounding = loaded.model.eval(), loaded.model.grounding
    batch = make_batch(loaded, data, [1])
    batch.pop("labels")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))
    answer = cached[0, batch["input_ids"].shape[1] :]
    assert (answer >= grounding.first_bin).any()
    scored = model.generate(**batch, output_scores=True, return_dict_in_generate=True, **options)
    assert torch.isneginf(torch.stack(scored.scores)[:, :, list(grounding.token_ids.values())]).all()
    beams = model.generate(**batch, num_beams=3, **options)
    assert beams.shape == cached.shape


def test_anyres_cannot_be_grounded(load_tiny) -> None:
    with pytest.raises(ValueError, match="tiles of --image_aspect_ratio anyres"):
        load_tiny(grounding="lape", image_aspect_ratio="anyres", resampler_type=None)


def test_placeholders_as_words_have_no_tables(load_tiny, data: Path) -> None:
    loaded = load_tiny(grounding="placeholder", image_aspect_ratio="pad")
    batch = make_batch(loaded, data)
    assert "variables" not in batch
    assert not any("coordinates" in name for name, _ in loaded.model.named_parameters())
    assert loaded.model.grounding.token_ids["<WIDTH-OUTPUT>"] in batch["labels"]
    assert torch.isfinite(loaded.model(**batch).loss)


# The data.


def test_coordinates_move_into_the_padded_square(load_tiny, data: Path) -> None:
    loaded = load_grounded(load_tiny)
    batch = make_batch(loaded, data, [0])
    # a.png is 90 x 60: of the square of 56, 37 rows from the ninth on.
    letterbox = loaded.vision.letterbox((60, 90))
    assert (letterbox.top, letterbox.height) == (9, 37)
    assert batch["variables"][0][WOUT] == [0.1, 0.9]
    assert batch["variables"][0][HOUT] == [(9 + 0.25 * 37) / 56, (9 + 0.75 * 37) / 56]


def test_given_coordinates_are_read_but_not_learned(load_tiny, data: Path) -> None:
    loaded = load_grounded(load_tiny)
    batch = make_batch(loaded, data, [1])
    given = batch["input_ids"] == loaded.model.grounding.token_ids["<TEMP-INPUT>"]
    assert given.sum() == 1
    assert (batch["labels"][given] == IGNORE_INDEX).all()


def test_data_with_coordinates_needs_a_model_with_them(load_tiny, data: Path) -> None:
    loaded = load_tiny()
    with pytest.raises(ValueError, match=r"sample 'image' .* has coordinates .* give --stage 2"):
        make_batch(loaded, data, [0])
