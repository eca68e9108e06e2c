"""Boxes in images and the words that refer to them, as RefCOCO has them.

Three layouts: ``refs`` with COCO's ``instances.json`` beside them; one object whose ``images`` have a caption each and
whose ``annotations`` have its box; and flat rows with an image, a sentence and a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.data.images import read_image_size
from llava.data.media_files import MediaError
from llava.eval.annotations.entries import (
    IMAGE_KEYS,
    SENTENCE_KEYS,
    Entry,
    MediaFolders,
    check_box,
    list_entries,
    read_entries,
    read_object,
)
from llava.eval.store import EvalSample, Reference
from llava.geometry import Box

AUTO, SHARES, CORNERS, SIZES = "auto", "normalised", "xyxy", "xywh"
BOX_FORMATS = (AUTO, SHARES, CORNERS, SIZES)
"""How four numbers tell a box: x1 y1 x2 y2 in [0, 1], x1 y1 x2 y2 in pixels, or x y width height in pixels."""

_MARGIN = 2.0
"""Pixels by which rounding may put a box's edge outside its picture."""


@dataclass(frozen=True)
class _Expression:
    """A sentence and a box, as they are written; ``size`` is (width, height) in pixels if the file says so."""

    entry: Entry
    id: str
    image: str
    sentence: str
    numbers: tuple[float, ...]
    size: tuple[float, float] | None
    box_format: str = AUTO


def read_expressions(
    files: Sequence[str], folders: MediaFolders, box_format: str = AUTO, split: str | None = None
) -> list[EvalSample]:
    """Read files of one of the three layouts.

    Args:
        files: one or more; ``refs`` and ``instances.json`` are read together.
        folders: where the images lie.
        box_format: of flat rows, one of ``BOX_FORMATS``; ``auto`` finds out from all boxes together.
        split: only entries of this ``split`` are read, such as ``testA``.

    Raises:
        ValueError: names the file and the entry that is not as ``docs/evaluation.md`` describes.
    """
    found = [expression for expression in _read(files) if split in (None, expression.entry.values.get("split"))]
    unsure = [expression for expression in found if expression.box_format == AUTO]
    # Decided over all rows: one box may fit several readings, a thousand seldom do.
    if unsure and box_format == AUTO:
        box_format = _find_format(unsure)
    return [_sample(expression, folders, box_format) for expression in found]


def _read(files: Sequence[str]) -> Iterator[_Expression]:
    objects = {file: content for file in files if (content := read_object(file)) is not None}
    # refs.json is a list; an object without captions can only be its instances.json.
    instances = {file: content for file, content in objects.items() if not _has_captions(content)}
    for file in files:
        if file in instances:
            continue
        if file in objects:
            yield from _read_captioned(file, list_entries(objects[file], "images", file), objects[file])
        elif instances:
            yield from _read_refs(read_entries(file), instances)
        else:
            yield from _read_rows(read_entries(file))
    if len(instances) == len(files):
        raise ValueError(
            f"{files[0]}: has boxes but nothing that refers to them; give refs.json before it, in --data too"
        )


def _has_captions(content: Mapping[str, object]) -> bool:
    images = content.get("images")
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "caption" in images[0]


def _read_refs(refs: Sequence[Entry], instances: Mapping[str, Mapping[str, object]]) -> Iterator[_Expression]:
    """``refs`` name an annotation and an image of ``instances.json``, and have several sentences each."""
    images: dict[object, Entry] = {}
    boxes: dict[object, Entry] = {}
    for file, content in instances.items():
        # Looked up by id: instances.json has them in no order.
        images |= {entry.key("id"): entry for entry in list_entries(content, "images", file)}
        boxes |= {entry.key("id"): entry for entry in list_entries(content, "annotations", file)}
    for ref in refs:
        annotation, image = boxes.get(ref.key("ann_id")), images.get(ref.key("image_id"))
        # Another split's instances.json is the usual reason.
        if annotation is None or image is None:
            missing, name = ("annotation", "ann_id") if annotation is None else ("image", "image_id")
            raise ref.error(f"{Path(next(iter(instances))).name} has no {missing} {ref.first(name)!r}, its {name}")
        for number, sentence in enumerate(ref.texts("sentences", "sentence"), start=1):
            yield _Expression(
                ref,
                f"{ref.first('ref_id', 'ann_id')}-{number}",
                image.text("file_name"),
                sentence,
                annotation.numbers(4, "bbox"),
                _size(image),
                SIZES,
            )


