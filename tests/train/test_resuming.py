"""A folder whose weights or optimizer state are not this run's is an error before the first step.

Each folder that is tampered with gets new checksums: what is seen is that it does not fit, not that it changed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.train.checkpoint import write_checksums
from llava.train.train import cli, main
from llava.train.trainer import LlavaTrainer
from tests.train.test_training import flags, losses, write_json

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(4)]
    return write_json(tmp_path_factory.mktemp("data") / "texts.json", samples)


@pytest.fixture(scope="module")
def stopped(gpt2_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, the first of which was the best one."""
    output = tmp_path_factory.mktemp("run") / "out"
    main(text_flags(gpt2_dir, texts, output, max_steps=2))
    return output


def text_flags(model: Path, data: Path, output: Path, **changes) -> list[str]:
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "eval_loss", "greater_is_better": "true"}
    return flags(model, None, data, output, **{"eval_data_path": data, **steps, **best, **changes})


WITHOUT_BEST = {"load_best_model_at_end": None, "metric_for_best_model": None, "greater_is_better": None,
                "eval_strategy": "no"}  # fmt: skip


def rewrite(folder: Path, change: Callable[[State], State], file: str = "model.safetensors") -> None:
    """Change the tensors of a file, and say so in the list of checksums."""
    state = change(load_file(folder / file))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file, metadata={"format": "pt"})
    refresh(folder)


def refresh(folder: Path) -> None:
    (folder / "checksums.json").unlink(missing_ok=True)
    write_checksums(folder)


