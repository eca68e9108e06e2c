"""``python -m llava.train.train``: from a command line to a trained checkpoint."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import set_seed

from llava.config import VisionConfig
from llava.data.dataset import make_supervised_data_module
from llava.data.placeholders import preprocess_multimodal
from llava.data.preprocess import Format, build_format
from llava.data.preprocess.plain import preprocess_plain_lm
from llava.messages import FAILED, explain_error, is_out_of_memory
from llava.model.adapter import load_adapter
from llava.model.checkpoint import read_config
from llava.model.loading import LoadedModel, load_model
from llava.parser import check_output_folder
from llava.train.agreement import AgreedError, decide_once, is_first_rank, leave_process_group
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.checkpoint import choose_checkpoint, clear_leftovers
from llava.train.command_line import parse_arguments
from llava.train.lora import lora_loading, set_up_adapters
from llava.train.ownership import check_pickles_are_ours, plain_tensors_only
from llava.train.parts import parts_table, set_trainable_parts
from llava.train.preemption import PREEMPTED, Preempted
from llava.train.report import budget_table, supervision_table
from llava.train.trainer import LlavaTrainer
from llava.train.zero3 import loading_whole

__all__ = [
    "DataArguments",
    "ModelArguments",
    "TrainingArguments",
    "build_trainer",
    "main",
    "make_supervised_data_module",
    "preprocess_multimodal",
    "preprocess_plain_lm",
    "train",
]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> LlavaTrainer:
    """Train as the command line says and leave a complete checkpoint in ``--output_dir``.

    Args:
        argv: words of a command line; by default this process's.

    Returns:
        The trainer, with the trained model and the log of its losses.

    Raises:
        ValueError: a flag, a file or a sample is wrong; the message names it and the remedy.
        Preempted: the run was asked to stop, and has saved a checkpoint to go on from.
    """
    trainer = build_trainer(argv)
    train(trainer)
    return trainer


def train(trainer: LlavaTrainer) -> None:
    """Train, from the checkpoint that ``--resume_from_checkpoint`` asks for, and save what came out."""
    checkpoint = find_checkpoint(trainer.args)
    if checkpoint is not None:
        check_pickles_are_ours(checkpoint)
    with trainer.stop_request, plain_tensors_only(checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.preempted:
            raise Preempted(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, as a signal asked; go "
                "on with --resume_from_checkpoint auto"
            )
        trainer.save_state()
        trainer.save_model()
    # Also where a program of one's own calls this: see leave_process_group.
    atexit.register(leave_process_group)


def build_trainer(argv: Sequence[str] | None = None, **loading: Any) -> LlavaTrainer:
    """All of ``main`` before the first step: model, data and reports, in a trainer that is ready to go.

    Args:
        argv: words of a command line; by default this process's.
        **loading: what ``load_model`` takes and no flag says, such as ``variant``.
    """
    model_args, data_args, training_args = parse_arguments(argv)
    check_devices(training_args)
    check_output_folder(str(training_args.output_dir), "--output_dir")
    set_seed(training_args.seed)

    loading |= lora_loading(model_args.model_name_or_path, training_args)
    with loading_whole(training_args):
        loaded = load_from_arguments(model_args, data_args, training_args.attn_implementation, **loading)
        model, tokenizer, vision = loaded.model, loaded.tokenizer, loaded.vision
        if model_args.pretrain_mm_mlp_adapter:
            load_adapter(model, model_args.pretrain_mm_mlp_adapter)
        if training_args.lora_enable:
            set_up_adapters(loaded, loading["model_name_or_path"], model_args.tunable_parts, training_args)
    set_trainable_parts(model, model_args.tunable_parts, model_args.freeze_embeddings)
    lower_frozen_precision(model, training_args)
    balance_experts(model, training_args.router_aux_loss_coef)

    max_length = choose_max_length(training_args.model_max_length, model, vision)
    text_format = choose_format(data_args.format_name, tokenizer, model.config)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    data = make_supervised_data_module(tokenizer, data_args, vision, max_length, text_format, seed, model.grounding)
    if training_args.process_index == 0:
        if loaded.transfer is not None:
            print(loaded.transfer)
        print(parts_table(model, training_args.part_learning_rates()))
        print(budget_table(vision, max_length, model.config.max_position_embeddings))
        print(supervision_table(data["train_dataset"]), flush=True)

    ledger = data_args.build_ledger(training_args.output_dir)
    return LlavaTrainer(model=model, args=training_args, processing_class=tokenizer, ledger=ledger, **data)


def load_from_arguments(
    model_args: ModelArguments, data_args: DataArguments, attn_implementation: str | None = None, **loading: Any
) -> LoadedModel:
    """The model that the arguments describe; ``loading`` is as for ``build_trainer``."""
    path = loading.pop("model_name_or_path", model_args.model_name_or_path)
    return load_model(
        path,
        grounding=model_args.choose_grounding(read_config(path).get("grounding")),
        num_temporal_tokens=model_args.num_temporal_tokens,
        num_spatial_tokens=model_args.num_spatial_tokens,
        vision_tower=model_args.vision_tower,
        save_vision_tower=model_args.save_vision_tower,
        attn_implementation=attn_implementation,
        **model_args.vision_settings(),
        **data_args.vision_settings(),
        **loading,
    )


def check_devices(training_args: TrainingArguments) -> None:
    """A ValueError where one process would drive several GPUs: batches of media cannot be scattered."""
    if training_args.n_gpu > 1:
        raise ValueError(
            f"one process sees {training_args.n_gpu} GPUs; start one for each with "
            f"torchrun --nproc_per_node {training_args.n_gpu} -m llava.train.train ..., or set CUDA_VISIBLE_DEVICES=0"
        )


def lower_frozen_precision(model: Any, training_args: TrainingArguments) -> None:
    """Hold a frozen tower in the precision it runs in: nothing updates it, so nothing needs more.

    A tower whose weights join the checkpoint keeps them as they came.
    """
    tower = model.get_vision_tower()
    if tower is None or tower.trainable or model.vision.save_vision_tower:
        return
    if training_args.bf16 or training_args.fp16:
        tower.to(torch.bfloat16 if training_args.bf16 else torch.float16)


def balance_experts(model: Any, weight: float | None) -> None:
    """Let a mixture of experts train with its load balancing loss; without it, few experts take all tokens.

    Args:
        model: one without experts is left as it is.
        weight: of the loss; 0 leaves it out, None takes the checkpoint's.
    """
    own = getattr(model.config, "router_aux_loss_coef", None)
    if own is None:
        if weight is not None:
            raise ValueError(f"--router_aux_loss_coef is {weight}, but {model.config.model_type} has no experts")
        return
    model.config.router_aux_loss_coef = own if weight is None else weight
    model.config.output_router_logits = model.config.router_aux_loss_coef > 0


def choose_max_length(asked: int | None, model: Any, vision: VisionConfig | None) -> int:
    """Most tokens of a sample: what was asked for, or the model's context.

    Raises:
        ValueError: more than the context was asked for, or one video or the largest anyres image alone
            would not fit.
    """
    context = model.config.max_position_embeddings
    if asked is not None and asked > context:
        raise ValueError(f"--model_max_length is {asked}, but the model's context is {context}; lower it")
    limit = asked or context
    # Without --frames_upbound a short clip may still fit; one that does not is named when it is opened.
    frames = None if vision is None else vision.max_frames if vision.is_bounded else 1
    if vision is not None and frames and (video := vision.num_tokens("video", frames)) + 1 >= limit:
        ways = ["raise --model_max_length (within the model's context)", *vision.ways_to_shorten({"video"})]
        raise ValueError(
            f"a video of {frames} frames takes {video} tokens, but a sample may have {limit}; {' or '.join(ways)}"
        )
    if vision is not None and vision.anyres is not None and (image := vision.most_image_tokens) + 1 >= limit:
        ways = ["raise --model_max_length (within the model's context)", *vision.ways_to_shorten({"image"})]
        raise ValueError(
            f"the largest image, of {vision.anyres.most_views} views, takes {image} tokens, but a sample may have "
            f"{limit}; {' or '.join(ways)}"
        )
    return limit


def choose_format(name: str, tokenizer: Any, config: Any) -> Format:
    """The preprocessing format of that name, which the checkpoints of this run will say they were trained with."""
    before = getattr(config, "llava_format", name)
    if before != name:
        logger.warning("the checkpoint was trained with the format %s; now it is %s", before, name)
    config.llava_format = name
    return build_format(name, tokenizer)


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from, the same on all ranks: the one that was named, or with ``auto`` the last one."""

    def choose() -> str | None:
        output_dir = str(training_args.output_dir)
        clear_leftovers(output_dir)
        return choose_checkpoint(training_args.resume_from_checkpoint, output_dir)

    return decide_once(choose)


def cli(run: Callable[[], Any] = main) -> int:
    """``main`` for a shell: a mistake of the user is one line and status 2, not a traceback.

    Args:
        run: what to do; an int that it returns is the exit status.

    Returns:
        The exit status: 0, 2 after an error, 85 if the run was asked to stop and can be resumed.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    try:
        status = run()
    except Preempted as stopped:
        status = PREEMPTED
        if is_first_rank():
            print(stopped, file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        status = FAILED
        agreed = isinstance(error, AgreedError)
        if is_first_rank() or not agreed:
            print(f"error: {explain_error(error)}", file=sys.stderr)
        if not agreed:  # The other ranks may wait for this one: leave without them.
            return status
    leave_process_group()
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(cli())
