"""What is checked and told of a run before its first step: do the data fit the model, what is trained, what is learned.

Each check names what is wrong in one line, for training and evaluation data alike.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llava.compat import attention_of
from llava.config import VisionConfig
from llava.constants import IGNORE_INDEX
from llava.data.check import MediaCheck, find_bad
from llava.data.chunking import RearrangedDataset
from llava.data.dataset import SupervisedDataset, check_room
from llava.data.dataset_stats import count_cut_tokens, count_media, count_presented_words
from llava.data.index import Mixture
from llava.data.media_files import find_missing
from llava.data.module import DataModule, RunDataset, documents_of
from llava.data.placeholders import remove_placeholders
from llava.data.records import describe_notes
from llava.messages import escape_controls
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loading import LoadedModel
from llava.train.arguments import COORDINATES_PART, DataArguments, ModelArguments, TrainingArguments
from llava.train.budget import WordPlan, plan_words
from llava.train.data_order import build_order
from llava.train.distributed import AgreedError, broadcast_from_rank0, gather_failures
from llava.train.engines import onednn_gain
from llava.train.parts import parts_table, unfused_gelus
from llava.types import SKIP, BadSample, Example, MediaKind, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MOST_NAMED = 3
_LANGUAGE_MODEL = "mm_language_model"
_WIDE = 256
"""Width of a language model from which on products of matrices are most of a step."""
_TEXTS_LOOKED_AT = 200
_TOKENS_NEEDED = 50
"""Tokens that a sample of the texts must have before anything is said of their distribution."""
_MOST_UNKNOWN, _SOME_UNKNOWN = 0.5, 0.05
"""Shares of a text that a tokenizer does not know: more than the first is an error, than the second a warning."""


def check_and_report(
    loaded: LoadedModel,
    data: DataModule,
    max_length: int,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> None:
    """Check the data of a run, and print what is trained on what; every rank calls this, and all end with an error.

    Args:
        loaded: the model, with its trainable parts set.
        data: training and evaluation data; one of the two may be None.
        max_length: most tokens of a sample.
        model_args, data_args, training_args: the flags.

    Raises:
        ValueError: media do not fit, the tokenizer does not know the text, files are missing (or, with ``--check_data
            decode``, cannot be decoded), or only vision modules would be trained on data without media.
    """
    # With --do_train false there are no training data, without --eval_data_path none for evaluation.
    train, evaluation = data["train_dataset"], data["eval_dataset"]
    given = [dataset for dataset in (train, evaluation) if dataset is not None]
    if train is not None:
        check_vision_is_fed(model_args, documents_of(train))
    for documents in map(documents_of, given):
        # Files and indexes are read on one rank only.
        broadcast_from_rank0(partial(check_documents, documents, files=data_args.check_data == "files"))
        # Each rank decodes its share, and all meet in gather_failures.
        if data_args.check_data == "decode":
            check_decoding(documents, training_args)
    if training_args.process_index == 0:
        if loaded.transfer is not None:
            print(loaded.transfer)
        print(parts_table(loaded.model, training_args.part_learning_rates()))
        print(budget_table(loaded.vision, max_length, loaded.model.config.max_position_embeddings))
        print(escape_controls("\n".join(map(data_table, given))))
        print(escape_controls(supervision_table(given[0])))
        print(escape_controls(f"output folder: {training_args.output_dir}"), flush=True)
        for advice in advise_on_kernels(loaded.model, training_args):
            logger.info("%s", advice)


def report_words(dataset: RunDataset | None, args: TrainingArguments) -> None:
    """Print how many words an epoch has and what the flags make of them, and set the number of steps by them.

    What packs, or batches by tokens, are like is printed too.

    Args:
        dataset: trained on; None where nothing is.
        args: ``max_steps`` is set where ``--word_limit`` alone says how long the run is.
    """
    if dataset is None or not args.do_train:
        return
    order = build_order(dataset, args)
    lines = plan_words(WordPlan(dataset.presented_words[0], order), args)
    if order.has_units:
        lines.append(order.describe_units())
    if args.process_index == 0:
        print(escape_controls("\n".join(lines)), flush=True)


def advise_on_kernels(model: LlavaMetaForCausalLM, args: TrainingArguments) -> list[str]:
    """What would compute the same in less time: said, and left to the user."""
    advice = []
    if not args.fused_gelu and unfused_gelus(model):
        advice.append("--fused_gelu true computes this model's activations in fewer kernels, with other last bits")
    # On a CPU sdpa has no fused kernel with dropout; in half precision what it takes instead is slower than eager.
    attention_dropout = max(
        (module.p for name, module in model.named_modules() if "attn_dropout" in name),
        default=getattr(model.config, "attention_dropout", 0.0),
    )
    if args.device.type == "cpu" and args.bf16 and attention_dropout and attention_of(model.config) == "sdpa":
        advice.append(
            f"attention drops out {attention_dropout:g} of its weights: on a CPU --attn_implementation eager does that "
            "faster than sdpa, and without it (attn_pdrop or attention_dropout 0 in config.json) sdpa is faster still"
        )
    width, precise = model.config.hidden_size, not (args.bf16 or args.fp16)
    if args.device.type == "cpu" and precise and not args.onednn and width >= _WIDE and (gain := onednn_gain()) > 1.25:
        advice.append(f"--onednn true: products of matrices take {1 / gain:.0%} of the time on this CPU, in a trial")
    return advice


# Checks.


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


def check_documents(dataset: SupervisedDataset, files: bool) -> None:
    """Check what can be checked without decoding: room for media, the tokenizer and, if asked, the media files."""
    check_media(dataset)
    if dataset.on_bad_sample != SKIP:
        check_room(dataset, (count_cut_tokens(dataset) > 0) & count_media(dataset.records).any(axis=0))
    check_text_is_known(dataset)
    if files:
        check_media_files(dataset)


def check_media(dataset: SupervisedDataset) -> None:
    """A ValueError if samples have media and the model no vision, or media that do not fit into a sample.

    Only of what the data hold is anything asked: images that fit are not refused for videos that are not there.
    """
    images, videos = count_media(dataset.records)  # (samples,) each
    vision = dataset.vision
    if vision is None:
        if having := np.flatnonzero(images + videos).tolist():
            raise ValueError(
                f"{dataset.records[having[0]]} has an image or a video, as {len(having)} of {len(images)} samples "
                "have, but the model has no vision; give --vision_tower"
            )
        return
    limit = dataset.max_length
    # Without --frames_upbound a short clip may still fit; one that does not is named when it is opened.
    frames = vision.max_frames if vision.is_bounded else 1
    kinds: list[tuple[MediaKind, bool, str, int]] = [
        ("video", bool(videos.any()), f"a video of {frames} frames takes", vision.layout.num_tokens("video", frames)),
        ("image", bool(images.any()), "an image takes" if vision.anyres is None
         else f"the largest image, of {vision.anyres.most_views} views, takes", vision.layout.most_image_tokens),
    ]  # fmt: skip
    for kind, is_there, subject, tokens in kinds:
        if is_there and tokens + 1 >= limit:  # One token of text and the end of text must find room.
            ways = ["raise --model_max_length (within the model's context)", *vision.ways_to_shorten({kind})]
            raise ValueError(f"{subject} {tokens} tokens, but a sample may have {limit}; {' or '.join(ways)}")


def check_media_files(dataset: SupervisedDataset) -> None:
    """Look whether the files of all media are there.

    Raises:
        ValueError: some are not, or are empty or no files; names the first samples. With ``on_bad_sample="skip"``
            they are counted in the log, and left out when their turn comes.
    """
    missing = find_missing(dataset.records)
    if not missing:
        return
    number = f"{len(missing)} of {len(dataset)} samples"
    if dataset.on_bad_sample == SKIP:
        logger.warning("%s name files that cannot be used and are skipped, the first: %s", number, missing[0])
        return
    raise ValueError(
        f"{_name_some(missing)}: {number} name files that cannot be used; see --image_folder and "
        "--video_folder, or leave the samples out with --on_bad_sample skip (--check_data none does not look)"
    )


def check_decoding(dataset: SupervisedDataset, training_args: TrainingArguments) -> None:
    """Decode all media, each rank its share.

    Raises:
        AgreedError: some cannot be decoded; names the first of each rank. With ``on_bad_sample="skip"`` they are
            counted in the log.
    """
    vision = dataset.vision
    if vision is None:
        return
    having = np.flatnonzero(count_media(dataset.records).any(axis=0))
    # Every rank-th sample: those of one slow disk or folder are spread over all ranks.
    share = having[training_args.process_index :: training_args.world_size].tolist()
    check = MediaCheck(
        dataset.records, vision.num_frames, vision.video_fps, vision.frames_upbound, dataset.decode_timeout,
        dataset.limits,
    )  # fmt: skip
    bad = [str(sample) for sample in find_bad(check, training_args.dataloader_num_workers, share)]
    if dataset.on_bad_sample == SKIP:
        if bad:
            logger.warning("%d samples cannot be decoded and are skipped, the first: %s", len(bad), bad[0])
    elif failures := gather_failures(_name_some(bad) if bad else None):
        raise AgreedError(
            f"{'; '.join(failures)}: mend or remove them, or leave them out with --on_bad_sample skip "
            "(python -m llava.data.check lists all)"
        )


def _name_some(bad: Sequence[str]) -> str:
    more = f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
    return f"{'; '.join(bad[:_MOST_NAMED])}{more}"


def check_text_is_known(dataset: SupervisedDataset) -> None:
    """Compare the tokenizer with texts from all over the data.

    Raises:
        ValueError: it does not know most of them, or gives nearly everything one id: it is another language's or
            another model's, and what is trained would be noise. Where it loses a smaller part there is a warning.
    """
    tokenizer = dataset.tokenizer
    # A sample of them: to tokenize a whole data set takes minutes, and a wrong tokenizer shows in a few texts.
    texts = _some_texts(dataset.records)
    encoded: list[list[int]] = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    ids = [i for of_text in encoded for i in of_text]
    name = f"the tokenizer of {tokenizer.name_or_path!r}"
    remedy = "give the model's folder the tokenizer that it was made with, or train one on this text "
    remedy += "(python -m llava.data.train_tokenizer)"
    if texts and not ids:
        raise ValueError(f"{name} makes no token at all of the text of the data ({texts[0]!r:.60}); {remedy}")
    lost, example = _lost_share(tokenizer, texts, encoded)
    if lost > _MOST_UNKNOWN:
        raise ValueError(f"{name} does not know {lost:.0%} of the text of the data ({example!r:.60}); {remedy}")
    if lost > _SOME_UNKNOWN:
        logger.warning("%s does not know %.0f%% of the text of the data (%.60r); %s", name, 100 * lost, example, remedy)
    if len(ids) < _TOKENS_NEEDED:
        return
    # One id for nearly everything, though the words differ: an unknown token that is not declared as such.
    most, count = Counter(ids).most_common(1)[0]
    words = Counter(word for text in texts for word in text.split())
    if count > len(ids) / 2 and max(words.values()) < sum(words.values()) / 4:
        raise ValueError(
            f"{name} makes {count} of {len(ids)} tokens of the text of the data the same, id {most} "
            f"({tokenizer.convert_ids_to_tokens(most)!r}); {remedy}"
        )


def _some_texts(records: Sequence[Record]) -> list[str]:
    """Texts of samples from the first to the last, evenly spread, without their media."""
    places = np.unique(np.linspace(0, len(records) - 1, min(len(records), _TEXTS_LOOKED_AT)).astype(int))
    turns = [turn for place in places.tolist() for turn in records[place].turns]
    return [text for turn in turns if (text := remove_placeholders(turn.text).strip()[:2000])]


def _lost_share(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> tuple[float, str]:
    """The share of unknown tokens or, if more, of letters that do not come back; and the text that loses most."""
    unknown, total = 0, 0
    letters, kept = 0, 0
    worst, example = -1.0, ""
    for text, ids in zip(texts, encoded, strict=True):
        # Tokenizers without an unknown token may drop what they do not know: letters are gone after decoding, then.
        given = _letters(text)
        # Decoded again and compared as a multiset: where letters come back, order and spaces do not matter.
        back = (given & _letters(str(tokenizer.decode(list(ids), skip_special_tokens=False)))).total()
        missing = sum(i == tokenizer.unk_token_id for i in ids) if tokenizer.unk_token_id is not None else 0
        unknown, total = unknown + missing, total + len(ids)
        letters, kept = letters + given.total(), kept + back
        loss = max(missing / max(len(ids), 1), 1 - back / max(given.total(), 1))
        if loss > worst:
            worst, example = loss, text
    # GPT-2's unknown token is its end of text, which texts do not hold either.
    return max(unknown / max(total, 1), 1 - kept / max(letters, 1)), example


def _letters(text: str) -> Counter[str]:
    """The letters and digits of a text, without case and accents, which many tokenizers take off."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(character for character in plain if character.isalnum())