LAYER = "transformer.h.1.mlp.c_fc.weight"
FAULTS: dict[str, tuple[Callable[[State], State], tuple[str, ...]]] = {
    "renamed": (
        lambda state: {name.replace(".c_fc.weight", ".fc.weight"): tensor for name, tensor in state.items()},
        ("it lacks 2: transformer.h.0.mlp.c_fc.weight", "it has beside them 2: transformer.h.0.mlp.fc.weight"),
    ),
    "cut out": (lambda state: {n: t for n, t in state.items() if n != LAYER}, (f"it lacks 1: {LAYER}",)),
    "one too many": (lambda state: state | {"extra.bias": torch.zeros(1)}, ("it has beside them 1: extra.bias",)),
    "of another shape": (lambda state: state | {LAYER: state[LAYER][:, :4]}, (f"in another shape 1: {LAYER}",)),
    "without embeddings": (
        lambda state: {n: t for n, t in state.items() if n not in ("transformer.wte.weight", "lm_head.weight")},
        ("transformer.wte.weight",),
    ),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> tuple[Callable[[State], State], tuple[str, ...]]:
    return FAULTS[request.param]


def assert_refused(argv: list[str], folder: Path, phrases: tuple[str, ...], capfd) -> None:
    """One line, which names the folder, what does not fit, and the way on."""
    capfd.readouterr()
    assert cli(lambda: main(argv)) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    for phrase in (str(folder), *phrases):
        assert phrase in said[0]
    assert "give " in said[0]


def test_weights_that_do_not_fit_end_a_resumed_run(stopped, gpt2_dir, texts, fault, steps, tmp_path, capfd) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    rewrite(output / "checkpoint-2", fault[0])
    argv = text_flags(gpt2_dir, texts, output, resume_from_checkpoint=output / "checkpoint-2")
    assert_refused(argv, output / "checkpoint-2", fault[1], capfd)
    assert steps == []


def test_so_do_those_in_several_files(stopped, gpt2_dir, texts, fault, steps, tmp_path, capfd) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    split(output / "checkpoint-2", fault[0])
    assert_refused(
        text_flags(gpt2_dir, texts, output, resume_from_checkpoint="auto"), output / "checkpoint-2", fault[1], capfd
    )
    assert steps == []


def split(folder: Path, change: Callable[[State], State] = lambda state: state) -> None:
    """Store a model in two files and an index."""
    state = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(state))}
    for file in set(files.values()):
        own = {name: state[name].contiguous() for name in state if files[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    refresh(folder)


def test_several_files_are_read_like_one(stopped, gpt2_dir, texts, tmp_path: Path) -> None:
    for name in ("one", "several"):
        shutil.copytree(stopped, tmp_path / name)
    split(tmp_path / "several" / "checkpoint-2")
    for name in ("one", "several"):
        main(text_flags(gpt2_dir, texts, tmp_path / name, resume_from_checkpoint="auto"))
    one, several = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("one", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert losses(tmp_path / "one") == losses(tmp_path / "several")


def test_a_best_model_that_does_not_fit_ends_a_resumed_run_at_once(
    stopped, gpt2_dir, texts, fault, steps, tmp_path, capfd
) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    rewrite(output / "checkpoint-1", fault[0])
    argv = text_flags(gpt2_dir, texts, output, resume_from_checkpoint="auto")
    assert_refused(argv, output / "checkpoint-1", fault[1], capfd)
    assert steps == []


@pytest.mark.parametrize("spoil", ["renamed", "gone"])
def test_a_best_model_that_is_spoiled_while_the_run_goes_on(
    spoil: str, gpt2_dir, texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    output = tmp_path / "out"
    load_best = LlavaTrainer._load_best_model

    def spoiled(self) -> None:
        if spoil == "gone":
            (output / "checkpoint-1" / "model.safetensors").unlink()
        else:
            rewrite(output / "checkpoint-1", FAULTS["renamed"][0])
        load_best(self)

    monkeypatch.setattr(LlavaTrainer, "_load_best_model", spoiled)
    phrases = FAULTS["renamed"][1] if spoil == "renamed" else ()
    capfd.readouterr()
    assert cli(lambda: main(text_flags(gpt2_dir, texts, output, max_steps=2))) == 2
    said = capfd.readouterr().err
    assert all(phrase in said for phrase in (str(output / "checkpoint-1"), *phrases))


def test_a_final_model_that_does_not_fit_is_not_taken(gpt2_dir, texts, fault, steps, tmp_path: Path, capfd) -> None:
    output = tmp_path / "out"
    plain = {**WITHOUT_BEST, "save_strategy": "no", "max_steps": 1}
    main(text_flags(gpt2_dir, texts, output, **plain))
    change, phrases = fault
    state = change(load_file(output / "model.safetensors"))
    save_file({n: t.contiguous() for n, t in state.items()}, output / "model.safetensors", metadata={"format": "pt"})
    steps.clear()
    assert_refused(text_flags(gpt2_dir, texts, output, **plain, resume_from_checkpoint="auto"), output, phrases, capfd)
    assert steps == []


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "non_lora_trainables.safetensors"])
@pytest.mark.parametrize("kind", ["renamed", "cut out"])
def test_adapters_that_do_not_fit(file, kind, gpt2_dir, tower_dir, mixed_data, steps, tmp_path: Path, capfd) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft: pip install 'llava-babylm[lora]'")
    lora = {"lora_enable": "true", "lora_r": 2, "save_strategy": "steps", "save_steps": 1}
    output = tmp_path / "out"
    main(flags(gpt2_dir, tower_dir, mixed_data, output, **lora, max_steps=1))
    name = sorted(load_file(output / "checkpoint-1" / file))[0]
    change = (lambda s: {f"{n}_" if n == name else n: t for n, t in s.items()}) if kind == "renamed" else (
        lambda s: {n: t for n, t in s.items() if n != name})  # fmt: skip
    rewrite(output / "checkpoint-1", change, file)
    steps.clear()
    argv = flags(gpt2_dir, tower_dir, mixed_data, output, **lora, max_steps=2, resume_from_checkpoint="auto")
    assert_refused(argv, output / "checkpoint-1", (file, name), capfd)
    assert steps == []


@pytest.mark.parametrize("backbone", ["llava_mixtral", "llava_qwen_moe"])
def test_a_mixture_of_experts_goes_on_from_its_own_experts(backbone: str, backbone_dirs, texts, tmp_path: Path) -> None:
    """Its files have every expert by itself, under names that the model does not have."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    few = {**WITHOUT_BEST, "save_steps": 2}
    main(text_flags(backbone_dirs[backbone], texts, whole, **few))
    shutil.copytree(whole / "checkpoint-2", parted / "checkpoint-2")
    main(text_flags(backbone_dirs[backbone], texts, parted, **few, resume_from_checkpoint="auto"))
    assert losses(parted) == losses(whole)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parted))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_that_are_missing_are_named(backbone_dirs, texts, steps, tmp_path: Path, capfd) -> None:
    main(text_flags(backbone_dirs["llava_mixtral"], texts, tmp_path, **WITHOUT_BEST, max_steps=1))
    rewrite(tmp_path / "checkpoint-1", lambda state: {n: t for n, t in state.items() if "layers.1.post" not in n})
    steps.clear()
    argv = text_flags(backbone_dirs["llava_mixtral"], texts, tmp_path, **WITHOUT_BEST, resume_from_checkpoint="auto")
    assert_refused(argv, tmp_path / "checkpoint-1", ("it lacks 1: model.layers.1.post_attention",), capfd)
    assert steps == []


@pytest.mark.parametrize("stores_tower", [None, "true"])
def test_a_tower_elsewhere_and_a_tied_head_are_meant(
    stores_tower, gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path, caplog
) -> None:
    """Also where the tower is to be stored only from now on."""
    run = {"save_strategy": "steps", "save_steps": 1}
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **run, max_steps=1))
    stored = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert not any("vision_tower" in name or name == "lm_head.weight" for name in stored)
    caplog.clear()
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **run, max_steps=2, resume_from_checkpoint="auto",
                         save_vision_tower=stores_tower))  # fmt: skip
    assert trainer.state.global_step == 2
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING and "weights" in r.message] == []


OPTIMIZER_FAULTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "fewer groups": (lambda state: state["param_groups"].pop(), "has 1 groups of parameters, this run's optimizer has"),
    "smaller group": (lambda state: state["param_groups"][0]["params"].pop(), "group 0 of its parameters is"),
    "another part": (lambda state: state["param_groups"][0].update(part="mm_mlp_adapter"), "of mm_mlp_adapter, in"),
    "another shape": (
        lambda state: state["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of parameter 0 (group 0) is (3,), in"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "phrase"), OPTIMIZER_FAULTS.values(), ids=OPTIMIZER_FAULTS)
def test_an_optimizer_of_other_groups(
    spoil, phrase: str, stopped, gpt2_dir, texts, steps, tmp_path: Path, capfd
) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    path = output / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    spoil(state)
    torch.save(state, path)
    refresh(output / "checkpoint-2")
    argv = text_flags(gpt2_dir, texts, output, resume_from_checkpoint="auto")
    assert_refused(argv, output / "checkpoint-2", (phrase,), capfd)
    assert steps == []


def test_an_optimizer_of_a_version_without_parts_is_read(stopped, gpt2_dir, texts, tmp_path: Path) -> None:
    output = shutil.copytree(stopped, tmp_path / "out")
    path = output / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for group in state["param_groups"]:
        del group["part"], group["vision_module"]
    torch.save(state, path)
    refresh(output / "checkpoint-2")
    assert main(text_flags(gpt2_dir, texts, output, resume_from_checkpoint="auto")).state.global_step == 4
