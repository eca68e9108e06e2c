"""Checkpoints of the LLaVA family: what is in them gives here what it gave there, and what cannot is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from family import write_family
from safetensors.torch import load_file, save_file
from transformers import Dinov2Model

from llava.model.convert.__main__ import CONVERSION_FILE, main
from llava.model.loading import load_model
from llava.serve.generate import Captioner

CASE = Path(os.environ.get("LLAVA_SHARED_CASES", Path(__file__).parents[4] / "shared" / "cases"))


@pytest.fixture(scope="module")
def model(load_tiny):
    """A tiny GPT-2 with a TokenPacker, whose tower lies beside it."""
    return load_tiny("llava_gpt2")


@pytest.fixture(scope="module")
def fork(model, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the fork would have written it, without the tower's weights."""
    return write_family(model, tmp_path_factory.mktemp("fork") / "ckpt", tower_dir)


def same_weights(one, other) -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in one.named_parameters() if "vision_tower" not in name)


def test_loads_as_converted(model, fork: Path, tower_dir: Path, tmp_path: Path) -> None:
    direct = load_model(str(fork))
    assert same_weights(model.model, direct.model)
    assert not direct.new_parameters
    report = direct.conversion
    assert report is not None
    assert not report.missing
    assert not report.left_out
    assert any("in_proj_weight" in name and len(new) == 3 for name, new in report.renamed.items())
    assert main([str(fork), str(tmp_path / "out")]) == 0
    converted = load_model(str(tmp_path / "out"))
    assert converted.conversion is None
    assert converted.vision == direct.vision
    assert same_weights(direct.model, converted.model)
    assert json.loads((tmp_path / "out" / CONVERSION_FILE).read_text())["renamed"] == report.renamed
    # Today's format: the frozen tower as its source and a hash.
    assert not any("vision_tower" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert converted.vision is not None
    assert converted.vision.vision_tower == str(tower_dir)


def test_features_are_those_of_the_forks_tower(model, fork: Path, tower_dir: Path) -> None:
    """Its DINOv2 gave the last hidden state, whatever mm_vision_select_layer said."""
    loaded = load_model(str(fork))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = Dinov2Model.from_pretrained(tower_dir)(pixels).last_hidden_state[:, 1:]
        ours = loaded.model.get_model().vision_tower(pixels)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(model.model.get_model().vision_tower(pixels), theirs, atol=1e-2)


def test_tower_in_the_file(fork: Path, tower_dir: Path, tmp_path: Path) -> None:
    """The file's weights count: left to the source where they are the same, kept where they are not."""
    state = load_file(fork / "model.safetensors")
    tower = Dinov2Model.from_pretrained(tower_dir).state_dict()
    for name, changed in (("same", 0.0), ("trained", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        for file in fork.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        with_tower = {f"transformer.vision_tower.vision_tower.{key}": value + changed for key, value in tower.items()}
        save_file(state | with_tower, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = load_model(str(folder))
        assert loaded.vision is not None
        assert loaded.vision.save_vision_tower == (name == "trained")
        held = loaded.model.get_model().vision_tower.vision_tower.state_dict()
        assert all(torch.equal(held[key], value + changed) for key, value in tower.items())
        loaded.model.save_pretrained(tmp_path / f"{name}-saved")
        loaded.tokenizer.save_pretrained(tmp_path / f"{name}-saved")
        again = load_model(str(tmp_path / f"{name}-saved")).model.get_model().vision_tower.vision_tower.state_dict()
        assert all(torch.equal(again[key], value) for key, value in held.items())


def test_bin_shards_and_index(fork: Path, model, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in fork.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(fork / "model.safetensors")
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert same_weights(model.model, load_model(str(folder)).model)
    first = folder / sorted(set(files.values()))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    check_refusal(folder, "cut short or damaged")
    first.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    check_refusal(folder, "git lfs pull")
    torch.save({"weights": Path("x")}, first)  # A pickle of something else than tensors.
    check_refusal(folder, "not a file of plain tensors")
    first.unlink()
    check_refusal(folder, f"{first.name} is missing")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "../elsewhere.bin")}))
    check_refusal(folder, "no file of the folder")


def check_refusal(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"mm_vision_tower": "/nowhere/tower"}, "give a folder that has them with --vision_tower"),
        ({"mm_resampler_type": "perceiver"}, "no resampler here has"),
        ({"mm_vision_select_feature": "cls_patch"}, "give the patches of one layer"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector.4.weight"),
        ({"mm_projector_type": "linear"}, "is of another kind"),
        ({"mm_perceiver_latents": 400}, "finer than the 4 x 4 grid"),
    ],
)
def test_refusals(fork: Path, tmp_path: Path, entries: dict, words: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in fork.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((fork / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(settings))
    check_refusal(folder, words)


def test_what_means_something_else_is_said(model, tower_dir: Path, tmp_path: Path, capsys) -> None:
    folder = write_family(
        model,
        tmp_path / "fork",
        tower_dir,
        mm_perceiver_latents=8,
        mm_perceiver_latents_fast=None,
        image_aspect_ratio="pad",
    )
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert "--mm_perceiver_latents_fast is 9" in said  # 9 by default, finer than the 2 x 2 that 8 ran as.
    folder = write_family(model, tmp_path / "fork2", tower_dir, mm_perceiver_latents=8, image_aspect_ratio="pad")
    assert main([str(folder), "--dry_run"]) == 0
    said = capsys.readouterr().out
    for words in (
        "mm_perceiver_latents 8 is no square and ran as 2 x 2: 4 here",
        "the packer's attention",
        "the fork's DINOv2 gave its last layer",
        "num_frames 4",
        "no chat format",
        "frames of videos were prepared as the tower's processor does",
        "nothing was written",
    ):
        assert words in said
    assert not out.exists()


def test_command_refuses(fork: Path, gpt2_dir: Path, tmp_path: Path, capsys) -> None:
    assert main([str(gpt2_dir), str(tmp_path / "out")]) == 2
    assert "nothing to convert" in capsys.readouterr().err
    assert main([str(fork), str(fork)]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main([str(fork), str(tmp_path / "full")]) == 2
    assert main([str(fork), str(tmp_path / "full"), "--overwrite"]) == 2
    assert "conversion.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert main([str(fork)]) == 2
    assert "OUT is missing" in capsys.readouterr().err


def test_a_conversion_is_replaced_and_nothing_beside_it(fork: Path, tmp_path: Path, capsys) -> None:
    command = [str(fork), str(tmp_path / "out")]
    assert main(command) == main([*command, "--overwrite"]) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2
    assert "holds notes.txt beside the conversion" in capsys.readouterr().err


def test_layer_of_the_forks_command_lines(fork: Path, caplog) -> None:
    """They say -2, which their DINOv2 passed over, and is no contradiction of what it gave."""
    loaded = load_model(str(fork), vision_select_layer=-2)
    assert loaded.vision is not None
    assert loaded.vision.vision_select_layer == -1
    assert "--mm_vision_select_layer has no effect" in caplog.text


@pytest.mark.parametrize(
    ("part", "tensors", "words"),
    [
        (".h.1.", {}, "does not fit its config.json: it lacks ['transformer.h.1."),
        (
            "nothing",
            {"transformer.h.9.ln_1.bias": torch.zeros(2)},
            "has ['transformer.h.9.ln_1.bias'], which its model",
        ),
        (
            "nothing",
            {"transformer.h.1.ln_1.bias": torch.zeros(2)},
            "is (2,) in the file and (32,) by the configuration",
        ),
        ("mm_projector", {}, "which would be random in OUT"),
    ],
)
def test_looking_refuses_what_converting_would(
    fork: Path, tmp_path: Path, capsys, part: str, tensors: dict[str, torch.Tensor], words: str
) -> None:
    folder = Path(shutil.copytree(fork, tmp_path / "ckpt"))
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if part not in name} | tensors
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for flags in (["--dry_run"], []):
        assert main([str(folder), str(tmp_path / "out"), *flags]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if part == "mm_projector":  # It loads, to be trained, and answers nothing.
        with pytest.raises(ValueError, match=r"--model_path .* lacks .*mm_projector.*, which would be random"):
            Captioner.from_checkpoint(str(folder), device="cpu")


@pytest.mark.skipif(not (CASE / "fork_checkpoint.py").is_file(), reason=f"no fork_checkpoint.py in {CASE}")
def test_the_forks_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as the old fork wrote it: text logits and projector are those that its own code computed."""
    monkeypatch.syspath_prepend(str(CASE))
    import fork_checkpoint

    loaded = load_model(str(fork_checkpoint.write(tmp_path)))
    expected = json.loads((CASE / "fork_checkpoint" / "expected.json").read_text())
    loaded.model.eval()
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([expected["input_ids"]])).logits[0, -1]
        projected = loaded.model.get_model().mm_projector(torch.linspace(-1, 1, 32))
    assert torch.allclose(logits[:8], torch.tensor(expected["last_logits_first_8"]), atol=1e-4)
    assert int(logits.argmax()) == expected["argmax"]
    assert abs(float(logits.sum()) - expected["logit_sum"]) < 1e-2
    assert torch.allclose(projected[:8], torch.tensor(expected["projector_first_8"]), atol=1e-4)
