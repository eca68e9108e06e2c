"""What earlier releases have stored is read; what a newer one has stored is refused in one line.

``stored_forms`` holds an archive for each form that a release has written: tiny checkpoints of two ranks and of LoRA
adapters, what they were trained on, features, and the losses that the runs then went on to. It was written by

    PYTHONPATH=. python tests/train/test_stored_forms.py tests/train/stored_forms/form-1.tar.xz

A release that gives a form of ``llava.stored_forms`` a new version adds an archive of its own, and the tests go through
all of them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":  # As the writer of an archive: pytest puts both on the path otherwise.
    sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "faults")]
else:
    sys.path.append(str(Path(__file__).parents[1] / "faults"))
from runs import ForkServer

from llava.constants import RELEASE
from llava.data.cache import DamagedFileError, append_footer, read_footer
from llava.data.feature_cache.cache import FeatureCache, FeatureCacheError
from llava.model.loading import load_model
from llava.stored_forms import MODEL, TRAINING_STATE, StoredForm
from llava.train.checkpoint import choose_checkpoint
from llava.train.identity import RunIdentity
from llava.train.train import main

ARCHIVES = sorted(Path(__file__).with_name("stored_forms").glob("*.tar.xz"))
MOST_BYTES = 50_000
RUNS = {"ddp": 2, "lora": 1}
"""Runs of an archive, with their ranks."""
RESAMPLERS = {"ddp": "fast_slow_resampler", "lora": "spatial_pool"}
PARTS: dict[str, dict[str, object]] = {
    "ddp": {
        "mm_resampler_type": RESAMPLERS["ddp"], "mm_perceiver_latents": 4, "mm_perceiver_latents_fast": 1,
        "mm_resampler_width": 4, "mm_resampler_heads": 1,
    },
    "lora": {"mm_resampler_type": RESAMPLERS["lora"], "lora_enable": "true", "lora_r": 2, "lora_alpha": 4},
}  # fmt: skip


def flags(folder: Path, run: str, **changes: object) -> list[str]:
    """The command line of a run whose files lie in a folder."""
    values = {
        "model_name_or_path": folder / "base", "vision_tower": folder / "tower", "data_path": folder / "data.json",
        "output_dir": folder / run, "data_cache_dir": folder / "index", "max_steps": 4, "save_steps": 2,
        "logging_steps": 1, "per_device_train_batch_size": 2 // RUNS[run],
        "learning_rate": 1e-2, "report_to": "none", "run_report": "false", "use_cpu": "true", "disable_tqdm": "true",
        **PARTS[run], **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def read_losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an archive."""
    assert request.param.stat().st_size < MOST_BYTES
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_checkpoint_of_two_ranks_goes_on(stored: Path, server: ForkServer) -> None:
    line = flags(stored, "ddp", resume_from_checkpoint="auto")
    assert server.run_ranks(line, stored / "again") == 0, (stored / "again" / "said").read_text()
    said = (stored / "again" / "said").read_text()
    for warning in ("does not have the losses since", "is not the same bit for bit"):
        assert warning not in said
    expected = json.loads((stored / "losses.json").read_text())["ddp"]
    assert read_losses(stored / "ddp") == pytest.approx(expected, abs=2e-4)


def test_adapters_are_trained_on(stored: Path) -> None:
    main(flags(stored, "lora", lora_weight_path=stored / "lora" / "checkpoint-2", output_dir=stored / "more"))
    expected = json.loads((stored / "losses.json").read_text())["lora"]
    assert read_losses(stored / "more") == pytest.approx(expected, abs=2e-4)


def test_models_are_loaded(stored: Path) -> None:
    for run in RUNS:
        loaded = load_model(
            str(stored / run / "checkpoint-2"), model_base=str(stored / "base") if run == "lora" else None,
            vision_tower=str(stored / "tower"),
        )  # fmt: skip
        assert loaded.vision is not None
        assert loaded.vision.resampler_type == RESAMPLERS[run]


def test_features_are_read(stored: Path) -> None:
    cache = FeatureCache(stored / "features")
    expected = json.loads((stored / "losses.json").read_text())["features"]
    assert len(cache) == len(expected) > 0
    for key, total in expected.items():
        found = cache.read(key)
        assert found is not None
        assert found[1].double().sum().item() == pytest.approx(total)


