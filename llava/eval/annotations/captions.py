"""Images and videos with captions: rows, and COCO's object of ``images`` and ``annotations``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llava.eval.annotations.entries import (
    IMAGE_KEYS,
    SENTENCE_KEYS,
    VIDEO_KEYS,
    Entry,
    MediaFolders,
    list_entries,
    read_entries,
    read_object,
)
from llava.eval.annotations.moments import find_video
from llava.eval.store import EvalSample, Reference


def read_captions(files: Sequence[str], folders: MediaFolders) -> list[EvalSample]:
    """Read files of one of the two layouts; several captions of an image are all right answers to one question.

    Raises:
        ValueError: names the file and the entry that is not as ``docs/evaluation.md`` describes.
    """
    samples: list[EvalSample] = []
    for file in files:
        content = read_object(file)
        samples += _read_rows(read_entries(file), folders) if content is None else _read_coco(content, file, folders)
    return samples


def _read_coco(content: dict[str, Any], file: str, folders: MediaFolders) -> Iterator[EvalSample]:
    captions: dict[Any, list[str]] = {}
    for entry in list_entries(content, "annotations", file):
        captions.setdefault(entry.first("image_id"), []).append(entry.text("caption"))
    for image in list_entries(content, "images", file):
        if image.first("id") not in captions:
            raise image.error(f"no annotation has its id {image.first('id')!r}")
        media = folders.find(image.text("file_name"), "image", image)
        reference = Reference(captions=tuple(captions[image.first("id")]))
        yield EvalSample(image.identity(""), image.source, (media,), reference)


def _read_rows(rows: Sequence[Entry], folders: MediaFolders) -> Iterator[EvalSample]:
    for number, row in enumerate(rows, start=1):
        if any(key in row for key in VIDEO_KEYS):
            media = find_video(row.text(*VIDEO_KEYS), folders, row)
        else:
            media = folders.find(row.text(*IMAGE_KEYS), "image", row)
        # With a question of its own, a row asks it in place of the template.
        question = row.text("question") if "question" in row else None
        yield EvalSample(
            row.identity(number),
            row.source,
            (media,),
            Reference(captions=tuple(row.texts(*SENTENCE_KEYS, "answer", "answers"))),
            expression=question or "",
            question=question,
        )
