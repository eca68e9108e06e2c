"""``python -m llava.train.train``: from a command line to a trained checkpoint.

The way of a sample, from its line of JSON to the loss::

    build_trainer
      parse_arguments                   train/command_line.py   flags and a recipe -> the groups of train/arguments.py
      load_from_arguments               model/loading.py        -> model, tokenizer, VisionConfig
      set_up_parts                      train/parts.py          adapters, and what learns
      make_supervised_data_module       data/module.py          -> datasets and collator
        read_records                    data/records.py         each sample a Record, checked and indexed once
      plan_scores                       train/score_plan.py     what scores the model while it trains, and when
      check_and_report                  train/report.py         what does not fit is an error before the first step
    SupervisedDataset[i]                data/dataset.py         in a worker process
      load_media                        data/media.py           -> uint8 (frames, 3, height, width)
      expand_placeholders               data/placeholders.py    <image> and <video> -> as many tokens as they take
      text_format.encode                data/formats/           -> ids and labels
    SupervisedCollator                  data/collator.py        -> Batch
    LlavaTrainer.training_step          train/trainer.py
      LlavaMetaForCausalLM.forward      model/llava_arch.py
        encode_visual, splice           model/visual.py         features take their places among the embeddings
        supervised_loss                 model/loss.py           the head runs at supervised positions alone
"""

from __future__ import annotations

import sys

from llava.train import preemption
from llava.train.command_line import answer_at_once

if __name__ == "__main__":
    preemption.listen()  # Before anything that takes its time to import.
    if (answered := answer_at_once(sys.argv[1:])) is not None:
        sys.exit(answered)

# From here on imports take seconds: torch, transformers and, through them, much else.
import atexit
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from llava.command import FAILED, INTERRUPTED, check_output_folder, errors_of_users
from llava.data.feature_cache.run import RunFeatures
from llava.data.formats import Format, build_format
from llava.data.formats.base import preprocess_plain_lm
from llava.data.media_files import check_media_folders
from llava.data.module import DataModule, make_supervised_data_module
from llava.data.placeholders import preprocess_multimodal
from llava.messages import explain_error, is_out_of_memory, print_anything
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import LoadedModel, load_model
from llava.model.lora import is_adapter_folder
from llava.model.pretrained import locate_model, read_config
from llava.model.transfer import load_adapter
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.bad_samples import BAD_SAMPLES_FILE, BadSampleLog
from llava.train.checkpoint import find_checkpoint, is_auto, reading_checkpoint
from llava.train.command_line import parse_arguments, read_variables
from llava.train.disk_errors import explaining_disk_errors
from llava.train.distributed import AgreedError, broadcast_from_rank0, is_first_rank, leave_process_group, loading_whole
from llava.train.engines import choose_kernels
from llava.train.evaluation import evaluate_last, plan_evaluation
from llava.train.feature_cache import FeatureLog, check_feature_cache, find_tower, set_up_features
from llava.train.hub import check_model, prepare_hub
from llava.train.identity import build_identity, is_finished
from llava.train.memory import ALLOCATOR_VARIABLES, keep_freed_memory, report_memory
from llava.train.model_card import CardSettings
from llava.train.parts import count_parts, set_up_parts
from llava.train.preemption import PREEMPTED, Preempted
from llava.train.report import check_and_report, report_words
from llava.train.run_folder import take_folder, taking_folder
from llava.train.run_lock import release_lock
from llava.train.run_report import add_report, reporting
from llava.train.samples import add_samples, plan_samples
from llava.train.score_plan import plan_scores
from llava.train.scoring import add_scoring
from llava.train.staging import stage_media
from llava.train.trainer import LlavaTrainer
from llava.train.watchdog import watching
from llava.types import SKIP

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
    """Train, from the checkpoint that ``--resume_from_checkpoint`` asks for, save what came out and evaluate it.

    With ``--do_train false`` only the evaluation.
    """
    if not trainer.args.do_train:
        evaluate_last(trainer)
        return
    try:
        take_folder(trainer.args)
        if not take_finished(trainer):
            with reporting(trainer), watching(trainer):
                run(trainer)
        trainer.checkpoints.send_model()
    finally:
        release_lock(str(trainer.args.output_dir))
    # Also where a program of one's own calls this: see leave_process_group.
    atexit.register(leave_process_group)