# Newer ones are refused, in one line with the file, its version, this release's and what to do.


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that holds what ``checkpoint_forms`` looks at."""
    folder = tmp_path / "out" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL.stamp))
    for name in ("run_identity.json", "data_state.json", "exposure.json"):
        (folder / name).write_text(json.dumps(TRAINING_STATE.stamp))
    return folder


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("config.json", "llava_model_version"), ("run_identity.json", "form_version"),
        ("data_state.json", "form_version"), ("exposure.json", "form_version"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", ["auto", "the folder"])
def test_a_newer_checkpoint_is_refused_and_not_skipped(checkpoint: Path, name: str, entry: str, asked: str) -> None:
    change(checkpoint / name, **{entry: 2})
    said = (
        re.escape(f"{checkpoint / name}: a newer release of llava wrote this") + r".*version 2.*reads up to 1\): upgra"
    )
    with pytest.raises(ValueError, match=said) as caught:
        choose_checkpoint("auto" if asked == "auto" else str(checkpoint), checkpoint.parent)
    assert "\n" not in str(caught.value)


def test_a_run_that_a_newer_release_has_finished_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "run_identity.json", form_version=2)
    with pytest.raises(ValueError, match="a newer release of llava wrote this checkpoint"):
        RunIdentity.read(checkpoint)


@pytest.mark.parametrize("version", [0, -1, True, 1.5, "1", None])
def test_a_version_that_is_none_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 1 on"):
        MODEL.check({"llava_model_version": version}, "config.json")


def test_an_older_form_is_read_as_long_as_it_is_known() -> None:
    form = StoredForm("model", "version", 3, 2, "take another model")
    form.check({"version": 2}, "config.json")
    form.check({"version": 3}, "config.json")
    with pytest.raises(
        ValueError, match=r"config.json: an older release .*version 1 of its form; llava .* reads 2 to 3"
    ):
        form.check({}, "config.json")


def test_errors_name_this_release() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{RELEASE}"\n' in project


def test_a_newer_model_is_refused(gpt2_dir: Path, load_tiny, tmp_path: Path) -> None:
    loaded = load_tiny()
    loaded.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["llava_model_version"] == MODEL.version
    change(tmp_path / "config.json", llava_model_version=7)
    said = r"config.json: a newer release of llava wrote this model \(version 7 .* up to 1\): upgrade llava"
    with pytest.raises(ValueError, match=said):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="a newer release of llava wrote this model"):
        type(loaded.model).from_pretrained(tmp_path)


def test_newer_features_are_refused_and_not_called_damaged(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "features", tmp_path / "features")
    shard = next((tmp_path / "features").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes().replace(b"llava-features-1", b"llava-features-2"))
    with pytest.raises(
        FeatureCacheError, match=r"a newer release of llava wrote it .*-2.*reads llava-features-1\); upgr"
    ):
        FeatureCache(tmp_path / "features")
    change(tmp_path / "features" / "cache.json", version=2)
    with pytest.raises(ValueError, match=r"cache.json: a newer release of llava wrote this feature cache \(version 2"):
        FeatureCache(tmp_path / "features")


def test_an_index_of_another_form_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(b"records")
    append_footer(tmp_path / "index", {"version": 9, "origin": {}})
    with pytest.raises(DamagedFileError, match=r"another version of llava wrote it \(form 9, here 4\)"):
        read_footer(tmp_path / "index", 4, {})


# The writer of an archive.


def write_inputs(folder: Path) -> None:
    """A language model, a tower, pictures and texts, all tiny."""
    import numpy as np
    import torch
    from conftest import make_tower
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "un", "gatto", "dorme", "cane", "guarda", "la", "strada", "casa", "rossa"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="<end>", bos_token="<end>")
    fast.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_embd=4, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    make_tower(folder / "tower", side=8, patch=4, width=8, layers=2)
    rng, samples = np.random.default_rng(0), []
    for i in range(6):
        text = " ".join(rng.choice(words[2:], 6))
        sample = {"id": str(i), "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": text}]}
        if i % 2:
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            sample |= {"image": f"{i}.png"}
            sample["conversations"][0]["value"] = "<image>"
        samples.append(sample)
    (folder / "data.json").write_text(json.dumps(samples))


def write_archive(path: Path) -> None:
    expected: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder)
        server = ForkServer()
        try:
            assert server.run_ranks(flags(folder, "ddp"), folder / "record") == 0, (folder / "record/said").read_text()
        finally:
            server.close()
        main(flags(folder, "lora", feature_cache=folder / "features", feature_cache_fill="true"))
        cache = FeatureCache(folder / "features")
        keys = [key for shard in cache.shards.values() for key in shard.keys]
        expected["features"] = {key: cache.read(key)[1].double().sum().item() for key in keys}  # type: ignore[index]
        more = folder / "more"
        main(flags(folder, "lora", lora_weight_path=folder / "lora" / "checkpoint-2", output_dir=more))
        expected |= {"ddp": read_losses(folder / "ddp"), "lora": read_losses(more)}
        (folder / "losses.json").write_text(json.dumps(expected))
        kept = ["base", "tower", "data.json", *(p.name for p in folder.glob("*.png")), "features", "losses.json"]
        with tarfile.open(path, "w:xz", preset=9) as archive:
            for name in [*kept, *(f"{run}/checkpoint-2" for run in RUNS)]:
                archive.add(folder / name, name, filter=strip)


def strip(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Nothing of the machine, and nothing that no test reads: of the adapters no optimizer, for example."""
    path = Path(entry.name)
    if path.name in ("README.md", "digests", "towers"):
        return None
    of_adapters = ("adapter_", "non_lora_", "config", "generation_config", "tokenizer")
    if path.parts[0] == "lora" and len(path.parts) == 3 and not path.name.startswith(of_adapters):
        return None
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    write_archive(Path(sys.argv[1]))
