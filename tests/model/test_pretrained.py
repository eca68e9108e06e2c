"""Checkpoints that bring code along: it is not run, nobody is asked, and the error says what to do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from llava.model.loading import load_model
from llava.model.multimodal_encoder.base import describe_tower
from llava.model.random_weights import create
from llava.model.transfer import load_adapter
from llava.model.vocabulary import load_tokenizer


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks on the terminal fails the test."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))


@pytest.fixture
def foreign_dir(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A model, a tower and a tokenizer of types that only their own Python file knows."""
    folder = shutil.copytree(tokenizer_dir, tmp_path / "foreign")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    auto_map = {name: f"foreign.{name}" for name in classes}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    tokenizer = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": [None, "foreign.Foreign"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "foreign.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    return folder


@pytest.mark.parametrize("load", [load_model, describe_tower, load_tokenizer])
@pytest.mark.usefixtures("nobody_answers")
def test_code_of_a_checkpoint_is_not_run(load, foreign_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Python code of its own \(auto_map\), which is never run here.*--plugins"):
        load(str(foreign_dir))
    assert not (tmp_path / "ran").exists()
    assert not any(name.endswith("foreign") and "transformers_modules" in name for name in sys.modules)


@pytest.mark.usefixtures("nobody_answers")
def test_a_known_type_is_read_by_its_own_class(gpt2_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_dir, tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign.AutoConfig", "AutoModelForCausalLM": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).model.config.model_type == "llava_gpt2"


def test_weights_that_hold_more_than_tensors_are_not_unpickled(gpt2_dir: Path, load_tiny, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = shutil.copytree(gpt2_dir, tmp_path / "gpt2")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        load_model(str(folder))
    torch.save({"mm_projector.0.weight": Payload(ran)}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"--pretrain_mm_mlp_adapter .*not a file of plain tensors"):
        load_adapter(load_tiny().model, str(tmp_path / "mm_projector.bin"))
    assert not ran.exists()
    torch.load(tmp_path / "mm_projector.bin", weights_only=False)
    assert ran.exists(), "the payload is harmless, and this test with it"


REMOTE = "nobody/kernels"


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a kernel of the hub fails the test, as if the package that fetches them were installed."""
    for name in ("lazy_import_flash_attention", "is_kernels_available"):
        monkeypatch.setattr(f"transformers.modeling_utils.{name}", lambda *args, **kwargs: pytest.fail("kernels"))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(attn_implementation=REMOTE),
        lambda config: config.update(_attn_implementation=f"{REMOTE}@main:forward"),
        lambda config: config.update(attn_implementation={"": REMOTE}),
        lambda config: config.update(_attn_implementation_internal=REMOTE, attn_implementation="flash_attention_2"),
        lambda config: config["mm_vision_config"].update(attn_implementation=REMOTE),
        lambda config: config["mm_vision_config"].update(_attn_implementation=f"paged|{REMOTE}"),
    ],
)
@pytest.mark.usefixtures("nothing_is_fetched")
def test_kernels_that_a_config_names_are_not_fetched(change, load_tiny, tmp_path: Path, caplog) -> None:
    loaded = load_tiny()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    again = load_model(str(tmp_path)).model
    for config in (again.config, again.get_vision_tower().vision_tower.config):
        assert config._attn_implementation in ("sdpa", "eager")
    assert "is not used: ask for it with --attn_implementation" in caplog.text


@pytest.mark.usefixtures("nothing_is_fetched")
def test_kernels_of_towers_and_backbones_are_not_fetched(gpt2_dir, tower_dir, tmp_path: Path) -> None:
    tower, backbone = (Path(shutil.copytree(source, tmp_path / source.name)) for source in (tower_dir, gpt2_dir))
    for folder in (tower, backbone):
        edit_config(folder, lambda config: config.update(_attn_implementation=REMOTE))
    model = load_model(str(gpt2_dir), vision_tower=str(tower), weights_from=str(backbone)).model
    assert model.get_vision_tower().vision_tower.config._attn_implementation in ("sdpa", "eager")
    create(str(backbone), str(tmp_path / "random"), 0)