def run(trainer: LlavaTrainer) -> None:
    """The training itself, in a folder that is this run's."""
    checkpoint = find_checkpoint(trainer.args)
    # From here a signal is noted and answered with a checkpoint; just before, it ended the process at once.
    with trainer.stop_request, reading_checkpoint(checkpoint), explaining_disk_errors(trainer.args.output_dir):
        if trainer.args.device.type == "cpu" and not read_variables(ALLOCATOR_VARIABLES):
            keep_freed_memory()
        report_memory(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_request.agreed:
            raise Preempted(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, as a signal asked; go "
                "on with --resume_from_checkpoint auto"
            )
        # The model last: with it comes run_identity.json, which says that the run is finished.
        trainer.save_state()
        trainer.save_model()
    # The model is safe: a signal may end the process from here on.
    if trainer.args.do_eval:
        evaluate_last(trainer)
        trainer.save_state()
        trainer.checkpoints.write_final_card()


def build_trainer(
    argv: Sequence[str] | None = None,
    *,
    variant: str | None = None,
    weights_from: str | None = None,
    compute_metrics: Callable[..., dict[str, Any]] | None = None,
    preprocess_logits_for_metrics: Callable[..., Any] | None = None,
    callbacks: list[Any] | None = None,
) -> LlavaTrainer:
    """All of ``main`` before the first step: model, data and reports, in a trainer that is ready to go.

    Args:
        argv: words of a command line; by default this process's.
        variant, weights_from: as for ``load_model``.
        compute_metrics, preprocess_logits_for_metrics, callbacks: as for transformers' ``Trainer``; what predictions
            are, ``LlavaTrainer`` says.
    """
    print_anything()
    model_args, data_args, training_args = parse_arguments(argv)
    # Flags first, then folders, then weights and data: what is found soonest is said soonest.
    choose_kernels(training_args.deterministic)
    plan_evaluation(training_args, bool(data_args.eval_data_path), compute_metrics is not None)
    check_start(model_args, data_args, training_args)
    hub = prepare_hub(training_args) if training_args.push_to_hub and training_args.do_train else None
    sources = list_sources(model_args, training_args, weights_from)
    # The lock is held from before the model is read: two runs that start together would both find the folder empty.
    with taking_folder(training_args, sources):
        loaded = build_model(model_args, data_args, training_args, variant, weights_from)
        if hub is not None:
            check_model(loaded)
        has_cache = data_args.feature_cache is not None
        features = set_up_features(loaded, data_args, training_args) if has_cache else None
        model, tokenizer = loaded.model, loaded.tokenizer
        score_plan = plan_scores(training_args, model, tokenizer) if training_args.wants_scores else None
        data, max_length = build_data(loaded, data_args, training_args, features)
        check_and_report(loaded, data, max_length, model_args, data_args, training_args)
        stage_media(data, data_args, training_args)
        samples = None
        if training_args.sample_every is not None:
            samples = plan_samples(training_args, data_args, data, loaded, max_length, features)
        report_words(data["train_dataset"], training_args)
        trainer = LlavaTrainer(
            model=model,
            args=training_args,
            processing_class=tokenizer,
            bad_sample_log=build_bad_sample_log(data_args, training_args),
            feature_log=None if features is None else FeatureLog(features, model),
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=callbacks,
            **data,
        )
        if training_args.do_train:  # Files are read on one rank only.
            storage = None if features is None else features.inexact_storage
            run = (model, tokenizer, max_length, model_args, data_args, training_args, sources, storage)
            trainer.checkpoints.identity = broadcast_from_rank0(lambda: build_identity(*run))
            trainer.checkpoints.hub, trainer.checkpoints.card = hub, CardSettings.of(count_parts(model), training_args)
        if score_plan is not None:
            add_scoring(trainer, score_plan)
        if samples is not None:
            add_samples(trainer, samples)
        add_report(trainer, argv, (model_args, data_args, training_args))
    return trainer


def list_sources(
    model_args: ModelArguments, training_args: TrainingArguments, weights_from: str | None = None
) -> dict[str, str | None]:
    """The folders of models that a run reads, by flag."""
    return {
        "model_name_or_path": model_args.model_name_or_path,
        "lora_weight_path": training_args.lora_weight_path,
        "pretrain_mm_mlp_adapter": model_args.pretrain_mm_mlp_adapter,
        "backbone_model": weights_from,
    }


def build_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    variant: str | None = None,
    weights_from: str | None = None,
) -> LoadedModel:
    """The model of a run, ready to train; arguments and errors as for ``load_from_arguments``."""
    # New modules (projector, resampler, embeddings of new tokens) draw their first weights from it.
    set_seed(training_args.seed)
    # DeepSpeed shares weights out when its engine is made; until then every rank has whole tensors to fill.
    with loading_whole(training_args):
        loaded = load_from_arguments(model_args, data_args, training_args, variant, weights_from)
        set_up_parts(loaded, model_args, training_args)
    return loaded


