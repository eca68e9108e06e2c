"""What is said before the first step: what fits, and what is supervised."""

from __future__ import annotations

from llava.config import VisionConfig
from llava.constants import IGNORE_INDEX
from llava.data.dataset import SupervisedDataset


def budget_table(vision: VisionConfig | None, max_length: int, context: int) -> str:
    """Positions that an image and a video take of the context, and what they leave for text.

    Args:
        vision: None for a model without vision.
        max_length: most tokens of a sample.
        context: the model's context length.
    """
    lines = [f"token budget: {max_length} a sample, of a context of {context}"]
    if vision is not None:
        frames = vision.max_frames
        for kind, count in (("image", 1), ("video", frames)):
            spans = vision.spans(kind, count)  # type: ignore[arg-type]
            parts = " + ".join(f"{span.length - 2} patches and 2 markers" for span in spans)
            total = sum(span.length for span in spans)
            of = f" of {count} frames" if kind == "video" else ""
            lines.append(f"  {kind}{of}: {total} tokens ({parts}), leaves {max_length - total} for the rest")
    return "\n".join(lines)


def supervision_table(dataset: SupervisedDataset, num_samples: int = 3) -> str:
    """For the first samples: tokens, how many are supervised, and the text that those cover."""
    lines = ["supervised tokens of the first samples"]
    for record in dataset.records[:num_samples]:
        ids, labels = dataset.tokenize(record)
        supervised = [label for label in labels if label != IGNORE_INDEX]
        text = dataset.tokenizer.decode(supervised)
        lines.append(f"  {record.id}: {len(supervised)} of {len(ids)} tokens: {text!r}")
    return "\n".join(lines)