# Tables.


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


def data_table(dataset: RunDataset) -> str:
    """What the samples of each data file have, what is cut of them, and what nothing reads in them."""
    documents = documents_of(dataset)
    lines = [media_table(documents), words_table(dataset)]
    if isinstance(dataset, RearrangedDataset):
        lines += [dataset.describe(), cut_table(documents, dataset.is_whole)]
    else:
        lines.append(cut_table(documents))
    if isinstance(documents.records, Mixture):
        lines += [f"note: {note}" for note in describe_notes(documents.records)]
    return "\n".join(filter(None, lines))


def media_table(dataset: SupervisedDataset) -> str:
    """How many samples of each data file have media, of which kind; those with both kinds count twice."""
    images, videos = count_media(dataset.records) > 0  # (samples,) each
    lines = ["media of the samples"]
    for label, indices in by_source(dataset.records).items():
        of_kind = {"images": images, "videos": videos, "text alone": ~(images | videos)}
        counts = {name: int(having[indices].sum()) for name, having in of_kind.items()}
        parts = [f"{count} {name} ({count / len(indices):.1%})" for name, count in counts.items() if count]
        lines.append(f"  {label}: {len(indices)} samples, with {', '.join(parts) or 'nothing'}")
    return "\n".join(lines)


def words_table(dataset: RunDataset) -> str:
    """How many words the samples of each data file present in an epoch, and how many are cut off."""
    documents = documents_of(dataset)
    whole = dataset.is_whole if isinstance(dataset, RearrangedDataset) else None
    presented, all_words = count_presented_words(documents, whole)  # (samples,) each
    lines = ["words of an epoch"]
    for label, indices in by_source(documents.records).items():
        lost = int(all_words[indices].sum() - presented[indices].sum())
        lines.append(f"  {label}: {int(presented[indices].sum()):,}" + (f", and {lost:,} are cut off" if lost else ""))
    return "\n".join(lines)


