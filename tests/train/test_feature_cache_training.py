"""A run that reads the tower's features from a cache learns as one that computes them, and says what it read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.eval.run import evaluate, parse_arguments
from llava.serve.cli import main as serve
from llava.train.feature_cache import FeatureLog
from llava.train.replay import main as replay
from llava.train.train import main

ROOT = Path(__file__).parents[2]


def flags(model: Path, tower: Path, data: Path, output: Path, **changes) -> list[str]:
    """A command line for a tiny run, with some flags changed (None takes one out)."""
    values = {
        "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": output,
        "mm_resampler_type": "fast_slow_resampler", "mm_perceiver_latents": 9, "mm_perceiver_latents_fast": 4,
        "mm_resampler_width": 32, "num_frames": 3, "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": "true",
        "disable_tqdm": "true", "mm_vision_select_layer": 2, **changes,
    }  # fmt: skip
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def history(output: Path) -> list[dict[str, float]]:
    return [
        entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in history(output)]


@pytest.fixture(scope="module")
def run(gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Trains a tiny model; the flags may be changed."""

    def train(**changes) -> Path:
        output = tmp_path_factory.mktemp("run")
        data = changes.pop("data_path", mixed_data)
        main(flags(gpt2_dir, changes.pop("tower", tower_dir), data, output, **changes))
        return output

    return train


@pytest.fixture(scope="module")
def live(run) -> Path:
    return run()