def _read_captioned(file: str, images: Sequence[Entry], content: Mapping[str, object]) -> Iterator[_Expression]:
    """Each image has the words of one box, whose annotation has the image's id."""
    boxes = {
        entry.key("image_id", "id"): entry.numbers(4, "bbox") for entry in list_entries(content, "annotations", file)
    }
    for image in images:
        if image.key("id") not in boxes:
            raise image.error(f"no annotation has its id {image.first('id')!r}")
        numbers = boxes[image.first("id")]
        name, sentence = image.text("file_name"), image.text("caption")
        yield _Expression(image, image.identity(""), name, sentence, numbers, _size(image), SIZES)


def _read_rows(rows: Sequence[Entry]) -> Iterator[_Expression]:
    for number, row in enumerate(rows, start=1):
        sentences = row.texts(*SENTENCE_KEYS)
        for place, sentence in enumerate(sentences, start=1):
            identity = row.identity(number) + (f"-{place}" if len(sentences) > 1 else "")
            image = row.text(*IMAGE_KEYS)
            # Rows with "img_id" name an image without the end of its file's name.
            image = image if Path(image).suffix else f"{image}.jpg"
            yield _Expression(row, identity, image, sentence, row.numbers(4, "bbox", "box"), _size(row))


def _size(entry: Entry) -> tuple[float, float] | None:
    width, height = entry.positive("width"), entry.positive("height")
    return None if width is None or height is None else (width, height)


def _find_format(expressions: Sequence[_Expression]) -> str:
    """The only format in which all boxes of flat rows are boxes in their pictures."""
    # Not one box reaches beyond a pixel: these are shares.
    if all(max(e.numbers) <= 1 for e in expressions):
        return SHARES
    # The first row that each reading cannot be; it is named if neither can.
    no_corners = next((e for e in expressions if e.numbers[2] <= e.numbers[0] or e.numbers[3] <= e.numbers[1]), None)
    no_sizes = next((e for e in expressions if e.size and _leaves(e.numbers, e.size)), None)
    if (no_corners is None) != (no_sizes is None):
        return CORNERS if no_corners is None else SIZES
    if no_corners is None:
        raise ValueError(
            f"{expressions[0].entry.file}: its boxes could be x1 y1 x2 y2 as well as x y width height, in pixels; say "
            "which with --box_format xyxy or xywh"
        )
    assert no_sizes is not None
    raise ValueError(
        f"{no_corners.entry.source}: its box {list(no_corners.numbers)} cannot be x1 y1 x2 y2, and that of "
        f"{no_sizes.entry.source}, {list(no_sizes.numbers)}, cannot be x y width height; correct one or give "
        "--box_format"
    )


def _leaves(numbers: tuple[float, ...], size: tuple[float, float]) -> bool:
    """Whether a box, read as x y width height, leaves its picture."""
    x, y, width, height = numbers
    return x + width > size[0] + _MARGIN or y + height > size[1] + _MARGIN


def _sample(expression: _Expression, folders: MediaFolders, box_format: str) -> EvalSample:
    entry, size, fault = expression.entry, expression.size, None
    media = folders.find(expression.image, "image", entry)
    written = box_format if expression.box_format == AUTO else expression.box_format
    if written != SHARES and size is None:
        try:
            # From the header, without decoding; a missing file is this sample's fault and no other's.
            height, width = read_image_size(media.path)
            size = width, height
        except MediaError as error:
            fault = str(error)
    boxes = () if fault else (_box(expression.numbers, written, size or (1.0, 1.0), entry),)
    return EvalSample(
        expression.id, entry.source, (media,), Reference(boxes), expression=expression.sentence, fault=fault
    )


def _box(numbers: tuple[float, ...], box_format: str, size: tuple[float, float], entry: Entry) -> Box:
    x, y, right, bottom = numbers
    if box_format == SIZES:
        # From here on corners, whatever was written.
        right, bottom = x + right, y + bottom
    if box_format != SHARES:
        width, height = size
        x, y, right, bottom = x / width, y / height, right / width, bottom / height
    if box_format == SHARES and not all(-0.01 <= number <= 1.01 for number in (x, y, right, bottom)):
        raise entry.error(f"its box {list(numbers)} does not lie in [0, 1]; is --box_format xyxy or xywh?")
    return check_box((x, y, right, bottom), entry)
