"""Checkpoints of LLaVA-1.5 and LLaVA-NeXT: read as they are, they compute what the originals' own code computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_checkpoints import (
    CLIP_PIXELS,
    FRAMES,
    LLAVA_15,
    LLAVA_NEXT,
    PROMPT,
    SIZES,
    draw,
    projected_frames,
    write_llava_15,
    write_llava_next,
    write_llava_st,
)
from PIL import Image
from record_originals import summarize
from safetensors.torch import load_file
from torch import Tensor

from llava.data.media import cut_views, fit_frames
from llava.model.convert.settings import translate_family
from llava.model.loading import LoadedModel, load_model
from llava.model.multimodal_encoder.base import TowerDescription
from llava.model.vocabulary import load_tokenizer
from llava.serve.cli import main as serve
from llava.train.train import main as train

ORIGINALS = json.loads(Path(__file__).with_name("originals.json").read_text())


@pytest.fixture(scope="module")
def llava_15(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_llava_15(tmp_path_factory.mktemp("llava_15"))))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_llava_next(tmp_path_factory.mktemp("llava_next"))))


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


def padded_by_llava(picture: Image.Image) -> Tensor:
    """(1, 3, side, side), as LLaVA makes it: a padded square, then resized."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_PIXELS["image_mean"]))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return as_tensor(resized(square, 56, 56)).permute(2, 0, 1)[None]


