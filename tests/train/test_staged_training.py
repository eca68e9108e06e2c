"""``--stage_media`` in training: the same run, whose media are read from their copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.data import dataset
from llava.train.train import main
from llava.types import Media, VisualInput


def words(model: Path, tower: Path, data: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "model_name_or_path": model, "vision_tower": tower, "data_path": data, "output_dir": output,
        "mm_resampler_type": "spatial_pool", "mm_perceiver_latents": 9, "num_frames": 2, "max_steps": 2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "save_steps": 1, "use_cpu": "true",
        "disable_tqdm": "true", **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_a_run_goes_on_with_copies_and_is_the_same_run(
    gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, output, local = tmp_path / "plain", tmp_path / "out", tmp_path / "local"
    main(words(gpt2_dir, tower_dir, mixed_data, plain))
    shutil.copytree(plain / "checkpoint-1", output / "checkpoint-1")
    loaded: list[str] = []

    def note(media: Media, *settings: object) -> VisualInput:
        loaded.append(media.path)
        return load_media(media, *settings)

    load_media = dataset.load_media
    monkeypatch.setattr(dataset, "load_media", note)
    main(words(gpt2_dir, tower_dir, mixed_data, output, stage_media=local, resume_from_checkpoint="auto"))
    assert loaded
    # Those of the report before the first step are read where they lie, all of the steps from their copies.
    assert all(path.startswith(str(local)) for path in loaded[-2:])
    fixed = [json.loads((folder / "run_identity.json").read_text())["fixed"] for folder in (plain, output)]
    assert fixed[0] == fixed[1]
    assert (plain / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    shown = [(folder / "exposure.jsonl").read_text().splitlines()[-1] for folder in (plain, output)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_cache": "features", "feature_cache_fill": "true"}, "--stage_media: with --feature_cache images and"),
        ({"stage_timeout": 0}, "--stage_timeout is 0.0; it is a number of seconds above 0"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        main(words(tmp_path, tmp_path, tmp_path, tmp_path / "out", stage_media=tmp_path / "local", **changes))