def build_data(
    loaded: LoadedModel, data_args: DataArguments, training_args: TrainingArguments, features: RunFeatures | None = None
) -> tuple[DataModule, int]:
    """The data of a run as its model reads them, and the most tokens of a sample."""
    model, tokenizer = loaded.model, loaded.tokenizer
    max_length = choose_max_length(training_args.model_max_length, model)
    text_format = choose_format(data_args.format_name, tokenizer, model.config)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    data = make_supervised_data_module(
        tokenizer, data_args, loaded.vision, max_length, text_format, seed, model.grounding, features
    )
    return data, max_length


def check_start(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """See that a run can start where it is; names of models become folders.

    Raises:
        ValueError: one process would drive several GPUs, whose batches of media cannot be scattered, or a folder is
            not there or cannot be written to.
    """
    if training_args.n_gpu > 1:
        raise ValueError(
            f"one process sees {training_args.n_gpu} GPUs; start one for each with "
            f"torchrun --nproc_per_node {training_args.n_gpu} -m llava.train.train ..., or set CUDA_VISIBLE_DEVICES=0"
        )
    check_output_folder(str(training_args.output_dir), "--output_dir")
    if data_args.feature_cache is not None:
        check_feature_cache(model_args, data_args)
    check_media_folders(data_args.image_folder, data_args.video_folder)
    model_args.model_name_or_path = locate_model(model_args.model_name_or_path, "--model_name_or_path")
    if model_args.vision_tower is not None:
        model_args.vision_tower = locate_model(model_args.vision_tower, "--vision_tower")
    if not training_args.do_train:  # No training data are read.
        data_args.data_path = []


def load_from_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments | None,
    variant: str | None = None,
    weights_from: str | None = None,
) -> LoadedModel:
    """The model that the arguments describe, with the adapters that are stored beside it.

    Args:
        training_args: None looks at the model alone, without adapters.
        variant, weights_from: as for ``load_model``.

    Raises:
        ValueError: the flags do not fit the checkpoint, or adapters lie where this run, which trains none, would read
            or write a whole model.
    """
    path, base = model_args.model_name_or_path, None
    of_training: dict[str, Any] = {}  # what only a run asks of load_model
    if training_args is not None:
        if adapters := find_adapters(path, training_args):
            path, base = adapters, path  # load_model reads the base first, then the adapters.
        of_training["attn_implementation"] = training_args.attn_implementation
        of_training["quantization"] = None if training_args.bits == 16 else training_args.quantization()
    loaded = load_model(
        path,
        model_base=base,
        variant=variant,
        weights_from=weights_from,
        grounding=model_args.choose_grounding(read_config(path).get("grounding")),
        num_temporal_tokens=model_args.num_temporal_tokens,
        num_spatial_tokens=model_args.num_spatial_tokens,
        vision_tower=model_args.vision_tower,
        save_vision_tower=model_args.save_vision_tower,
        find_tower_hash=None if data_args.feature_cache is None else find_tower(model_args, data_args, training_args),
        **model_args.vision_settings(),
        **data_args.vision_settings(),
        **of_training,
    )
    if training_args is not None and model_args.pretrain_mm_mlp_adapter:
        taken = load_adapter(loaded.model, model_args.pretrain_mm_mlp_adapter)
        logger.info(
            "%d tensors taken from --pretrain_mm_mlp_adapter %s", len(taken), model_args.pretrain_mm_mlp_adapter
        )
        # Names from the decoder on, behind which the model's have its own.
        new = [name for name in loaded.new_parameters if not name.endswith(tuple(f".{own}" for own in taken))]
        loaded = replace(loaded, new_parameters=new)
    return loaded