def tiled_by_llava(picture: Image.Image, loaded: LoadedModel) -> Tensor:
    """(views, 3, side, side), as LLaVA-NeXT makes them: the whole picture, then tiles of a black canvas."""
    assert loaded.vision is not None
    assert loaded.vision.anyres is not None
    (rows, columns), (height, width) = loaded.vision.anyres.place((picture.height, picture.width))
    canvas = Image.new("RGB", (columns * 384, rows * 384))
    canvas.paste(resized(picture, width, height), ((canvas.width - width) // 2, (canvas.height - height) // 2))
    corners = [(384 * x, 384 * y) for y in range(rows) for x in range(columns)]
    tiles = [canvas.crop((x, y, x + 384, y + 384)) for x, y in corners]
    return torch.stack([as_tensor(view).permute(2, 0, 1) for view in (resized(picture, 384, 384), *tiles)])


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def check(loaded: LoadedModel, expected: dict[str, Any], frames: Tensor, size: tuple[int, int], kind: Any) -> None:
    """Features, logits behind the prompt, and what follows greedily are the recorded ones."""
    model, vision = loaded.model, loaded.vision
    assert vision is not None
    span = vision.layout.text(kind, len(frames), size)
    ids = torch.tensor([loaded.tokenizer(PROMPT.replace("<image>", span)).input_ids])
    media = {"images": [frames], "modalities": [kind], "image_sizes": [size]}
    with torch.no_grad():
        found = summarize(model.get_model().encode_media(**media)[0])
        logits = model(input_ids=ids, logits_to_keep=1, **media).logits[0, -1]
        following = model.generate(ids, max_new_tokens=3, do_sample=False, **media)[0, ids.shape[1] :].tolist()
    assert (found["tokens"], found["rows"]) == (expected["tokens"], expected["rows"])
    for name in ("features", "ordered_sum"):
        assert np.abs(np.array(found[name]) - np.array(expected[name])).max() < 1e-4, name
    assert np.abs(logits[:24].numpy() - np.array(expected["logits"])).max() < 1e-4
    end = loaded.tokenizer.eos_token_id
    wanted = expected["following"][:3]
    assert following == (wanted[: wanted.index(end) + 1] if end in wanted else wanted)


@pytest.mark.parametrize("shape", SIZES)
def test_llava_15_computes_what_it_did(llava_15: LoadedModel, shape: str) -> None:
    check(
        llava_15, ORIGINALS["llava_15"][f"frozen_{shape}"], padded_by_llava(draw(SIZES[shape])), SIZES[shape], "image"
    )


def test_prompt_of_llava_15_has_the_originals_ids(llava_15: LoadedModel) -> None:
    """Around the features too: Llama's tokenizer begins the text behind an image with a space."""
    ids = llava_15.tokenizer(PROMPT.replace("<image>", "<im_patch>")).input_ids
    patch = llava_15.tokenizer.convert_tokens_to_ids("<im_patch>")
    assert [-200 if i == patch else i for i in ids] == ORIGINALS["llava_15"]["input_ids"]


@pytest.mark.parametrize(("unfrozen", "changed"), [(True, 0), (False, 1)])
def test_tower_in_the_file_is_the_models(tmp_path: Path, unfrozen: bool, changed: int) -> None:
    """Also where the original's loader would have taken the one beside it, which then is said."""
    loaded = load_model(str(write_llava_15(tmp_path, tower_inside=True, unfrozen=unfrozen)))
    size = SIZES["wide"]
    check(loaded, ORIGINALS["llava_15"]["unfrozen_wide"], padded_by_llava(draw(size)), size, "image")
    assert loaded.conversion is not None
    assert sum("unfreeze_mm_vision_tower" in note for note in loaded.conversion.changed) == changed


@pytest.mark.parametrize("shape", SIZES)
def test_llava_next_computes_what_it_did(llava_next: LoadedModel, shape: str) -> None:
    frames = tiled_by_llava(draw(SIZES[shape]), llava_next)
    assert len(frames) == ORIGINALS["llava_next"][shape]["views"]
    check(llava_next, ORIGINALS["llava_next"][shape], frames, SIZES[shape], "image")


def test_llava_next_shrinks_grids_as_it_did(tmp_path: Path) -> None:
    loaded = load_model(str(write_llava_next(tmp_path, image_aspect_ratio="anyres_max_2")))
    size = SIZES["square"]
    check(loaded, ORIGINALS["llava_next"]["shrunk_square"], tiled_by_llava(draw(size), loaded), size, "image")


def test_llava_next_pools_videos_as_it_did(llava_next: LoadedModel) -> None:
    frames = torch.stack(
        [as_tensor(resized(draw(SIZES["square"], i), 384, 384)).permute(2, 0, 1) for i in range(FRAMES)]
    )
    check(llava_next, ORIGINALS["llava_next"]["video_no_token"], frames, SIZES["square"], "video")
    assert llava_next.conversion is not None
    assert any("mm_newline_position one_token" in note for note in llava_next.conversion.changed)


def test_llava_st_packs_videos_and_writes_bins_as_it_did(tmp_path: Path) -> None:
    loaded, expected = load_model(str(write_llava_st(tmp_path))), ORIGINALS["llava_st"]
    assert loaded.vision is not None
    assert (loaded.vision.max_frames, loaded.vision.slow_frames) == (100, 20)
    model = loaded.model
    with torch.no_grad():
        tokens = model.get_model().vision_resampler(projected_frames()[None], "video")[0]
        logits = model(torch.tensor([[expected["word"]]])).logits[0, -1]
    for name, span in (("fast", tokens[:900]), ("slow", tokens[900:])):
        found = summarize(span)
        assert np.abs(np.array(found["features"]) - np.array(expected[name]["features"])).max() < 1e-4
        assert np.abs(np.array(found["ordered_sum"]) - np.array(expected[name]["ordered_sum"])).max() < 1e-4
    assert np.abs(logits[:12].numpy() - np.array(expected["logits"])).max() < 1e-4
    assert np.abs(logits[-300::25].numpy() - np.array(expected["bins"])).max() < 1e-4
    assert loaded.conversion is not None
    for note in ("half a bin", "<WIDTH-INPUT>"):
        assert any(note in changed for changed in loaded.conversion.changed)


@pytest.mark.parametrize("shape", SIZES)
def test_pixels_are_nearly_those_of_the_originals(llava_15: LoadedModel, llava_next: LoadedModel, shape: str) -> None:
    """Tiles within a level of 255; padded squares differ at the picture's edges, as docs/migrating.md says."""
    picture = draw(SIZES[shape])
    assert llava_15.vision is not None
    assert llava_next.vision is not None
    tiles = cut_views(as_tensor(picture), llava_next.vision).int() - tiled_by_llava(picture, llava_next).int()
    assert tiles.abs().max() <= 1
    square = fit_frames(as_tensor(picture)[None], llava_15.vision).int() - padded_by_llava(picture).int()
    assert square.abs().float().mean() < (0.05 if shape == "square" else 1)


def test_shards_and_their_damage(tmp_path: Path) -> None:
    """Published checkpoints are pickled shards with an index; one that lacks a file is told as such."""
    folder = write_llava_15(tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # What releases of their time stored too.
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    shards = [dict(list(state.items())[i::2]) for i in range(2)]
    for name, shard in zip(names, shards, strict=True):
        torch.save({key: value.half() for key, value in (shard | buffers).items()}, folder / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard | buffers}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = load_model(str(folder))
    assert torch.equal(loaded.model.lm_head.weight[:274], state["lm_head.weight"].half().float())
    assert loaded.conversion is not None
    assert "rotary" in str(loaded.conversion.left_out)
    cut = (folder / names[1]).read_bytes()
    for damaged, message in ((cut[: len(cut) // 2], "cut short or damaged"), (None, f"{names[1]} is missing, which")):
        (folder / names[1]).unlink()
        if damaged is not None:
            (folder / names[1]).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^--model_name_or_path '{folder}': .*{message}") as error:
            load_model(str(folder))
        assert "\n" not in str(error.value)


def test_commands_take_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caption of it as it is, a step of training, and a caption of what that wrote: today's layout."""
    folder, picture, output = str(write_llava_next(tmp_path)), str(tmp_path / "wide.png"), str(tmp_path / "out")
    draw((60, 90)).save(picture)
    sample = {"image": picture, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "data.json").write_text(json.dumps([sample]))
    flags = {"model_name_or_path": folder, "data_path": tmp_path / "data.json", "output_dir": output, "max_steps": 1,
             "save_strategy": "no", "report_to": "none", "use_cpu": "true", "plain_lm": "true"}  # fmt: skip
    for path in (folder, output):
        assert serve(["--model_path", path, "--image", picture, "--device", "cpu", "--max_new_tokens", "3"]) == 0
        if path == folder:
            train([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        capsys.readouterr()
    config = json.loads(Path(output, "config.json").read_text())
    assert (config["mm_image_padding"], config["mm_image_aspect_ratio"]) == ("black", "anyres_max_9")
    assert load_model(output).conversion is None


CLIP_TOWER = TowerDescription({"model_type": "clip_vision_model"}, 32, 56, 4, 56, (0.5,) * 3, (0.5,) * 3)
SIGLIP_TOWER = TowerDescription({"model_type": "siglip_vision_model"}, 32, 384, 27, None, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("changes", "fields", "notes"),
    [
        # Layouts of single squares keep their features, but for a newline behind them.
        ({"image_aspect_ratio": "pad"}, {"patch_merge_type": "flat"}, ["newline, one token, ended every image"]),
        ({"image_aspect_ratio": None, "mm_patch_merge_type": "spatial"}, {"patch_merge_type": "flat"}, []),
        (
            {"mm_patch_merge_type": "flat"},
            {"image_aspect_ratio": "anyres", "image_padding": "black"},
            ["several images"],
        ),
        # Videos.
        ({"mm_newline_position": "grid"}, {"resampler_type": "spatial_pool"}, ["newline ended each row of each frame"]),
        ({"mm_newline_position": "no_token"}, {"spatial_pool_mode": "bilinear", "spatial_pool_stride": 2}, []),
        ({"mm_spatial_pool_mode": "average"}, {"spatial_pool_mode": "average"}, ["13 x 13 tokens a frame were made"]),
        ({"mm_spatial_pool_stride": 4}, {"spatial_pool_stride": 2}, ["mm_spatial_pool_stride 4"]),
        ({"mm_spatial_pool_mode": None}, {"image_aspect_ratio": "anyres_max_9"}, ["several images"]),
        # The tower.
        ({"mm_vision_select_layer": -1}, {"vision_select_layer": -2}, ["SigLIP gave its last layer but one"]),
        ({"mm_use_im_start_end": True}, {}, ["stood around the features"]),
    ],
)
def test_settings_that_meant_something_else(changes: dict[str, Any], fields: dict[str, Any], notes: list[str]) -> None:
    settings = translate_family(LLAVA_NEXT | changes, SIGLIP_TOWER, {}, "here")
    assert fields.items() <= settings.fields.items()
    for note in notes:
        assert any(note in changed for changed in settings.changed), settings.changed


def test_settings_of_llava_15(llava_15: LoadedModel) -> None:
    """They mean what they meant, but for the order of padding and resizing; a tower of several sizes is refused."""
    assert llava_15.conversion is not None
    assert not llava_15.conversion.missing
    (note,) = llava_15.conversion.changed
    assert "resized, then padded" in note
    settings = translate_family(LLAVA_15 | {"mm_vision_select_layer": -1}, CLIP_TOWER, {}, "here")
    assert settings.fields["vision_select_layer"] == -1
    with pytest.raises(ValueError, match=r"^here: s2 is set"):
        translate_family(LLAVA_15 | {"s2": True}, CLIP_TOWER, {}, "here")


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece can read the file")
def test_tokenizer_that_needs_sentencepiece_is_named(tmp_path: Path) -> None:
    # What the published LLaVA-1.5 has: no tokenizer.json.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match=r"tokenizer\.model, which .* \(pip install sentencepiece protobuf\)"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="it has no vocabulary; put the files of the model's tokenizer"):
        load_tokenizer(str(tmp_path))
