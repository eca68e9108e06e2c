"""What the targets draw from: texts, JSON, samples in all spellings, damaged bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "[INST]", "</s>", "<s>",
    "<0x41>", "USER: ", "ASSISTANT: ", "{text}", "{eos}", "{{ 7 * 7 }}", "{% for %}", "@@turn0@@", "@@turn1@@", "\\",
    "<", "<image", "image>", "▁", "Ġ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u0085", "\u200b",
    "\ufeff", "\x00", "\x1b[31m", "\x7f", "e\u0301", "ﷺ", "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\u202e", "𝔞",
    "ß", "İ", "perché", "gatto", "una stella",
)  # fmt: skip
_COORDINATES = ("<WIDTH-INPUT>", "<HEIGHT-OUTPUT>", "<TEMP-INPUT>", "[<WIDTH-OUTPUT><HEIGHT-OUTPUT>]", "<WIDTH-012>")
_MEDIA = ("<image>", "<video>", "\\<image>", "\\<video>", "\\\\<image>", "<im_start>", "<im_patch>", "<vid_end>")
_BROKEN = ("\ud83d", "\udc00")

whole_characters = st.characters(exclude_categories=["Cs"])
words = st.one_of(
    st.sampled_from(_SPECIAL), st.text("abcdeàèì <>\\ \n", max_size=6), st.text(whole_characters, max_size=5)
)
plain_texts = st.lists(words, max_size=7).map("".join)
"""Texts without media, visual tokens and coordinates (by the filter of whoever needs to be sure)."""
any_texts = st.lists(st.one_of(words, st.sampled_from(_COORDINATES + _MEDIA + _BROKEN)), max_size=7).map("".join)
long_texts = st.tuples(
    st.sampled_from(("a", "gatto ", "\n", "<|endoftext|>", "é", "\U0001f600 ")), st.integers(1, 20_000)
).map(lambda pair: (pair[0] * pair[1])[:60_000])

numbers = st.one_of(
    st.integers(-3, 10), st.integers(), st.floats(), st.sampled_from((10**400, -(10**30), 2**63, 1e308, 0.1, 1.0, -0.0))
)
_KEYS = (
    "id", "conversations", "messages", "conversation", "image", "images", "video", "videos", "from", "value", "role",
    "content", "type", "text", "image_url", "url", "bytes", "path", "variables", "meta", "split", "fps", "source",
    "frames", "temporal_input_locations", "spatial_width_output_locations", "Image", "img_path", "label", "data",
)  # fmt: skip
_VALUES = (
    "human", "gpt", "user", "assistant", "system", "a.png", "b.mp4", "../c.png", "/etc/passwd",
    "data:image/png;base64,AA==", "data:image/png;base64,A", "http://x/y.png", "file:///a.png", "<image>", "<video>",
    "text", "image", "image_url", "",
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(_VALUES), any_texts)


def _grow(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(_KEYS), st.text(max_size=4)), inner, max_size=5),
    )


json_values = st.recursive(leaves, _grow, max_leaves=12)

_turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "from": st.sampled_from(("human", "gpt", "system", "User")),
            "role": st.sampled_from(("user", "assistant")),
            "value": st.one_of(any_texts, json_values),
            "content": st.one_of(any_texts, json_values),
            "image": st.one_of(st.just("a.png"), json_values),
            "weight": numbers,
        },
    ),
    max_size=3,
)
loose_samples = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {"conversations": st.one_of(_turns, _turns, json_values)},
        optional={
            "id": st.one_of(st.text(max_size=5), numbers, st.none()),
            "image": st.one_of(st.just("a.png"), json_values),
            "video": st.one_of(
                st.just("b.mp4"), st.lists(st.sampled_from(("a.png", "b.mp4")), max_size=3), json_values
            ),
            "variables": st.dictionaries(
                st.sampled_from(("temporal_input_locations", "spatial_width_input_locations", "x")),
                st.one_of(st.lists(numbers, max_size=3), json_values),
                max_size=2,
            ),
            "meta": st.one_of(st.fixed_dictionaries({}, optional={"split": json_values, "fps": leaves}), json_values),
            "source": leaves,
            "messages": _turns,
            "frames": json_values,
            "caption": any_texts,
        },
    ),
)
"""Samples that are mostly wrong, in the ways of people and of attackers."""


# Samples that are right, each written in one of the spellings of the field.

_TAKEN = ("<image>", "<video>", "<im_", "<vid_", "<slow_vid", "-INPUT>", "-OUTPUT>")


def is_free(text: str) -> bool:
    """Whether a text says nothing of media or coordinates, wherever it is put."""
    return not any(taken in text for taken in _TAKEN) and not text.endswith("\\")


free_texts = plain_texts.filter(is_free)


@st.composite
def conversations(draw: DrawFn) -> list[tuple[str, list[tuple[str, str]]]]:
    """Turns of a role and pieces: ("text", words), ("image", path) or ("video", path)."""
    turns, number = [], 0
    for place in range(draw(st.integers(1, 4))):
        pieces: list[tuple[str, str]] = []
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(("text", "text", "text", "image", "video")))
            if kind == "text":
                pieces.append((kind, draw(free_texts)))
            else:
                number += 1
                pieces.append((kind, f"{number}{'.png' if kind == 'image' else '.mp4'}"))
        joined = "".join(f"<{kind}>" if kind != "text" else words for kind, words in pieces)
        free = "".join(words for kind, words in pieces if kind == "text")
        # What two texts make together, or a text and a placeholder, is no longer what the pieces are.
        if joined.count("<image>") + joined.count("<video>") != sum(
            kind != "text" for kind, _ in pieces
        ) or not is_free(free):
            pieces = [piece for piece in pieces if piece[0] != "text"]
        turns.append((("user", "assistant")[place % 2], pieces))
    return turns


_ROLE_NAMES = {"user": ("human", "user"), "assistant": ("gpt", "assistant"), "system": ("system",)}


@st.composite
def spelled(draw: DrawFn, turns: list[tuple[str, list[tuple[str, str]]]]) -> dict[str, Any]:
    """A sample that says what turns say, in one of the spellings that are read."""
    role_key, text_key = draw(st.sampled_from((("from", "value"), ("role", "content"))))
    where = draw(st.sampled_from(("sample", "turn", "parts")))
    sample: dict[str, Any] = {}
    if draw(st.booleans()):
        sample["id"] = draw(st.one_of(st.text(whole_characters, min_size=1, max_size=6), st.integers(0, 10**6)))
    written: list[dict[str, Any]] = []
    media: dict[str, list[str]] = {"image": [], "video": []}
    for role, pieces in turns:
        turn: dict[str, Any] = {role_key: draw(st.sampled_from(_ROLE_NAMES[role]))}
        own: dict[str, list[str]] = {"image": [], "video": []}
        if where == "parts" and pieces:
            turn[text_key] = [
                {"type": "text", "text": words} if kind == "text"
                else draw(st.sampled_from((
                    {"type": kind, kind: words}, {"type": kind, "path": words}, {kind: words},
                    {"type": f"{kind}_url", f"{kind}_url": {"url": words}},
                )))
                for kind, words in pieces
            ]  # fmt: skip
        else:
            turn[text_key] = "".join(f"<{kind}>" if kind != "text" else words for kind, words in pieces)
            for kind, words in pieces:
                if kind != "text":
                    (own if where == "turn" else media)[kind].append(words)
        for kind, paths in own.items():
            if paths:
                turn[draw(st.sampled_from((kind, f"{kind}s")))] = paths
        written.append(turn)
    for kind, paths in media.items():
        if paths:
            single = len(paths) == 1 and draw(st.booleans())
            sample[draw(st.sampled_from((kind, f"{kind}s")))] = paths[0] if single else paths
        elif draw(st.booleans()):
            sample[kind] = draw(st.sampled_from((None, [])))
    sample[draw(st.sampled_from(("conversations", "messages", "conversation")))] = written
    if draw(st.booleans()):
        sample[draw(st.sampled_from(("caption_language", "language", "score")))] = draw(
            st.one_of(st.integers(), st.text(max_size=3))
        )
    return sample


# Bytes that were damaged.


@st.composite
def damaged(draw: DrawFn, data: bytes, most: int = 4) -> bytes:
    """Bytes after some bit flips, cuts, insertions, zeros, stretches that change places or are there twice."""
    for _ in range(draw(st.integers(1, most))):
        if not data:
            return data
        way = draw(st.sampled_from(("flip", "byte", "cut", "drop", "insert", "zeros", "swap", "twice")))
        start = draw(st.integers(0, len(data) - 1))
        length = draw(st.one_of(st.integers(1, 8), st.integers(1, max(len(data) // 3, 1))))
        end = min(start + length, len(data))
        if way == "flip":
            data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
        elif way == "byte":
            data = data[:start] + bytes([draw(st.integers(0, 255))]) + data[start + 1 :]
        elif way == "cut":
            data = data[:start]
        elif way == "drop":
            data = data[:start] + data[end:]
        elif way == "insert":
            data = data[:start] + draw(st.binary(max_size=16)) + data[start:]
        elif way == "zeros":
            data = data[:start] + bytes(end - start) + data[end:]
        elif way == "swap":
            behind = min(end + (end - start), len(data))
            data = data[:start] + data[end:behind] + data[start:end] + data[behind:]
        else:
            data = data[:end] + data[start:end] + data[end:]
    return data