def find_adapters(path: str, args: TrainingArguments) -> str | None:
    """The adapters of ``--lora_weight_path``, whose base is ``path``; None where it is not given."""
    if args.lora_weight_path:
        if not is_adapter_folder(args.lora_weight_path):
            raise ValueError(f"--lora_weight_path {args.lora_weight_path!r} holds no adapters (no adapter_config.json)")
        return args.lora_weight_path
    if not args.lora_enable and is_adapter_folder(path):
        raise ValueError(
            f"{path!r} holds LoRA adapters; train them on with --lora_enable true, or merge them first: "
            f"python -m llava.model.merge_lora --model_path {path} --output_dir MERGED"
        )
    if not args.lora_enable and is_adapter_folder(str(args.output_dir)):
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds the LoRA adapters of another run, and this one trains none; "
            "give another folder"
        )
    return None


def build_bad_sample_log(data_args: DataArguments, training_args: TrainingArguments) -> BadSampleLog | None:
    """The log of a run that skips bad samples; None for one that stops at the first."""
    if data_args.on_bad_sample != SKIP:
        return None
    return BadSampleLog(Path(str(training_args.output_dir)) / BAD_SAMPLES_FILE, data_args.max_bad_share)


def choose_max_length(asked: int | None, model: LlavaMetaForCausalLM) -> int:
    """Most tokens of a sample: what was asked for, but no more than the model's context."""
    context = model.config.max_position_embeddings
    if asked is not None and asked > context and is_first_rank():
        logger.warning("--model_max_length is %d, but the model's context is %d, which is taken", asked, context)
    return min(asked or context, context)


def choose_format(name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Format:
    """The preprocessing format of that name, which the checkpoints of this run will say they were trained with."""
    before = getattr(config, "llava_format", name)
    if before != name:
        logger.warning("the checkpoint was trained with the format %s; now it is %s", before, name)
    config.llava_format = name
    return build_format(name, tokenizer)


def take_finished(trainer: LlavaTrainer) -> bool:
    """Whether ``auto`` finds this very run finished, without a checkpoint of its end; its model is read then."""
    args, folder, identity = trainer.args, Path(str(trainer.args.output_dir)), trainer.checkpoints.identity
    if not is_auto(args.resume_from_checkpoint) or identity is None:
        return False
    mine = replace(identity, length=trainer.data.describe_length())
    if not broadcast_from_rank0(lambda: is_finished(mine, folder, args)):
        return False
    trainer.take_final_model(folder)
    return True


def cli(run: Callable[[], Any] = main) -> int:
    """``main`` for a shell: a mistake of the user is one line and status 2, not a traceback.

    Args:
        run: what to do; an int that it returns is the exit status.

    Returns:
        The exit status: 0, 2 after an error, 85 if the run was asked to stop and can be resumed, 130 after ^C.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    print_anything()
    try:
        status = run()
    except Preempted as stopped:
        status = PREEMPTED
        if is_first_rank():
            print(stopped, file=sys.stderr)
    except errors_of_users() as error:
        # Any other RuntimeError is a bug, or the user's own code, and its traceback is what helps.
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        status = FAILED
        agreed = isinstance(error, AgreedError)
        if is_first_rank() or not agreed:
            print(f"error: {explain_error(error)}", file=sys.stderr)
        if not agreed:  # The other ranks may wait for this one: leave without them.
            return status
    except KeyboardInterrupt:
        print(
            "interrupted: what came after the last checkpoint is lost (SIGUSR1 in place of ^C saves one first); "
            "--resume_from_checkpoint auto goes on from it", file=sys.stderr,
        )  # fmt: skip
        return INTERRUPTED
    finally:
        preemption.forget()
    leave_process_group()
    return status if isinstance(status, int) else 0


def __getattr__(name: str) -> Any:
    # Names that the LLaVA family's module has.
    from llava.compat_llava import find_old_name

    return find_old_name("llava.train.train", name)  # __name__ is __main__ where this is the program.


if __name__ == "__main__":
    sys.exit(cli())
