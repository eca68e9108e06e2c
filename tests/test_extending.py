"""Every file of docs/extending.md works as it stands there: written down, named with --plugins, trained, used."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

CONTRACT = """
import sys, torch
import llava_helium
from transformers import AutoModelForCausalLM
from llava.model import AVAILABLE_MODELS, load_model

plain, trained = sys.argv[1:]
ids = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected = AutoModelForCausalLM.from_pretrained(plain).eval()(input_ids=ids).logits
    for variant in ("base", "alternating", "alternating_cross"):
        loaded = load_model(plain, variant=variant).model.eval()
        assert (loaded(input_ids=ids).logits - expected).abs().max() == 0, variant
        assert type(loaded).__name__ == AVAILABLE_MODELS[loaded.config.model_type][2]
print("parity")
import domanda, ijepa_tower, row_mean, normed_projector
again = load_model(trained)
assert again.new_parameters == []
assert (again.vision.grid_side, again.vision.layout.num_tokens("video", 3)) == (2, 3 * 1)
assert again.vision.projector_args == {"pool": 2} and again.vision.resampler_args == {"stride": 2}
assert again.model.config.llava_format == "domanda"
print(again.model.config.model_type, type(again.model.get_vision_tower()).__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, by the names in their first lines."""
    folder = tmp_path_factory.mktemp("plugins")
    page = (ROOT / "docs" / "extending.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, "every file on the page begins with its name"
        (folder / name.group(1)).write_text(block)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> tuple[Path, Path]:
    """A tiny plain Helium and a tiny I-JEPA."""
    from transformers import AutoTokenizer, HeliumConfig, HeliumForCausalLM, IJepaConfig, IJepaModel

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("newcomers")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = HeliumConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    HeliumForCausalLM(config).save_pretrained(root / "any name")
    tokenizer.save_pretrained(root / "any name")
    tower = IJepaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=56, patch_size=14
    )
    IJepaModel(tower).save_pretrained(root / "tower")
    return root / "any name", root / "tower"


def run(python: str, folder: Path, *words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_works_as_written(
    folder: Path, models: tuple[Path, Path], mixed_data: Path, media_dir: Path, warm_python: str
) -> None:
    plugins = ["--plugins", *sorted(file.stem for file in folder.glob("*.py"))]
    assert len(plugins) > 4
    plain, tower = models
    printed = run(
        warm_python, folder, "-m", "llava.train.train", *plugins, "--model_name_or_path", plain,
        "--vision_tower", tower, "--mm_resampler_type", "row_mean", "--mm_resampler_args", '{"stride": 2}',
        "--num_frames", 3, "--mm_projector_type", "normed", "--mm_projector_args", '{"pool": 2}',
        "--mm_tunable_parts", "mm_vision_tower,mm_mlp_adapter,mm_vision_resampler,mm_language_model",
        "--version", "domanda", "--data_path", mixed_data, "--output_dir", "out", "--max_steps", 2,
        "--per_device_train_batch_size", 7, "--report_to", "none", "--use_cpu", "--disable_tqdm", "true",
        "--dataloader_num_workers", 1,
    )  # fmt: skip
    assert "video of 3 frames: 3 tokens" in printed
    assert "Risposta" not in printed  # of the samples printed, only what is learned
    run(warm_python, folder, "-m", "llava.serve.cli", *plugins, "--model_path", "out", "--video", media_dir / "a.mp4",
        "--max_new_tokens", 3)  # fmt: skip
    printed = run(warm_python, folder, "-c", CONTRACT, plain, "out")
    assert printed.split() == ["parity", "llava_helium", "IJepaTower"]


OWN_SETTINGS = """
import sys
from llava.train.train import main

words, trained = sys.argv[2:], sys.argv[1]
stride = ["--mm_resampler_args", '{"stride": 2}']

def fails(*more):
    try:
        main([*words, *more])
    except ValueError as error:
        return str(error)

open("recipe.yaml", "w").write("mm_resampler_args:\\n  stride: 2\\n")
main([*words, "--config", "recipe.yaml", "--max_steps", "2", "--save_steps", "1", "--output_dir", trained])
main([*words, *stride, "--max_steps", "3", "--output_dir", trained, "--resume_from_checkpoint", "auto"])
print(fails("--max_steps", "4", "--output_dir", trained, "--resume_from_checkpoint", "auto"))
print(fails("--output_dir", "other", "--mm_resampler_args", '{"rows": 2}'))
print(fails("--output_dir", "other", "--mm_resampler_args", "stride=2"))
print(fails("--output_dir", "other", "--mm_resampler_args", "[2]"))
print(fails("--output_dir", "other", "--mm_resampler_args", '{"stride": 3}'))
"""


KEPT = """
from dataclasses import dataclass
import sys
import ijepa_tower, llava_helium, row_mean
from llava.config import VisionConfig
from llava.model import load_model
from llava.model.multimodal_resampler import RESAMPLERS
from llava.token_layout import RESAMPLER_SETTINGS

@dataclass(frozen=True)
class Sizes(row_mean.RowMeanSettings):
    sizes: tuple[int, ...] = (1, 2)

class Sized(row_mean.RowMean):
    structure = ("sizes",)

RESAMPLERS.register("sized", Sizes)(Sized)
plain, tower = sys.argv[1:]
loaded = load_model(plain, vision_tower=tower, resampler_type="sized", resampler_args={"sizes": [3, 4]})
assert loaded.vision.resampler.sizes == (3, 4) and loaded.vision.resampler_args == {"stride": 1, "sizes": [3, 4]}
loaded.model.save_pretrained("sized")
loaded.tokenizer.save_pretrained("sized")
again = load_model("sized", resampler_args={"sizes": [3, 4]}).vision
assert again == loaded.vision and again.resampler == loaded.vision.resampler
RESAMPLER_SETTINGS._parts["sized"] = row_mean.RowMeanSettings  # The file was changed.
try:
    load_model("sized")
except ValueError as error:
    print(error)
"""


def test_a_checkpoint_keeps_own_settings(folder: Path, models: tuple[Path, Path], warm_python: str) -> None:
    said = run(warm_python, folder, "-c", KEPT, *models).strip().splitlines()[-1]
    assert said.startswith("--model_name_or_path 'sized': the visual settings (mm_...) of its config.json: ")
    assert said.endswith("--mm_resampler_args has the unknown setting 'sizes'; known: stride")


def test_own_settings_on_the_command_line(
    folder: Path, models: tuple[Path, Path], mixed_data: Path, warm_python: str
) -> None:
    plain, tower = models
    printed = run(
        warm_python, folder, "-c", OWN_SETTINGS, "settings", "--plugins", "llava_helium", "ijepa_tower", "row_mean",
        "--model_name_or_path", plain, "--vision_tower", tower, "--mm_resampler_type", "row_mean", "--num_frames", 3,
        "--data_path", mixed_data, "--per_device_train_batch_size", 7, "--report_to", "none", "--use_cpu",
        "--disable_tqdm", "true",
    )  # fmt: skip
    other_run, unknown, no_json, no_object, refused = printed.strip().splitlines()[-5:]
    assert re.search(r"another run: --mm_resampler_args was .*stride.*2.*, is .*stride.*1", other_run)
    assert unknown == "--mm_resampler_args has the unknown setting 'rows'; known: stride"
    assert no_json.startswith("--mm_resampler_args is 'stride=2', expected a JSON object")
    assert no_object.startswith("--mm_resampler_args is '[2]', expected a JSON object")
    assert refused == "--mm_resampler_args has stride 3; it must divide the 4 rows of a frame"


def test_a_plugin_that_is_not_there() -> None:
    from llava.registry import import_plugins

    import_plugins(None)
    import_plugins(["json"])
    with pytest.raises(ValueError, match=r"--plugins my_parts: no such module"):
        import_plugins(["my_parts"])


def test_what_goes_wrong_inside_a_plugin_is_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.registry import import_plugins

    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        import_plugins(["needs_more"])
