"""Model cards: the ``README.md`` of a saved model, which is written anew only while nobody has changed it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.io import write_text

logger = logging.getLogger(__name__)

CARD = "README.md"
LOADING = "How to load it"
"""The section with a piece of Python that runs; that of an export is another one than its checkpoint's."""

_MARK = "<!-- llava wrote this card, and writes it anew as long as nobody changes it: {} -->"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{16})") + r"\n?")
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.S)


@dataclass
class ModelCard:
    """What a card says.

    Attributes:
        title: its first line.
        metadata: what the hub reads of a model, in YAML before the text; entries without a value are left out.
        sections: heading and Markdown of each.
    """

    title: str
    metadata: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """The file, with the mark by which a later save knows that it may be replaced."""
        import yaml

        known = {name: value for name, value in self.metadata.items() if value not in (None, "", [])}
        front = yaml.safe_dump(known, sort_keys=False, allow_unicode=True) if known else ""
        head = f"---\n{front}---\n" if front else ""
        parts = [f"## {heading}\n\n{text.strip()}\n" for heading, text in self.sections.items() if text.strip()]
        body = "\n".join([f"# {one_line(self.title)}\n", *parts])
        return f"{head}{_MARK.format(_digest(head + body))}\n{body}"

    @classmethod
    def read(cls, folder: Path) -> ModelCard | None:
        """The card of a folder, whoever wrote it; None where there is none that can be read."""
        import yaml

        try:
            text = (folder / CARD).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        front = _FRONT.match(text)
        try:
            metadata = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError:
            metadata = {}
        body = _MARKED.sub("", text[front.end() :] if front else text)
        title = re.search(r"^# (.+)$", body, re.M)
        parts = re.split(r"^## (.+)\n", body, flags=re.M)
        sections = {heading: part.strip() for heading, part in zip(parts[1::2], parts[2::2], strict=True)}
        return cls(title[1] if title else "", metadata if isinstance(metadata, dict) else {}, sections)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_generated(path: Path) -> bool:
    """Whether a card is as this library wrote it: one that was changed, or was never ours, is its author's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARKED.search(text)
    return mark is not None and _digest(_MARKED.sub("", text, count=1)) == mark[1]


def write_card(folder: Path, card: ModelCard) -> bool:
    """Write the card of a model; one that somebody wrote or changed stays, and that is said.

    Returns:
        Whether it was written.
    """
    path = folder / CARD
    if path.exists() and not is_generated(path):
        logger.warning(
            "%s was written or changed by somebody, and stays as it is: it may not fit the model that is saved beside "
            "it; the card of this one is written once that file is moved away", path
        )  # fmt: skip
        return False
    write_text(path, card.to_markdown())
    return True


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def one_line(text: object) -> str:
    """A text that begins no line of its own, and so no heading, list or table."""
    return " ".join(str(text).split())


def quote(name: object) -> str:
    """A name from a file or a flag as code of Markdown, which it cannot end."""
    return f"`{one_line(name).replace('`', chr(39))}`"


def fence(language: str, text: str) -> str:
    """A block of code, behind more backticks than there are in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    marks = "`" * max(longest + 1, 3)
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def python(code: str) -> str:
    """A piece of Python as a block of Markdown."""
    return fence("python", code)


def bare_name(source: object) -> str:
    """What a card says of where something came from: a hub's name as it is, of a path its last part."""
    text = str(source).rstrip("/\\")
    # A folder of the machine that trained the model tells a reader nothing but what its owner did not mean to tell.
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not Path(text).exists()
    return text if is_hub_name else re.split(r"[/\\]", text)[-1]


# The cards of exports.

_SNIPPETS = {
    "text": """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
""",
    "multimodal": """
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)
inputs = processor(images=Image.open("photo.jpg"), text="<image>", return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=32), skip_special_tokens=True)[0])
""",
    "llava_hf": """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({name})
model = AutoModelForImageTextToText.from_pretrained({name})
inputs = processor(images=Image.open("photo.jpg"), text="<image>", return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=32), skip_special_tokens=True)[0])
""",
}
_PIPELINES = {"text": "text-generation", "multimodal": "image-text-to-text", "llava_hf": "image-text-to-text"}
_KINDS = {
    "text": "The language model alone of a checkpoint of llava, as a plain one of transformers.",
    "multimodal": "A checkpoint of llava as a folder with its own code, for `trust_remote_code`.",
    "llava_hf": "A checkpoint of llava as transformers' own `LlavaForConditionalGeneration`.",
}


def describe_export(name: str, kind: str, checkpoint: Path, done: Sequence[str]) -> ModelCard:
    """The card of an export, with what its checkpoint's card says of data, recipe, parts and scores.

    Args:
        name: of the export's folder.
        kind: ``text``, ``multimodal`` or ``llava_hf``.
        checkpoint: what was exported.
        done: what was done to it, a line each.
    """
    before = ModelCard.read(checkpoint) or ModelCard("")
    kept: Mapping[str, Any] = {key: before.metadata.get(key) for key in ("license", "language", "base_model")}
    tags = ["llava", *(["custom_code"] if kind == "multimodal" else [])]
    metadata = {**kept, "library_name": "transformers", "pipeline_tag": _PIPELINES[kind], "tags": tags}
    what = "\n".join([_KINDS[kind], "", *(f"- {_without_paths(line)}" for line in done)])
    prompt = "Il" if kept["language"] in ("it", ["it"]) else "The"
    snippet = python(_SNIPPETS[kind].format(name=json.dumps(name, ensure_ascii=False), prompt=prompt))
    others = {heading: text for heading, text in before.sections.items() if heading != LOADING}
    return ModelCard(name, metadata, {"What this is": what, LOADING: snippet, **others})


def _without_paths(line: str) -> str:
    return re.sub(r"(?<![\w.])/(?:[^\s/,;:]+/)+([^\s/,;:]+)", r"\1", line)
