"""Pictures of cases: what was asked, where or when it is, and what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from llava.demo.grounding.evaluation import Case
from llava.demo.grounding.scenes import NUM_FRAMES
from llava.demo.picture import read_frames
from llava.eval.draw import draw_case
from llava.grounding.syntax import Box


def write_pictures(folder: Path, examples: Mapping[str, Sequence[Case]]) -> None:
    """Draw each case as ``folder/NAME_NUMBER.png``, the reference in green and the answer in red."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cases in examples.items():
        for number, case in enumerate(cases):
            draw_grounding(case).save(folder / f"{name}_{number}.png", optimize=True)


def draw_grounding(case: Case) -> Image.Image:
    """Draw one case over its picture or its frames."""
    texts = {"question": case.question, "answer": case.answer, "IoU": f"{case.scores['mIoU']:.2f}"}
    found = [] if case.found is None else [case.found]
    return draw_case(_frames_of(case), [case.reference], found, texts)


def _frames_of(case: Case) -> list[Image.Image]:
    if not isinstance(case.reference, Box):
        return [Image.fromarray(frame) for frame in read_frames(case.file, NUM_FRAMES)]
    with Image.open(case.file) as picture:
        return [picture.convert("RGB")]
