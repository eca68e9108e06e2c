"""Training runs through main(): they learn, they resume exactly, and mistakes end them clearly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.data.collator import SupervisedCollator, model_inputs
from llava.model.loading import load_model
from llava.serve.cli import main as serve
from llava.train import trainer as trainer_module
from llava.train.parts import hold_in, unfused_gelus
from llava.train.train import main
from llava.types import BadSample

ROOT = Path(__file__).parents[2]


def flags(model: Path, tower: Path | None, data: Path, output: Path, **changes) -> list[str]:
    """A command line for a tiny run, with some flags changed (None takes one out)."""
    values = {
        "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": output,
        "mm_resampler_type": "fast_slow_resampler" if tower else None, "mm_perceiver_latents": 9,
        "mm_perceiver_latents_fast": 4, "mm_resampler_width": 32, "num_frames": 3, "max_steps": 10,
        "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def write_json(path: Path, samples: list) -> Path:
    path.write_text(json.dumps(samples, ensure_ascii=False))
    return path


@pytest.fixture
def two_clips(mixed_data: Path) -> Path:
    return write_json(mixed_data.parent / "two.json", json.loads(mixed_data.read_text())[:2])


def test_overfits_two_clips_and_captions_them(gpt2_dir, tower_dir, two_clips: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    torch.backends.cuda.enable_cudnn_sdp(True)
    main(flags(gpt2_dir, tower_dir, two_clips, output, max_steps=150, per_device_train_batch_size=2, learning_rate=5e-3,
               mm_vision_select_layer=1))  # fmt: skip
    assert losses(output)[-1] < 0.05
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "its gradients are NaN at some lengths, see engines.py"
    printed = capsys.readouterr().out
    assert "mm_vision_resampler" in printed
    assert "video of 3 frames: 39 tokens" in printed
    assert "supervised tokens of the first samples" in printed
    for sample in json.loads(two_clips.read_text()):
        assert serve(["--model_path", str(output), "--video", str(two_clips.parent / sample["video"])]) == 0
        assert capsys.readouterr().out.strip() == sample["conversations"][1]["value"]


def test_text_alone_needs_no_tower(llama_dir: Path, tmp_path: Path, capsys, caplog) -> None:
    text = [{"id": i, "conversations": [{"from": "gpt", "value": "Il gatto dorme sul divano."}]} for i in range(4)]
    data = write_json(tmp_path / "text.json", text)
    output = tmp_path / "out"
    main(flags(llama_dir, None, data, output, max_steps=60, learning_rate=1e-2))
    assert losses(output)[-1] < 0.1
    capsys.readouterr()
    assert serve(["--model_path", str(output), "--prompt", "Il gatto"]) == 0
    assert capsys.readouterr().out.strip() == "dorme sul divano."
    assert serve(["--model_path", str(output), "--image", "a.png"]) == 2
    assert "trained on text alone" in capsys.readouterr().err
    # Another tokenizer of as many tokens answers with any words at all.
    assert not [line for line in caplog.messages if "is not the one that the model was trained with" in line]
    path = output / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, last = sorted(words, key=words.get)[-2:]
    words[first], words[last] = words[last], words[first]
    path.write_text(json.dumps(tokenizer))
    assert serve(["--model_path", str(output), "--prompt", "Il gatto"]) == 0
    assert [line for line in caplog.messages if f"the tokenizer in {output} is not the one that the model was" in line]


def test_resumed_run_equals_an_uninterrupted_one(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    steps = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    main(flags(gpt2_dir, tower_dir, mixed_data, whole, **steps))
    main(flags(gpt2_dir, tower_dir, mixed_data, parted, **steps))
    for folder in ("checkpoint-6", "checkpoint-8"):
        for file in (parted / folder).iterdir():
            file.unlink()
        (parted / folder).rmdir()
    main(flags(gpt2_dir, tower_dir, mixed_data, parted, **steps, resume_from_checkpoint="auto"))
    assert losses(parted) == losses(whole)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parted))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_give_the_same_step(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1000, "lr_scheduler_type": "constant", "max_grad_norm": 0,
            "train_sampling_strategy": "sequential"}  # fmt: skip
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "one", **step, per_device_train_batch_size=6))
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "many", **step, per_device_train_batch_size=1,
               gradient_accumulation_steps=6))  # fmt: skip
    assert_same_step(gpt2_dir, tmp_path / "one", tmp_path / "many")


def assert_same_step(start: Path, one: Path, other: Path) -> None:
    """Loss and gradients of a single step agree within 1e-6; a huge learning rate keeps gradients exact."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-6)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    before = load_file(start / "model.safetensors")
    difference = total = 0.0
    for name in first:
        # New weights start at 0.02 and the like, which a learning rate of 1000 makes nothing of.
        start_of = before[name] if name in before and before[name].shape == first[name].shape else 0
        difference += float((first[name].double() - second[name].double()).square().sum())
        total += float((first[name] - start_of).double().square().sum())
    assert total > 0
    assert (difference / total) ** 0.5 < 1e-6


