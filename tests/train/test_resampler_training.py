"""Every resampler, and projectors beside them, through the command line: a few steps, and the checkpoint in use."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llava.model.loading import load_model
from llava.model.multimodal_resampler import RESAMPLERS
from llava.train.command_line import parse_arguments
from llava.train.train import main

PROJECTORS = {
    "fast_slow_resampler": "pooler", "perceiver": "mlp1x_res1x_gelu", "qformer": "linear", "spatial_pool": "identity",
}  # fmt: skip
SIZES = {
    "mm_perceiver_latents": 4, "mm_perceiver_latents_fast": 1, "mm_perceiver_depth": 1, "mm_qformer_latents": 5,
    "mm_qformer_depth": 1, "mm_resampler_width": 16, "mm_resampler_heads": 2, "mm_spatial_pool_stride": 3,
    "mm_spatial_pool_mode": "max", "mm_mask_drop_mode": "fixed", "mm_mask_drop_ratio": 0.5,
}  # fmt: skip


def words(**flags: object) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def run_flags(gpt2_dir: Path, tower_dir: Path, mixed_data: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "model_name_or_path": gpt2_dir, "vision_tower": tower_dir, "data_path": mixed_data, "num_frames": 3,
        "output_dir": tmp_path / "out", "use_cpu": "true", "report_to": "none", "disable_tqdm": "true",
        "save_strategy": "no", "max_steps": 6, "learning_rate": 3e-3, "logging_steps": 1,
        "per_device_train_batch_size": 7, **SIZES,
    }  # fmt: skip


@pytest.mark.parametrize("name", RESAMPLERS.names())
def test_a_few_steps_lower_the_loss(run_flags: dict[str, object], name: str) -> None:
    output = Path(str(run_flags["output_dir"]))
    projector = PROJECTORS.get(name, "mlp2x_gelu")
    trainer = main(
        words(**run_flags, mm_resampler_type=name, mm_projector_type=projector, gradient_checkpointing="true")
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    vision = load_model(str(output)).vision
    assert vision is not None
    assert (vision.resampler_type, vision.projector_type) == (name, projector)
    settings = {flag.removeprefix("mm_"): value for flag, value in SIZES.items() if flag != "mm_mask_drop_mode"}
    assert {setting: getattr(vision, setting) for setting in settings} == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_resampler_type": "perceiver"}, r"takes 12 tokens.* may have 13; .* or lower --mm_perceiver_latents$"),
        ({"mm_resampler_type": "qformer"}, r"takes 15 tokens.* may have 13; .* or lower --mm_qformer_latents$"),
        (
            {"mm_resampler_type": "spatial_pool"},
            r"takes 12 tokens.* context\) or lower --num_frames or raise --mm_spatial_pool_stride$",
        ),
        ({"mm_resampler_type": "masked_drop"}, r"takes 24 tokens.* or lower --mm_mask_drop_ratio$"),
        ({}, r"takes 48 tokens.* may have 13; raise --model_max_length .* or lower --num_frames$"),
        ({"mm_resampler_type": "other"}, "unknown --mm_resampler_type 'other'; known: .*, spatial_pool, none"),
        ({"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "conv"}, "--mm_spatial_pool_mode is 'conv'"),
        ({"mm_mask_drop_mode": "range"}, "--mm_mask_drop_mode is 'range', but only fixed exists"),
    ],
)
def test_mistakes_end_the_run_before_training(run_flags: dict[str, object], changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(words(**{**run_flags, "model_max_length": 13, **changes}))


def test_flags_that_are_not_given_leave_the_checkpoints_settings_be() -> None:
    model_args, _, _ = parse_arguments(
        words(model_name_or_path="m", data_path="d", output_dir="o", use_cpu="true", mm_qformer_depth=4)
    )
    given = {name: value for name, value in model_args.vision_settings().items() if value is not None}
    assert given == {"qformer_depth": 4}


def test_text_beside_media_trains_with_a_resampler_without_parameters(run_flags: dict[str, object]) -> None:
    """The projector is all there is of the vision modules, and nothing at all with the identity."""
    flags = {**run_flags, "max_steps": 2, "mm_resampler_type": "masked_drop", "mm_projector_type": "identity"}
    trainer = main(words(**flags))
    decoder = trainer.model.get_model()
    assert not [*decoder.mm_projector.parameters(), *decoder.vision_resampler.parameters()]
    with pytest.raises(ValueError, match="--mm_tunable_parts mm_vision_resampler trains nothing"):
        main(words(**flags, mm_tunable_parts="mm_vision_resampler", overwrite_output_dir="true"))


def test_a_trained_resampler_cannot_be_switched_off(run_flags: dict[str, object], tmp_path: Path) -> None:
    """``none`` is a choice like the others, and not a flag that was left out."""
    main(words(**{**run_flags, "max_steps": 1, "mm_resampler_type": "perceiver"}))
    again = {**run_flags, "model_name_or_path": run_flags["output_dir"], "output_dir": tmp_path / "again"}
    with pytest.raises(ValueError, match=r"--mm_resampler_type 'none' was given, but .* trained with 'perceiver'"):
        main(words(**again, mm_resampler_type="none"))


def test_none_is_no_resampler(run_flags: dict[str, object]) -> None:
    trainer = main(words(**{**run_flags, "max_steps": 1, "mm_resampler_type": "none"}))
    assert trainer.model.vision.resampler_type is None
    assert trainer.checkpoints.identity.fixed["mm_resampler_type"] is None