def cut_table(dataset: SupervisedDataset, whole: NDArray[np.bool_] | None = None) -> str:
    """How many samples of each data file are cut to the context, and how many tokens of them; "" where none is.

    Args:
        dataset: the samples.
        whole: bool (samples,), which of them ``--text_chunking`` leaves as they are; None without it.
    """
    # Chunked texts lose nothing; what is left are samples with media or coordinates.
    cut = count_cut_tokens(dataset) if whole is None else np.where(whole, count_cut_tokens(dataset), 0)
    if dataset.vision is not None and dataset.vision.video_fps > 0:
        cut = np.where(count_media(dataset.records)[1] > 0, 0, cut)  # Their frames show only when they are opened.
    if not cut.any():
        return ""
    lines = [f"text that is cut to {dataset.max_length} tokens"]
    for label, indices in by_source(dataset.records).items():
        if samples := int((cut[indices] > 0).sum()):
            lines.append(f"  {label}: {samples} of {len(indices)} samples lose {int(cut[indices].sum())} tokens")
    other = ", or train on all of a text with --text_chunking document"
    what = other if whole is None else "; text with images, videos or coordinates is not chunked"
    return "\n".join([*lines, f"  raise --model_max_length{what}"])


def by_source(records: Sequence[Record]) -> dict[str, NDArray[np.intp]]:
    """The indices of the samples of each data file, in the order of the files."""
    if not isinstance(records, Mixture):
        return {"data": np.arange(len(records))}
    indices: dict[str, list[NDArray[np.intp]]] = {}
    start = 0
    for part in records.parts:  # A file that a mixture names twice is one source.
        indices.setdefault(part.label, []).append(np.arange(start, start + len(part.rows)))
        start += len(part.rows)
    return {label: np.concatenate(pieces) for label, pieces in indices.items()}


def supervision_table(dataset: RunDataset, num_samples: int = 3) -> str:
    """For the first samples, or chunks of them: tokens, how many are supervised, and the text that those cover."""
    lines = ["supervised tokens of the first samples"]
    documents = documents_of(dataset)
    for index, record in enumerate(islice(dataset.records, num_samples)):
        try:
            if isinstance(dataset, RearrangedDataset) and dataset.is_chunk(index):
                chunk = dataset[index]
                assert isinstance(chunk, Example)
                ids, labels = chunk.input_ids, chunk.labels
            else:
                # Without media: no picture is decoded for a table.
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