def launch(
    python: str, processes: int, argv: list[str], timeout: int = 400, start: Sequence[str] = ("-m", "llava.train.train")
) -> subprocess.CompletedProcess[str]:
    """Run the trainer under torchrun, as a user does."""
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone",
               *start, *argv]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": python}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_ranks_of_different_modality_give_the_same_step(
    engine: str, gpt2_dir, tower_dir, mixed_data: Path, tmp_path: Path, warm_python: str
) -> None:
    samples = json.loads(mixed_data.read_text())
    # Rank 0 sees two videos, rank 1 two texts; then an image on rank 0 and text on rank 1.
    order = [samples[i] for i in (0, 1, 5, 6)]
    data = write_json(mixed_data.parent / f"ranks-{engine}.json", order)
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 1000, "lr_scheduler_type": "constant", "max_grad_norm": 0,
            "train_sampling_strategy": "sequential"}  # fmt: skip
    main(flags(gpt2_dir, tower_dir, data, tmp_path / "single", **step, per_device_train_batch_size=4))
    # The second as scripts of the LLaVA family do.
    extra = {} if engine == "ddp" else {"deepspeed": f"scripts/{engine}.json"}
    start = ["-m", "llava.train.train"] if engine == "ddp" else [str(ROOT / "llava" / "train" / "train_mem.py")]
    if engine != "ddp":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    argv = flags(gpt2_dir, tower_dir, data, tmp_path / engine, **step, per_device_train_batch_size=2, **extra)
    ended = launch(warm_python, 2, argv, start=start)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stderr.count("the library's own settings of --deepspeed zero3") == (engine == "zero3")  # once
    assert_same_step(gpt2_dir, tmp_path / "single", tmp_path / engine)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precisions_train(gpt2_dir, tower_dir, mixed_data, tmp_path: Path, precision: str) -> None:
    changes = {"bf16": "true"} if precision == "bf16" else {}
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", **changes))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert trainer.model.get_vision_tower().dtype == expected
    assert next(trainer.model.get_model().mm_projector.parameters()).dtype == torch.float32


def test_a_frozen_tower_is_stored_in_the_precision_of_the_run(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        output = tmp_path / precision
        changes = {"bf16": "true"} if precision == "bf16" else {}
        trainer = main(flags(gpt2_dir, tower_dir, mixed_data, output, save_vision_tower="true", max_steps=1, **changes))
        stored = load_file(output / "model.safetensors")
        assert {t.dtype for name, t in stored.items() if ".vision_tower." in name} == {expected}
        assert {t.dtype for name, t in stored.items() if ".vision_tower." not in name} == {torch.float32}
        # Read again, it sees what the run has seen.
        again, frames = load_model(str(output)).model.get_vision_tower(), torch.rand(2, 3, 56, 56)
        hold_in(again, expected)
        assert torch.equal(again(frames), trainer.model.get_vision_tower()(frames))


def test_weights_in_bf16_alone_resume_exactly(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    changes = {"bf16": "true", "bf16_weights": "true", "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    moments = [value for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    whole, history = load_file(tmp_path / "model.safetensors"), losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    for name in ("model.safetensors", "run_identity.json"):
        (tmp_path / name).unlink()
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes, resume_from_checkpoint="auto"))
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert losses(tmp_path) == history
    with pytest.raises(ValueError, match="--bf16_weights was True, is False"):
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, **changes | {"bf16_weights": "false", "max_steps": 7},
                   resume_from_checkpoint="auto"))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--bf16_weights holds weights in what --bf16 computes in"),
        ({"bf16": "true", "bits": 8, "lora_enable": "true"}, "--bits 8 holds weights in fewer bits already"),
    ],
)
def test_weights_in_bf16_that_cannot_be(gpt2_dir, mixed_data, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        main(flags(gpt2_dir, None, mixed_data, tmp_path, bf16_weights="true", **changes))


def test_products_by_onednn_train_alike(gpt2_dir, tower_dir, mixed_data, tmp_path: Path, monkeypatch) -> None:
    used: list[bool] = []
    choose = trainer_module.choose_products
    monkeypatch.setattr(trainer_module, "choose_products", lambda onednn: (used.append(onednn), choose(onednn))[1])
    for value in ("false", "true"):
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / value, onednn=value, max_steps=3,
                   gradient_checkpointing=value))  # fmt: skip
    assert used == [False] * 3 + [True] * 3
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)
    with pytest.raises(ValueError, match="--onednn: --torch_compile chooses its own products"):
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path, onednn="true", torch_compile="true"))


