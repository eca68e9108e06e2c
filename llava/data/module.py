"""From the flags about data to what a trainer reads: data sets and a collator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

from llava.config import GroundingConfig, VisionConfig
from llava.data.chunking import CONCATENATE, DOCUMENT, ChunkedDataset, RearrangedDataset
from llava.data.collator import SupervisedCollator
from llava.data.concatenation import ConcatenatedDataset
from llava.data.dataset import SupervisedDataset, check_samples
from llava.data.formats import PLAIN_LM, Format, build_format
from llava.data.media_files import MediaLimits
from llava.data.records import read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava.data.feature_cache.run import RunFeatures

RunDataset = SupervisedDataset | RearrangedDataset[SupervisedDataset]


def documents_of(dataset: RunDataset) -> SupervisedDataset:
    """The samples as the data files have them."""
    return dataset.documents if isinstance(dataset, RearrangedDataset) else dataset


class DataModule(TypedDict):
    """What the trainer reads; a data set is None where no files were given for it."""

    train_dataset: RunDataset | None
    eval_dataset: RunDataset | None
    data_collator: SupervisedCollator


class DataSettings(Protocol):
    """What is read of ``DataArguments``, which belong to training and are not imported here."""

    data_path: list[str]
    eval_data_path: list[str] | None
    image_folder: str | None
    video_folder: str | None
    data_cache_dir: str | None
    on_bad_sample: str
    allow_duplicate_ids: bool
    allow_outside_paths: bool
    ignore_keys: list[str] | None
    text_column: str | None
    early_mix_text: bool
    decode_timeout: float
    media_limits: MediaLimits
    text_chunking: str


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataSettings,
    vision: VisionConfig | None,
    max_length: int,
    text_format: Format | None = None,
    seed: int = 42,
    grounding: GroundingConfig | None = None,
    features: RunFeatures | None = None,
) -> DataModule:
    """Datasets and collator for the trainer.

    Args:
        tokenizer: of the model.
        data_args: ``DataArguments`` (paths, folders, the folder of indexes).
        vision: None for a model without vision.
        max_length: most tokens of an example.
        text_format: how conversations become ids and labels; ``plain_lm`` by default.
        seed: of the random samples that a mixture asks for.
        grounding: what coordinates are to the model; None for one without them.
        features: of the tower, which take the place of decoded media where there are any.

    Raises:
        ValueError: a file is not as it should be, or samples have nothing to learn from.
    """
    chosen = text_format or build_format(PLAIN_LM, tokenizer)
    settings = (tokenizer, data_args, vision, max_length, chosen, seed, grounding, features)
    paths = {"data_path": data_args.data_path, "eval_data_path": data_args.eval_data_path}
    train, evaluation = (build_dataset(flag, files, *settings) if files else None for flag, files in paths.items())
    collator = SupervisedCollator(tokenizer.pad_token_id)
    return {"train_dataset": train, "eval_dataset": evaluation, "data_collator": collator}


def build_dataset(
    flag: str,
    paths: list[str],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataSettings,
    vision: VisionConfig | None,
    max_length: int,
    text_format: Format,
    seed: int = 42,
    grounding: GroundingConfig | None = None,
    features: RunFeatures | None = None,
) -> RunDataset:
    """The samples of the files that a flag names; the other arguments are as for ``make_supervised_data_module``."""
    records = read_records(
        paths,
        data_args.image_folder,
        data_args.video_folder,
        cache_dir=data_args.data_cache_dir,
        seed=seed,
        on_bad_sample=data_args.on_bad_sample,
        allow_duplicate_ids=data_args.allow_duplicate_ids,
        flag=f"--{flag}",
        allow_outside_paths=data_args.allow_outside_paths,
        ignore_keys=data_args.ignore_keys or (),
        text_column=data_args.text_column,
    )
    dataset = SupervisedDataset(
        records,
        tokenizer,
        vision,
        max_length,
        early_mix_text=data_args.early_mix_text,
        text_format=text_format,
        on_bad_sample=data_args.on_bad_sample,
        decode_timeout=data_args.decode_timeout,
        limits=data_args.media_limits,
        grounding=grounding,
        features=features,
    )
    check_samples(dataset)
    # Checked before it is chunked: an error names the sample of the file.
    if data_args.text_chunking == CONCATENATE:
        return ConcatenatedDataset(dataset)
    return ChunkedDataset(dataset) if data_args.text_chunking == DOCUMENT else dataset
