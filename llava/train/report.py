"""What is said before the first step: what fits, and what is supervised."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from llava.config import VisionConfig
from llava.constants import IGNORE_INDEX
from llava.data.check import MediaCheck, find_bad
from llava.data.chunking import ChunkedDataset
from llava.data.dataset import SupervisedDataset, check_room
from llava.data.dataset_stats import count_cut_tokens, count_media
from llava.data.index import Mixture
from llava.data.media_files import MediaError
from llava.data.records import describe_notes
from llava.data.start_checks import check_media, check_media_files, check_text_is_known, cut_table, media_table
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_failures
from llava.train.parts import COORDINATES_PART
from llava.types import SKIP, BadSample, Example


def budget_table(vision: VisionConfig | None, max_length: int, context: int) -> str:
    """Positions that an image and a video take of the context, and what they leave for text.

    Args:
        vision: None for a model without vision.
        max_length: most tokens of a sample.
        context: the model's context length.
    """
    lines = [f"token budget: {max_length} a sample, of a context of {context}"]
    if vision is not None:
        frames, more = vision.max_frames, "" if vision.is_bounded else " (--frames_upbound 0 allows more)"
        image = "image" if vision.anyres is None else f"largest image, of {vision.anyres.most_views} views"
        video = [span.length for span in vision.layout.spans("video", frames)]
        for name, lengths in ((image, [vision.layout.most_image_tokens]), (f"video of {frames} frames{more}", video)):
            parts = " + ".join(f"{length - 2} patches and 2 markers" for length in lengths)
            total = sum(lengths)
            lines.append(f"  {name}: {total} tokens ({parts}), leaves {max_length - total} for the rest")
    return "\n".join(lines)


def supervision_table(dataset: SupervisedDataset | ChunkedDataset, num_samples: int = 3) -> str:
    """For the first samples, or chunks of them: tokens, how many are supervised, and the text that those cover."""
    lines = ["supervised tokens of the first samples"]
    documents = documents_of(dataset)
    for index, record in enumerate(dataset.records[:num_samples]):
        try:
            if record.fault is not None:
                raise MediaError(record.fault)
            documents.check_target(record)
            if isinstance(dataset, ChunkedDataset) and dataset.is_chunk(index):
                chunk = dataset[index]
                assert isinstance(chunk, Example)
                ids, labels = chunk.input_ids, chunk.labels
            else:
                ids, labels = documents.tokenize(record)
        except ValueError as error:
            if documents.on_bad_sample != SKIP:
                raise
            lines.append(f"  {BadSample.from_error(record, error)} (skipped)")
            continue
        supervised = [label for label in labels if label != IGNORE_INDEX]
        text = documents.tokenizer.decode(supervised)
        lines.append(f"  {record.id}: {len(supervised)} of {len(ids)} tokens: {text!r}")
    return "\n".join(lines)


# The data of a run before its first step: checked once for all ranks, and told in a few lines.

logger = logging.getLogger(__name__)

_MOST_NAMED = 3
_LANGUAGE_MODEL = "mm_language_model"


def check_data(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments, data: dict[str, Any]
) -> None:
    """Check training and evaluation data; every rank calls this, and every rank ends where something is wrong.

    Args:
        data: what ``make_supervised_data_module`` returned.

    Raises:
        ValueError: media do not fit, the tokenizer does not know the text, files are missing (or, with ``--check_data
            decode``, cannot be decoded), or only vision modules would be trained on data without media.
    """
    if data["train_dataset"] is not None:  # --do_train false reads none.
        check_vision_is_fed(model_args, documents_of(data["train_dataset"]))
    for dataset in map(documents_of, filter(None, (data["train_dataset"], data["eval_dataset"]))):
        broadcast_from_rank0(partial(check_room_for_media, dataset))
        broadcast_from_rank0(partial(check_text_is_known, dataset))
        if data_args.check_data == "files":
            broadcast_from_rank0(partial(check_media_files, dataset))
        elif data_args.check_data == "decode":
            check_decoding(dataset, training_args)


def check_room_for_media(dataset: SupervisedDataset) -> None:
    """A ValueError if samples have media that the model cannot see, or that leave no room for a text."""
    check_media(dataset)
    if dataset.on_bad_sample != SKIP:
        check_room(dataset, (count_cut_tokens(dataset) > 0) & count_media(dataset.records).any(axis=0))


def check_vision_is_fed(model_args: ModelArguments, dataset: SupervisedDataset) -> None:
    """Say that a run has a vision tower and no media, or flags for vision and no vision.

    Raises:
        ValueError: only vision modules are trained, and no sample has an image or a video.
    """
    if dataset.vision is None:
        if given := [name for name, value in model_args.vision_settings().items() if value is not None]:
            logger.warning(
                "flags for vision were given (%s), but the model has none; give --vision_tower", ", ".join(given)
            )
        return
    if count_media(dataset.records).any():
        return
    message = f"not one of the {len(dataset)} samples has an image or a video"
    if _LANGUAGE_MODEL not in model_args.tunable_parts and COORDINATES_PART not in model_args.tunable_parts:
        raise ValueError(
            f"{message}, but only {', '.join(model_args.tunable_parts)} would be trained, which text never reaches; "
            f"give data with media, or add {_LANGUAGE_MODEL} to --mm_tunable_parts"
        )
    if model_args.vision_tower:
        logger.warning("--vision_tower is given, but %s: the vision modules are not trained", message)


def check_decoding(dataset: SupervisedDataset, training_args: TrainingArguments) -> None:
    """Decode all media, each rank its share.

    Raises:
        AgreedError: some cannot be decoded; names the first of each rank. With ``on_bad_sample="skip"`` they are
            counted in the log.
    """
    vision = dataset.vision
    if vision is None:
        return
    share = np.flatnonzero(count_media(dataset.records).any(axis=0))[
        training_args.process_index :: training_args.world_size
    ].tolist()
    check = MediaCheck(
        dataset.records, vision.num_frames, vision.video_fps, vision.frames_upbound, dataset.decode_timeout,
        dataset.limits,
    )  # fmt: skip
    bad = [str(sample) for sample in find_bad(check, training_args.dataloader_num_workers, share)]
    if dataset.on_bad_sample == SKIP:
        if bad:
            logger.warning("%d samples cannot be decoded and are skipped, the first: %s", len(bad), bad[0])
        return
    more = f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
    if failures := gather_failures(f"{'; '.join(bad[:_MOST_NAMED])}{more}" if bad else None):
        raise AgreedError(
            f"{'; '.join(failures)}: mend or remove them, or leave them out with --on_bad_sample skip "
            "(python -m llava.data.check lists all)"
        )


def documents_of(dataset: SupervisedDataset | ChunkedDataset) -> SupervisedDataset:
    """The samples as the data files have them."""
    return dataset.documents if isinstance(dataset, ChunkedDataset) else dataset


def data_tables(datasets: Sequence[SupervisedDataset | ChunkedDataset | None]) -> str:
    """What the samples of each data file have, what is cut of them, and what nothing reads in them."""
    lines = []
    for given in datasets:
        if given is None:
            continue
        dataset = documents_of(given)
        if isinstance(given, ChunkedDataset):
            told = [given.describe(), cut_table(dataset, given.is_whole)]
        else:
            told = [cut_table(dataset)]
        lines += [media_table(dataset), *filter(None, told)]
        if isinstance(dataset.records, Mixture):
            lines += [f"note: {note}" for note in describe_notes(dataset.records)]
    return "\n".join(lines)