def test_a_fused_gelu_trains_alike(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    plain, fused = (
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / value, fused_gelu=value, max_steps=2))
        for value in ("false", "true")
    )
    assert unfused_gelus(plain.model)
    assert not unfused_gelus(fused.model)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)


@pytest.mark.parametrize("batches", [{}, {"packing": "true", "per_device_train_batch_size": 1}])
def test_compiled_steps_are_the_same_and_few_graphs_serve_all(
    gpt2_dir, tower_dir, mixed_data, tmp_path: Path, batches: dict
) -> None:
    batches = {"per_device_train_batch_size": 2, "max_steps": 8, "model_max_length": 120, **batches}
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "eager", **batches))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "compiled", **batches, torch_compile_backend="eager"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-6)
    # Of batches of 2 rows and of 1, of text alone and with media: not one for each number of images.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 14
    torch._dynamo.reset()


def test_evaluation_and_grouping_by_length(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    trainer = main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", max_steps=4, eval_data_path=mixed_data,
                         eval_strategy="steps", eval_steps=2, train_sampling_strategy="group_by_length",
                         per_device_train_batch_size=2))  # fmt: skip
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2


def test_rotation_spares_the_best_checkpoint(gpt2_dir, tmp_path: Path) -> None:
    """The first evaluation is the best one, and every later save would rotate its checkpoint away."""
    data = write_json(tmp_path / "text.json", [
        {"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(4)
    ])  # fmt: skip
    output = tmp_path / "out"
    trainer = main(flags(gpt2_dir, None, data, output, max_steps=5, save_strategy="steps", save_steps=1, eval_steps=1,
                         eval_strategy="steps", eval_data_path=data, save_total_limit=2, load_best_model_at_end="true",
                         metric_for_best_model="eval_loss", greater_is_better="true"))  # fmt: skip
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-5"]
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    best, last, final = (
        load_file(folder / "model.safetensors") for folder in (output / "checkpoint-1", output / "checkpoint-5", output)
    )
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(final[name], best[name])
    assert not torch.equal(final[name], last[name])


def test_an_evaluation_leaves_no_trace_in_the_training(gpt2_dir, tmp_path: Path) -> None:
    """With dropout, whose random numbers an evaluation must not use up, and an order of the data that is drawn."""
    model = tmp_path / "dropout"
    shutil.copytree(gpt2_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.2, "embd_pdrop": 0.2}))
    data = write_json(tmp_path / "text.json", [
        {"id": i, "conversations": [{"from": "gpt", "value": f"Il gatto {i} dorme."}]} for i in range(6)
    ])  # fmt: skip
    found = []
    for name, evaluation in (
        ("without", {}),
        ("with", {"eval_data_path": data, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": "true"}),
    ):
        main(flags(model, None, data, tmp_path / name, per_device_train_batch_size=2, max_steps=6, **evaluation))
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": "nothing.json"}, r"--data_path nothing\.json: no such file"),
        ({"model_max_length": 40}, "a video of 3 frames takes 39 tokens, but a sample may have 40"),
        ({"mm_perceiver_latents": 10}, "--mm_perceiver_latents is 10, which is not a square; .* 9 and 16"),
        ({"vision_tower": "./nowhere"}, "--vision_tower './nowhere'"),
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path './nowhere'"),
    ],
)
def test_mistakes_end_the_run_before_training(
    gpt2_dir, tower_dir, mixed_data, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        main(flags(gpt2_dir, tower_dir, mixed_data, tmp_path / "out", **changes))


def test_a_broken_clip_stops_the_run_and_is_named(gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    (mixed_data.parent / "broken.mp4").write_bytes(b"not a video at all")
    samples = json.loads(mixed_data.read_text())
    samples[0]["video"] = "broken.mp4"
    data = write_json(mixed_data.parent / "with-broken.json", samples)
    with pytest.raises(ValueError, match=r"sample 'video-a' \(with-broken\.json, sample 1\).*broken\.mp4"):
        main(flags(gpt2_dir, tower_dir, data, tmp_path / "out"))


def test_a_batch_without_a_good_sample_has_no_loss_and_no_gradient(load_tiny) -> None:
    model = load_tiny().model.train()
    bad = BadSample("bad", "x.json, sample 1", "a.mp4", "no such file")
    for batch in (SupervisedCollator(0)([]), SupervisedCollator(0)([bad])):
        for num_items in (None, 0, 5):
            model.zero_grad()
            loss = model(**model_inputs(batch), num_items_in_batch=num_items).loss
            loss.backward()
            assert loss == 0
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            assert gradients
            assert not any(gradient.any() for gradient in gradients)


def test_shell_sees_one_line_and_status_2(gpt2_dir, tmp_path: Path, warm_python: str) -> None:
    argv = flags(gpt2_dir, None, tmp_path / "nothing.json", tmp_path / "out")
    command = [warm_python, "-m", "llava.train.train", *argv]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert ended.returncode == 2
    assert "nothing.json: no such file" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
