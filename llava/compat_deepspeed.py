"""Every touch of what DeepSpeed keeps to itself, with the reason. The tests ran with DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def forgiving_engine(trainer: Trainer, failure: AbstractContextManager[object]) -> Iterator[None]:
    """Let ``failure`` keep the errors of DeepSpeed's files, which its engine writes between meetings of its own."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    engine: Any = trainer.model_wrapped
    writer = engine.checkpoint_engine
    save = writer.save

    def save_forgiving(state_dict: object, path: str) -> None:  # By these names its engine calls it.
        with failure:
            save(state_dict, path)
            return
        Path(path).unlink(missing_ok=True)  # Room for the small files that follow.

    writer.save = save_forgiving
    try:
        yield
    finally:
        # An attribute of the object; the method of its class is there again.
        del writer.save


def gather_and_keep(parameters: Sequence[Any], modules: Iterable[Any]) -> None:
    """Let all ranks of ZeRO-3 gather parameters at once, and keep them whole until the optimizer's step.

    DeepSpeed gathers what a module needs when it runs, which must be in the same order on every rank, and a rank
    without media does not run the vision modules at all. ``ds_status`` marks a parameter that is shared out,
    ``ds_persist`` one that stays whole from its first use to the optimizer's step.

    Args:
        parameters: those not shared out are left alone.
        modules: that hold them, whose own hooks of DeepSpeed are removed.
    """
    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_status")]
    if not shared:
        return
    if not all(parameter.ds_persist for parameter in shared):
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.")]:
                    del hooks[key]
        for parameter in shared:
            parameter.ds_persist = True
    # Does nothing for those that are whole; which ones these are is the same on every rank.
    shared[0].all_gather(param_list=shared)


# Checkpoints: what an engine reads, put in place of its files.


def load_engines_by(load: Callable[[Any, str, Callable[[], None]], None]) -> None:
    """Let transformers' trainer load DeepSpeed's checkpoints by a function of ours.

    It calls a function of its module between making the engine and anything that a trainer could override.

    Args:
        load: takes the engine, the folder of the checkpoint, and what loads it as transformers does.
    """
    from transformers import trainer
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    def load_checkpoint(engine: Any, folder: str, load_module_strict: bool = True) -> None:  # By these names.
        load(engine, folder, lambda: deepspeed_load_checkpoint(engine, folder, load_module_strict))

    trainer.deepspeed_load_checkpoint = load_checkpoint  # type: ignore[attr-defined]


def describe_engine(engine: Any) -> tuple[list[dict[str, int]], list[int]]:
    """How an engine of ZeRO shares out: each group's parameters and their numbers, and the size of a share of it.

    Those that train, in the order in which they lie one behind the other in a group.
    """
    groups = [{name: shape.numel() for name, shape in group.items()} for group in engine._get_zero_param_shapes()]
    optimizer = engine.optimizer
    is_stage3 = int(engine.zero_optimization_stage()) == 3
    shares = optimizer.fp32_partitioned_groups_flat if is_stage3 else optimizer.single_partition_of_fp32_groups
    return groups, [share.numel() for share in shares]


def read_engine_file(engine: Any, path: Path) -> dict[str, Any]:
    """One of the files of an engine's checkpoint, as the engine itself reads it."""
    return engine.checkpoint_engine.load(str(path), map_location="cpu")


@contextmanager
def serving_files(engine: Any, model_file: Path, files: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Let an engine read these in place of files.

    Args:
        engine: about to load a checkpoint.
        model_file: of the first rank. That of this one need not be there, and DeepSpeed looks for what it asks for.
        files: what it is given, by the names of the files that it asks for.
    """
    reader = engine.checkpoint_engine
    load = reader.load

    def serve(path: str, map_location: Any = None) -> Any:  # By these names its engine calls it.
        found = files.get(Path(path).name)
        return load(path, map_location=map_location) if found is None else found

    reader.load = serve
    engine._get_all_ckpt_names = lambda *words: [str(model_file)]
    try:
        yield
    finally:
        # Attributes of the objects; the methods of their classes are there again.
        del reader.load, engine._get_all_ckpt_names
