"""train_alternating.py: every flag, on a tiny Qwen2 and a tiny GPT-2 checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ITALIAN, TinyBackbones, load_script, turns
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava.model import split_type
from llava.model.loading import load_model
from llava.train.train import cli

SCRIPT = Path(__file__).parents[2] / "train_alternating.py"
FAMILIES = ["llava_gpt2", "llava_qwen"]


@pytest.fixture(scope="module")
def script():
    return load_script("train_alternating.py")


@pytest.fixture
def call(script, capsys: pytest.CaptureFixture[str]):
    """Runs the script's command line; returns its exit status, its output and its errors."""

    def run(*words: object) -> tuple[int, str, str]:
        status = cli(partial(script.main, [str(word) for word in words]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(family: str, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A plain checkpoint of 4 layers."""
    return TinyBackbones(tmp_path_factory.mktemp("deep"), tokenizer_dir, num_layers=4)[family]


@pytest.fixture(scope="module")
def empty_model(family: str, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of an alternating model and a tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("empty")
    config = json.loads((backbone / "config.json").read_text())
    config["model_type"] = f"{family}_with_alternating_attn"
    (folder / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a training step an error."""
    monkeypatch.setattr("llava.train.train.LlavaTrainer.train", None)


@pytest.mark.parametrize(
    ("variant", "status"), [("auto", 0), ("alternating", 0), ("alternating_cross", 3), ("base", 3)]
)
def test_dry_run_prints_the_model_type(
    call, family: str, empty_model: Path, variant: str, status: int, no_steps
) -> None:
    code, out, err = call("--dry_run", "--model_name_or_path", empty_model, "--variant", variant)
    assert (code, out.strip()) == (status, f"{family}_with_alternating_attn")
    if status:
        assert err.count("\n") == 1
        assert f"error: --variant is {variant}" in err


def test_force_overrules_the_mismatch(call, empty_model: Path, no_steps) -> None:
    flags = ["--model_name_or_path", empty_model, "--variant", "alternating_cross", "--force"]
    assert call("--dry_run", *flags)[0] == 0


def test_a_plain_checkpoint_is_base(call, backbone: Path, no_steps) -> None:
    code, out, _ = call("--dry_run", "--model_name_or_path", backbone, "--variant", "base")
    assert (code, out.strip()) == (0, AutoConfig.from_pretrained(backbone).model_type)


def test_inspect_data_opens_no_media(call, backbone: Path, tmp_path: Path, no_steps) -> None:
    samples = [
        {"id": 7, "video": "is-not-there.mp4", "conversations": turns("<video>", "Un gatto è lì."), "more": [1]},
        {"id": 8, "conversations": turns("", ITALIAN[0])},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    code, out, _ = call("--inspect_data", "--model_name_or_path", backbone, "--data_path", path, path)
    assert code == 0
    assert out.startswith("4 samples\n")
    assert json.loads(out[out.index("{") :]) == samples[0]


def test_inspect_weights_prints_and_writes_every_tensor(
    call, family, backbone, empty_model, tower_dir, tmp_path, no_steps
):
    code, out, _ = call(
        "--inspect_weights", "--model_name_or_path", empty_model, "--backbone_model", backbone,
        "--vision_tower", tower_dir, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    manifest = json.loads((tmp_path / "out" / "weights_manifest.json").read_text())
    tensors = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    plain = dict(AutoModelForCausalLM.from_pretrained(backbone).named_parameters())
    assert {name for name, tensor in tensors.items() if tensor["status"] == "copied"} == set(plain)
    assert all(tensors[name]["source_file"] == "model.safetensors" for name in plain)
    new = {name for name, tensor in tensors.items() if tensor["status"] == "new"}
    assert new
    assert all(re.search(r"\.(mm_projector|vision_tower)\.", name) for name in new)
    assert re.search(rf"copied +{len(plain)} tensors", out)
    assert re.search(r"shape mismatch +0 tensors", out)


def test_inspect_weights_names_shapes_that_differ(call, backbone, empty_model, tmp_path, no_steps) -> None:
    model = AutoModelForCausalLM.from_pretrained(backbone)
    model.resize_token_embeddings(500)
    model.save_pretrained(tmp_path / "wide")
    code, out, _ = call(
        "--inspect_weights", "--model_name_or_path", empty_model, "--backbone_model", tmp_path / "wide",
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert code == 0
    mismatched = [
        t
        for t in json.loads((tmp_path / "weights_manifest.json").read_text())["tensors"]
        if t["status"] == "shape mismatch"
    ]
    assert [tensor["source_shape"][0] for tensor in mismatched] == [500]
    assert re.search(r"shape mismatch +1 tensors: \S+ \(500, 32\) for \(383, 32\)", out)


def text_data(folder: Path) -> Path:
    path = folder / "text.json"
    path.write_text(json.dumps([{"id": i, "conversations": turns("", text)} for i, text in enumerate(ITALIAN)]))
    return path


def test_training_from_a_backbone_falls(
    call, family, backbone, empty_model, mixed_data, tower_dir, tmp_path, caplog
) -> None:
    output = tmp_path / "out"
    caplog.set_level("INFO", logger="llava.train.throughput")
    code, out, err = call(
        "--model_name_or_path", empty_model, "--variant", "auto", "--init_from_backbone", "--backbone_model", backbone,
        "--data_path", mixed_data, "--vision_tower", tower_dir, "--output_dir", output, "--num_frames", 3,
        "--mm_resampler_type", "fast_slow_resampler", "--mm_perceiver_latents", 9, "--mm_perceiver_latents_fast", 4,
        "--mm_resampler_width", 32, "--mm_resampler_heads", 4,
        "--max_steps", 20, "--learning_rate", "1e-2", "--per_device_train_batch_size", 7, "--logging_steps", 1,
        "--throughput_log_steps", 5, "--save_strategy", "no", "--report_to", "none",
        "--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"copied +\d+ tensors", out)
    losses = [
        row["loss"] for row in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]
    rates = [r.getMessage() for r in caplog.records if "samples/s" in r.getMessage()]
    assert [int(re.match(r"step (\d+)", line).group(1)) for line in rates] == [5, 10, 15, 20]
    said = r"[\d.]+ samples/s, \d+ tokens/s, \d+ supervised, \d+% waiting for data, peak (GPU )?memory [\d.]+ GiB$"
    assert all(re.search(said, line) for line in rates)
    trained = load_model(str(output)).model
    assert split_type(trained.config.model_type) == (family, "alternating")


def test_a_backbone_alone_is_the_model(call, family, backbone, tower_dir, tmp_path) -> None:
    new = ["--backbone_model", backbone, "--init_from_backbone", "--variant", "alternating"]
    assert call("--dry_run", *new)[:2] == (0, f"{family}_with_alternating_attn\n")
    run = ["--data_path", text_data(tmp_path), "--output_dir", tmp_path / "out", "--max_steps", 1, "--learning_rate", 0,
           "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--lazy_preprocess", "True"]  # fmt: skip
    code, out, err = call(*new, "--vision_tower", tower_dir, *run)
    assert code == 0, err
    assert re.search(r"shape mismatch +0 tensors", out)
    trained = load_model(str(tmp_path / "out")).model
    assert split_type(trained.config.model_type) == (family, "alternating")
    plain = dict(AutoModelForCausalLM.from_pretrained(backbone).named_parameters())
    own = dict(trained.named_parameters())
    # New tokens are behind those of the backbone.
    assert all(torch.equal(own[name][: len(weights)], weights) for name, weights in plain.items())
    # Its projector and tower are never copied, so a model that sees has to be named.
    code, _, err = call("--dry_run", "--backbone_model", tmp_path / "out", "--init_from_backbone")
    assert code == 2
    assert "has vision modules, which --init_from_backbone never copies" in err


def test_forced_variant_trains_a_plain_checkpoint(call, family, backbone, tmp_path) -> None:
    code, _, err = call(
        "--model_name_or_path", backbone, "--variant", "alternating_cross", "--force",
        "--data_path", text_data(tmp_path), "--output_dir", tmp_path / "out", "--max_steps", 1,
        "--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--dataloader_pin_memory", "false",
    )  # fmt: skip
    assert code == 0, err
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == f"{family}_with_alternating_cross_attn"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "/no/such/model"], "--model_name_or_path '/no/such/model' is no folder"),
        (["--model_name_or_path", "MODEL", "--init_from_backbone"], "need --backbone_model PATH"),
        (["--model_name_or_path", "MODEL", "--backbone_model", "MODEL"], "add --init_from_backbone"),
        (
            ["--model_name_or_path", "MODEL", "--init_from_backbone", "--backbone_model", "/no/such/backbone"],
            "--backbone_model '/no/such/backbone' is no folder",
        ),
        (["--model_name_or_path", "MODEL", "--inspect_data", "--data_path", "/no/data.json"], "/no/data.json: no such"),
        (["--model_name_or_path", "MODEL", "--inspect_data"], "--inspect_data needs --data_path"),
        (["--model_name_or_path", "MODEL", "--image_folder", "/no/images"], "--image_folder /no/images: no such"),
        (["--model_name_or_path", "MODEL", "--varant", "base"], "unknown flag --varant"),
        (["--model_name_or_path", "MODEL", "--force"], "--force needs a --variant"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(call, gpt2_dir: Path, flags: list[str], message: str, no_steps) -> None:
    code, _, err = call("--dry_run", *(str(gpt2_dir) if flag == "MODEL" else flag for flag in flags))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_weights_that_fit_nowhere(call, backbone_dirs, empty_model: Path, tmp_path: Path, no_steps) -> None:
    code, _, err = call(
        "--inspect_weights", "--model_name_or_path", empty_model, "--backbone_model", backbone_dirs["llava_opt"],
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert "tensors fits" in err


def test_a_folder_without_weights_needs_a_backbone(call, empty_model: Path, tmp_path: Path) -> None:
    code, _, err = call(
        "--model_name_or_path", empty_model, "--data_path", text_data(tmp_path), "--output_dir", tmp_path, "--use_cpu",
        "--report_to", "none",
    )  # fmt: skip
    assert code == 2
    assert "has no weights" in err


def test_as_a_program(backbone: Path, warm_python: str) -> None:
    command = [warm_python, SCRIPT, "--model_name_or_path", backbone, "--variant", "alternating", "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent, check=False)
    assert done.returncode == 3
    assert done.stdout.strip() == AutoConfig.from_pretrained(backbone).model_type


def test_copied_parameters_are_the_backbones(backbone: Path, empty_model: Path) -> None:
    loaded = load_model(str(empty_model), weights_from=str(backbone))
    plain = AutoModelForCausalLM.from_pretrained(backbone)
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