@pytest.fixture(scope="module")
def filled(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that filled a cache, and the cache."""
    cache = tmp_path_factory.mktemp("cache") / "features"
    return run(feature_cache=cache, feature_cache_fill=True), cache


def test_cached_losses_and_weights_are_the_live_ones(run, live: Path, filled, capsys) -> None:
    first, cache = filled
    assert losses(first) == losses(live)
    capsys.readouterr()
    again = run(feature_cache=cache, feature_cache_strict=True)
    assert losses(again) == losses(live)
    expected, found = (load_file(folder / "model.safetensors") for folder in (live, again))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (live, again)]
    assert configs[0]["mm_vision_tower_hash"] == configs[1]["mm_vision_tower_hash"]
    assert configs[0] == configs[1]
    printed = capsys.readouterr().out
    assert "0 were run through the tower; its weights were not read" in printed
    assert history(again)[-1]["feature_misses"] == 0
    assert history(again)[-1]["feature_hits"] > 0


def test_hits_and_misses_are_counted_with_workers(run, filled, live: Path) -> None:
    output = run(feature_cache=filled[1], dataloader_num_workers=2, num_train_epochs=2, max_steps=-1,
                 dataloader_persistent_workers=False)  # fmt: skip
    # Six media of seven samples, twice; in two epochs of two steps.
    assert [(e["feature_hits"], e["feature_misses"]) for e in history(output)][-1] == (12, 0)


@pytest.mark.parametrize("changes", [{"num_frames": 2}, {"mm_vision_select_layer": 1}, {"image_aspect_ratio": "pad"}])
def test_other_settings_are_a_miss(run, filled, changes: dict[str, object], caplog) -> None:
    with caplog.at_level("INFO"):
        output = run(feature_cache=filled[1], max_steps=1, **changes)
    kinds = history(output)[-1]
    assert kinds["feature_misses"] > 0
    if "num_frames" not in changes:  # Images do not depend on it.
        assert kinds["feature_hits"] == 0
        assert "others differ in" in caplog.text


def test_another_tower_is_a_miss(run, filled, tower_dir: Path, tmp_path: Path) -> None:
    tower = shutil.copytree(tower_dir, tmp_path / "tower")
    moved = run(feature_cache=filled[1], tower=tower, max_steps=1)
    assert history(moved)[-1]["feature_misses"] == 0, "where a tower lies does not count"
    weights = load_file(tower / "model.safetensors")
    name = next(name for name in weights if "layer.0" in name and name.endswith("fc1.bias"))
    weights[name].view(torch.uint8)[0] ^= 1
    save_file(weights, tower / "model.safetensors")
    changed = run(feature_cache=filled[1], tower=tower, max_steps=1)
    assert history(changed)[-1]["feature_hits"] == 0


def test_strict_names_the_file(run, filled) -> None:
    with pytest.raises(ValueError, match=r"\.mp4: --feature_cache .* has no features of it"):
        run(feature_cache=filled[1], feature_cache_strict=True, num_frames=2, on_bad_sample="skip")


def test_a_resumed_run_goes_on_the_same(run, gpt2_dir, tower_dir, mixed_data, tmp_path: Path) -> None:
    cache = tmp_path / "features"
    options = {
        "feature_cache": cache, "feature_cache_fill": True, "feature_cache_storage": "int8", "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    whole = run(**options)
    shutil.rmtree(cache)
    part = tmp_path / "part"
    command = flags(gpt2_dir, tower_dir, mixed_data, part, **options)
    main(command)
    for step in (3, 4):
        shutil.rmtree(part / f"checkpoint-{step}")
    shutil.rmtree(cache)  # Whatever was computed or kept before: the features are the same.
    for name in ("run_identity.json", "model.safetensors", "trainer_state.json"):
        (part / name).unlink()
    main([*command, "--resume_from_checkpoint", str(part / "checkpoint-2")])
    assert losses(part) == losses(whole)
    live = flags(gpt2_dir, tower_dir, mixed_data, part, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="what --feature_cache makes of features was int8"):
        main([*live, "--resume_from_checkpoint", str(part / "checkpoint-2")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, "trains it"),
        ({"feature_cache": None, "feature_cache_strict": True}, "without --feature_cache"),
        ({"feature_cache_fill": True, "feature_cache_strict": True}, "leave one out"),
        ({"feature_cache": "nowhere"}, "is no feature cache"),
        ({"feature_cache_storage": "int4", "feature_cache_fill": True}, "known: fp32, bf16, int8"),
        ({"feature_cache_storage": "int8", "feature_cache_fill": True}, "keeps features as fp32, not as int8"),
    ],
)
def test_flags_that_do_not_fit(run, filled, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"feature_cache": filled[1]} | changes)


def test_a_checkpoint_with_its_tower_reads_the_weights(run, filled, capsys) -> None:
    output = run(feature_cache=filled[1], save_vision_tower=True, max_steps=1)
    assert "its weights were read" in capsys.readouterr().out
    assert history(output)[-1]["feature_misses"] == 0
    assert any("vision_tower" in name for name in load_file(output / "model.safetensors"))


def test_a_step_with_features_is_replayed(run, filled, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="bad_step-") as stopped:
        run(feature_cache=filled[1], feature_cache_strict=True, learning_rate=1e25)
    folder = next(Path(word.rstrip(".,;:")) for word in str(stopped.value).split() if "/bad_step-" in word)
    capsys.readouterr()
    assert replay([str(folder)]) == 0
    assert "reproduced" in capsys.readouterr().out


def test_captions_and_evaluations_read_it(
    run, filled, live: Path, mixed_data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model_path", str(live), "--feature_cache", str(filled[1]), "--feature_cache_strict"]
    captions = []
    for words in (options[:2], options):
        assert serve([*words, "--video", str(mixed_data.parent / "a.mp4")]) == 0
        captions.append(capsys.readouterr().out)
        with monkeypatch.context() as patched:
            if len(captions) == 2:
                patched.setattr("llava.data.media.decode_media", None)  # Nothing is decoded for answers.
            out = ["--out", str(tmp_path / f"out-{len(captions)}"), "--num_pictures", "0", "--no_blind_check"]
            arguments = parse_arguments(["--task", "caption", "--data", str(mixed_data), *words, *out])
            captions[-1] += json.dumps(evaluate(arguments)["scores"])
    assert captions[0] == captions[1]
    words = ["--model_name_or_path", str(live), "--data_path", str(mixed_data), "--eval_data_path", str(mixed_data)]
    words += ["--output_dir", str(tmp_path / "e"), "--do_train", "false", "--use_cpu", "true", "--report_to", "none"]
    main([*words, *options[2:]])
    assert "6 images and clips had their features in it, 0 were" in capsys.readouterr().out
    assert serve([*options, "--image", str(shutil.copy(mixed_data.parent / "a.png", tmp_path / "moved.png"))]) == 0
    (tmp_path / "moved.png").write_bytes((mixed_data.parent / "a.png").read_bytes() + b"0")
    assert serve([*options, "--image", str(tmp_path / "moved.png")]) == 2
    assert "moved.png: --feature_cache" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_epochs_fill_once_and_a_tower_that_is_read_late_is_the_same(run, tmp_path: Path, precision: str) -> None:
    cache = tmp_path / "features"
    # With dropout: a tower that is read later draws no random number of the run's.
    options = {"num_train_epochs": 2, "max_steps": -1, "bf16": precision == "bf16", "lora_enable": True}
    filled = run(feature_cache=cache, feature_cache_fill=True, **options)
    assert json.loads((cache / "cache.json").read_text())["storage"] == precision
    assert (history(filled)[-1]["feature_misses"], history(filled)[-1]["feature_hits"]) == (6, 6)
    # A tower that checkpoints are to hold is that of its source, in whatever precision it is held.
    again = run(feature_cache=cache, feature_cache_strict=True, save_vision_tower=True, **options)
    # The tower's hash is known, and none of its features: it is read in the midst of the first step.
    for shard in cache.glob("*.safetensors"):
        shard.unlink()
    late = run(feature_cache=cache, **options)
    assert history(late)[-1]["feature_hits"] == 0
    live = losses(run(**options))
    assert losses(late) == live
    # In bf16, products of matrices as small as these depend on how many rows they have, and so on the batch.
    assert [losses(again), losses(filled)] == [pytest.approx(live, abs=0 if precision == "fp32" else 1e-3)] * 2


def test_two_ranks_fill_a_cache_and_read_it(
    gpt2_dir, tower_dir, mixed_data, live: Path, tmp_path: Path, warm_python: str
) -> None:
    cache, program = tmp_path / "features", tmp_path / "program.py"
    program.write_text(
        "import json, sys\nfrom llava.train.train import main\nfor words in json.loads(sys.argv[1]): main(words)"
    )
    runs = {"filled": {"feature_cache_fill": True}, "read": {"feature_cache_strict": True}}
    words = [
        flags(
            gpt2_dir, tower_dir, mixed_data, tmp_path / name, feature_cache=cache, per_device_train_batch_size=2, **more
        )
        for name, more in runs.items()
    ]
    launcher = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": warm_python}
    subprocess.run([*launcher, str(program), json.dumps(words)], env=environment, check=True, timeout=300)
    assert losses(tmp_path / "filled") == losses(tmp_path / "read") == pytest.approx(losses(live), abs=1e-5)
    # Of both ranks together: six media of seven samples, in two epochs of two steps.
    counts = [[history(tmp_path / name)[-1][f"feature_{kind}"] for kind in ("hits", "misses")] for name in runs]
    assert (sum(counts[0]), counts[1]) == (12, [12, 0])  # A rank may ask for what the other is about to write.
    line = json.loads((tmp_path / "read" / "trainer_state.json").read_text())["log_history"][-1]
    samples = line["train_samples_per_second"] / line["train_steps_per_second"] * 4
    assert samples == pytest.approx(14, rel=1e-2)


def test_a_cache_that_cannot_be_written_ends_the_filling_alone(run, live: Path, tmp_path: Path, caplog) -> None:
    def take_away(self, *args, **kwargs) -> None:
        shutil.rmtree(self.features.cache.folder, ignore_errors=True)
        self.features.cache.folder.touch()
        flush(self)

    flush = FeatureLog.flush
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureLog, "flush", take_away)
        output = run(feature_cache=tmp_path / "features", feature_cache_fill=True, max_steps=2)
    assert losses(output)[0] == losses(live)[0]
    assert "training goes on, and adds nothing more to it" in caplog.text
