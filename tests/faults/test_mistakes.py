"""A tour of the mistakes that users make: each is one line that names flag, file or sample and says what to do.

Every command is called in this process as its ``main``; what it prints is read from the file descriptors, so that
libraries' own messages count too.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import turns
from mistakes import MISTAKES, Mistake
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
LONGEST = 1200
"""Characters of an error: nobody reads more, and a value may have half a million."""


def run_train(words: list[str]) -> int:
    from llava.train.train import cli, main

    return cli(partial(main, words))


def run_alternating(words: list[str]) -> int:
    from llava.train.train import cli

    sys.path.insert(0, str(ROOT))
    try:
        module = importlib.import_module("train_alternating")
    finally:
        sys.path.remove(str(ROOT))
    return cli(partial(module.main, words))


def run_module(name: str) -> Callable[[list[str]], int]:
    return lambda words: importlib.import_module(name).main(words)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], dict[str, str]]] = {
    "train": (
        run_train,
        {
            "model_name_or_path": "{gpt2}", "data_path": "{text}", "output_dir": "{new}", "use_cpu": "true",
            "report_to": "none", "max_steps": "1", "disable_tqdm": "true",
        },
    ),
    "alternating": (
        run_alternating,
        {"model_name_or_path": "{gpt2}", "data_path": "{text}", "output_dir": "{new}", "use_cpu": "true"},
    ),
    "cli": (run_module("llava.serve.cli"), {"model_path": "{seeing}", "prompt": "ciao"}),
    "eval": (
        run_module("llava.eval.run"),
        {"task": "caption", "model_path": "{seeing}", "data": "{mixed}", "out": "{new}"},
    ),
    "check": (run_module("llava.data.check"), {}),
    "random_weights": (run_module("llava.model.random_weights"), {"model_path": "{gpt2}", "output_dir": "{new}"}),
    "merge_lora": (run_module("llava.model.merge_lora"), {"model_path": "{gpt2}", "output_dir": "{new}"}),
    "train_tokenizer": (run_module("llava.data.train_tokenizer"), {"data": "{lines}", "output_dir": "{new}"}),
    "narratives": (
        run_module("llava.data.localized_narratives.__main__"), {"images": "{media}", "out": "{new}"},
    ),
    "webvid": (
        run_module("llava.data.webvid"),
        {"rows": "{rows}", "video-dir": "{media}", "out": "{new}"},
    ),
}  # fmt: skip
"""How each command is called, and the flags without which it would not come to the mistake."""


def save(loaded: Any, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def poison(folder: Path, suffix: str) -> Path:
    """One value of the weight whose name ends so becomes NaN."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(suffix))
    weights[name].view(-1)[3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_models(folder: Path, gpt2: Path, llama: Path, loaded: Any) -> dict[str, Path]:
    """Checkpoints with one fault each."""
    seeing = save(loaded, folder / "seeing")

    def copy(name: str, source: Path = gpt2) -> Path:
        return Path(shutil.copytree(source, folder / name))

    models = {name: copy(name) for name in ("bad_config", "other_config", "cut", "no_tokenizer", "other_tokenizer")}
    (models["bad_config"] / "config.json").write_text('{"model_type": "gpt2", "n_layer": ')
    config = json.loads((gpt2 / "config.json").read_text())
    (models["other_config"] / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    weights = (models["cut"] / "model.safetensors").read_bytes()
    (models["cut"] / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for file in models["no_tokenizer"].glob("tokenizer*"):
        file.unlink()
    (models["other_tokenizer"] / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    more: dict[str, dict[str, str]] = {
        "listed": {"config.json": "[1]"},
        "config_words": {"config.json": json.dumps(config | {"n_layer": "two"})},
        "cut_index": {"model.safetensors.index.json": '{"weight'},
        "unspoken": {"tokenizer_config.json": "[]"},
        "half_vision": {"config.json": json.dumps(config | {"mm_vision_config": {"model_type": "dinov2"}})},
    }
    for name, files in more.items():
        models[name] = copy(name)
        for file, content in files.items():
            (models[name] / file).write_text(content)
    (models["cut_index"] / "model.safetensors").unlink()
    (models["cut_index"] / "model-00001-of-00002.safetensors").write_bytes(b"x")
    for name in ("cut_shard", "missing_shard"):
        models[name] = copy(name, seeing)
        (models[name] / "model.safetensors").unlink()
        loaded.model.save_pretrained(models[name], max_shard_size="60kB")
    second = sorted(models["cut_shard"].glob("model-*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-100])
    sorted(models["missing_shard"].glob("model-*.safetensors"))[1].unlink()
    models["nan"] = poison(copy("nan"), "mlp.c_fc.weight")
    models["nan_seeing"] = poison(copy("nan_seeing", seeing), "mm_projector.0.weight")
    return models | {"seeing": seeing}


def write_files(folder: Path) -> dict[str, Path]:
    """Data files, recipes and what is neither."""
    text = {"id": "t", "conversations": turns("", "Il gatto dorme.")}
    picture = {"conversations": turns("<image>", "Il gatto dorme.")}
    files = {
        "text.json": json.dumps([text]),
        "lines.txt": "Il gatto dorme sul divano.\n" * 9,
        "rows.csv": "videoid,name_it\n1,Il gatto dorme\n",
        "twice.yaml": "num_frames: 4\nlearning_rate: 1.0e-4\nnum_frames: 8\n",
        "long.yaml": f"num_frames: {'9' * 5000}\n",
        "wrong.yaml": "num_frames: four\n",
        "mixture.yaml": "datasets:\n  - json_path: text.json\n    json_path: text.json\n",
        "base64.json": json.dumps(
            [{"id": "b64", "image": "data:image/png;base64," + "iVBORw0KGgo" * 40_000, **picture}]
        ),
        "long.json": '[{"id": ' + "9" * 5000 + ', "conversations": []}]',
        "no_picture.json": json.dumps([{"id": "x", "image": "gone.png", **picture}]),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "garbage.json").write_bytes(bytes(range(128, 256)) * 9)
    names = {"twice.yaml": "keys_twice", "mixture.yaml": "mixture_twice", "long.yaml": "long_yaml",
             "wrong.yaml": "wrong_yaml", "long.json": "long_json"}  # fmt: skip
    return {names.get(name, Path(name).stem): folder / name for name in [*files, "garbage.json"]}


@pytest.fixture(scope="module")
def scene(tmp_path_factory, gpt2_dir, llama_dir, tower_dir, mixed_data, load_tiny) -> dict[str, Path]:
    """Everything that the tour's command lines name."""
    folder = tmp_path_factory.mktemp("mistakes")
    paths = {"gpt2": gpt2_dir, "tower": tower_dir, "mixed": mixed_data, "media": mixed_data.parent}
    return paths | write_models(folder, gpt2_dir, llama_dir, load_tiny()) | write_files(folder)


def write_words(mistake: Mistake, paths: dict[str, Path]) -> list[str]:
    """The mistake's words behind the command's own, without those that it gives itself."""
    own = mistake.words.split() if isinstance(mistake.words, str) else mistake.words
    given = {word.partition("=")[0] for word in own}
    words = list(own) if mistake.command in ("check", "narratives") else []
    for flag, value in COMMANDS[mistake.command][1].items():
        if f"--{flag}" not in given and flag != mistake.without:
            words += [f"--{flag}", value]
    words += [] if mistake.command in ("check", "narratives") else own
    return [word if len(word) > 1000 else word.format_map({k: str(v) for k, v in paths.items()}) for word in words]


def test_there_are_enough_of_them() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 60
    assert {mistake.command for mistake in MISTAKES} == set(COMMANDS)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_clear_line(mistake, scene, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    # A hub that nobody answers at.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    words = write_words(mistake, scene | {"new": tmp_path / "new"})
    capfd.readouterr()
    try:
        status = COMMANDS[mistake.command][0](words)
    except SystemExit as stop:
        status = stop.code
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    if mistake.status == 1:  # The check's report.
        errors = [line for line in printed.out.splitlines() if "sample " in line]
    assert status == mistake.status, printed.err[-3000:]
    assert len(errors) == 1, printed.err[-3000:]
    for trace in ("Traceback", "usage:"):
        assert trace not in printed.err
    assert len(errors[0]) < LONGEST
    for pattern in mistake.says:
        assert re.search(pattern, errors[0]), errors[0]
