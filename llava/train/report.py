"""What is said before the first step: what fits, and what is supervised."""

from __future__ import annotations

from llava.config import VisionConfig
from llava.constants import IGNORE_INDEX
from llava.data.bad_samples import SKIP, describe_error
from llava.data.chunks import ChunkedDataset
from llava.data.dataset import SupervisedDataset
from llava.data.files import MediaError
from llava.train.data_checks import documents_of
from llava.types import Example


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
        video = [span.length for span in vision.spans("video", frames)]
        for name, lengths in ((image, [vision.most_image_tokens]), (f"video of {frames} frames{more}", video)):
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
            lines.append(f"  {describe_error(record, error)} (skipped)")
            continue
        supervised = [label for label in labels if label != IGNORE_INDEX]
        text = documents.tokenizer.decode(supervised)
        lines.append(f"  {record.id}: {len(supervised)} of {len(ids)} tokens: {text!r}")
    return "\n".join(lines)
