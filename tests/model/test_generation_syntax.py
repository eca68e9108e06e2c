"""Generation keeps to the syntax of boxes and spans, whatever the model would rather write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fond import Fond
from grounded_tokenizers import KINDS, add_coordinates, build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from llava.config import GroundingConfig
from llava.grounding.syntax import bin_tokens, parse_boxes, parse_spans
from llava.model.generation import CoordinateSyntax

BOX = "<WIDTH-001><HEIGHT-002><WIDTH-003><HEIGHT-004>"
SPAN = "<TEMP-001><TEMP-006>"
WHOLE = re.compile(r"\[(<WIDTH-\d{3}><HEIGHT-\d{3}>){2}\s?\]|\{(<TEMP-\d{3}>){2}\s?\}")
BEGUN = re.compile(r"(\[(<(WIDTH|HEIGHT)-\d{3}>){0,4}|\{(<TEMP-\d{3}>){0,2})$")


@pytest.fixture(params=KINDS)
def grounded(request, tokenizer_dir: Path):
    """A tokenizer and what its coordinates are."""
    tokenizer = build_tokenizer(request.param, tokenizer_dir)
    return tokenizer, add_coordinates(tokenizer)


@pytest.fixture
def byte_level(tokenizer_dir: Path):
    tokenizer = build_tokenizer("byte-level", tokenizer_dir)
    return tokenizer, add_coordinates(tokenizer)


def allowed_after(text: str, tokenizer, grounding: GroundingConfig) -> list[str]:
    """The tokens that may follow a text."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    scores = CoordinateSyntax(tokenizer, grounding)(ids, torch.zeros(1, len(tokenizer)))
    assert set(scores.unique().tolist()) <= {0.0, float("-inf")}
    return tokenizer.convert_ids_to_tokens(scores[0].isfinite().nonzero()[:, 0].tolist())


def bins_of(axis: str, number: int) -> list[str]:
    return [f"<{axis}-{i:03d}>" for i in range(number)]


@pytest.mark.parametrize(
    ("text", "axis", "number"),
    [
        ("il gatto [", "WIDTH", 5),
        ("[<WIDTH-001>", "HEIGHT", 5),
        ("[<WIDTH-001><HEIGHT-002>", "WIDTH", 5),
        ("il [<WIDTH-001><HEIGHT-002><WIDTH-003>", "HEIGHT", 5),
        ("[<WIDTH-INPUT>", "HEIGHT", 5),
    ],
)
def test_a_box_goes_on_with_bins_of_the_right_kind(grounded, text: str, axis: str, number: int) -> None:
    assert allowed_after(text, *grounded) == bins_of(axis, number)


@pytest.mark.parametrize("text", ["il gatto {", "{<TEMP-001>"])
def test_a_span_goes_on_with_times(tokenizer_dir: Path, text: str) -> None:
    for kind in ("byte-level", "pieces", "bytes"):
        tokenizer = build_tokenizer(kind, tokenizer_dir)
        assert allowed_after(text, tokenizer, add_coordinates(tokenizer)) == bins_of("TEMP", 7)


def test_a_box_and_a_span_are_closed(tokenizer_dir: Path) -> None:
    closing = {"byte-level": "{}", "pieces": "▁{} {} <0x5D>", "bytes": "<0x5D>"}
    for kind in closing:
        tokenizer = build_tokenizer(kind, tokenizer_dir)
        grounding = add_coordinates(tokenizer)
        for text, bracket in ((f"[{BOX}", "]"), (f"il {{{SPAN}", "}")):
            wanted = closing[kind].replace("{}", bracket).replace("5D", f"{ord(bracket):02X}").split()
            assert sorted(allowed_after(text, tokenizer, grounding)) == sorted(wanted)


@pytest.mark.parametrize("text", ["il gatto", f"il [{BOX}] dorme", f"{BOX}", "<WIDTH-001>", f"[il {BOX}", SPAN])
def test_no_bin_stands_elsewhere(grounded, text: str) -> None:
    tokenizer, grounding = grounded
    allowed = allowed_after(text, tokenizer, grounding)
    assert not set(allowed) & set(bin_tokens(grounding))
    assert len(allowed) == len(tokenizer) - grounding.total_bins


def test_without_a_closing_bracket_anything_but_a_bin_closes(tokenizer_dir: Path) -> None:
    tokenizer = build_tokenizer("words", tokenizer_dir)
    grounding = add_coordinates(tokenizer)
    assert len(allowed_after(f"[{BOX}", tokenizer, grounding)) == len(tokenizer) - grounding.total_bins


def test_one_token_may_close_a_box_and_open_another(tokenizer_dir: Path) -> None:
    tokenizer = build_tokenizer("byte-level", tokenizer_dir)
    tokenizer.add_tokens(["]["])
    grounding = add_coordinates(tokenizer)
    assert "][" in allowed_after(f"[{BOX}", tokenizer, grounding)
    assert allowed_after(f"[{BOX}][", tokenizer, grounding) == bins_of("WIDTH", 5)


def test_white_space_belongs_to_brackets(tokenizer_dir: Path) -> None:
    tokenizer = build_tokenizer("byte-level", tokenizer_dir)
    tokenizer.add_tokens([" ]", "[ "])
    grounding = add_coordinates(tokenizer)
    assert " ]" in allowed_after(f"[{BOX}", tokenizer, grounding)
    assert allowed_after("il[ ", tokenizer, grounding) == bins_of("WIDTH", 5)


def test_special_tokens_are_no_brackets(tokenizer_dir: Path) -> None:
    tokenizer = build_tokenizer("byte-level", tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<[", "]>"]})
    grounding = add_coordinates(tokenizer)
    assert len(allowed_after("<[", tokenizer, grounding)) == len(tokenizer) - grounding.total_bins
    assert "]>" not in allowed_after(f"[{BOX}", tokenizer, grounding)


def test_rows_do_not_know_each_other_nor_their_padding(byte_level) -> None:
    tokenizer, grounding = byte_level
    syntax = CoordinateSyntax(tokenizer, grounding)
    texts = ["[", "il gatto [<WIDTH-001>", f"[{BOX}", f"{{{SPAN}", "il", f"una stella gialla [{BOX}] dorme ["]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
    scores = torch.randn(len(rows), len(tokenizer), generator=torch.Generator().manual_seed(0))
    together = syntax(padded, scores)
    for i, row in enumerate(rows):
        assert torch.equal(together[i : i + 1], syntax(torch.tensor([row]), scores[i : i + 1]))
    assert [syntax.count_open(row) for row in rows] == [1, 2, 5, 3, 0, 1]
    assert syntax.count_open([]) == 0


def test_scores_of_another_vocabulary_are_refused(byte_level) -> None:
    tokenizer, grounding = byte_level
    with pytest.raises(ValueError, match="scores 12 tokens"):
        CoordinateSyntax(tokenizer, grounding)(torch.tensor([[0]]), torch.zeros(1, 12))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 3},
        {"do_sample": True, "num_return_sequences": 4},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "do_sample": True},
    ],
    ids=["greedy", "top-k", "sampling", "beams", "sampled beams"],
)
def test_whatever_is_generated_parses(byte_level, options: dict) -> None:
    tokenizer, grounding = byte_level
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    brackets = [tokenizer.convert_tokens_to_ids(bracket) for bracket in "[{"]
    bins = list(range(grounding.first_bin, len(tokenizer)))
    # Brackets begin a box at any place, and bins, the end of text and the next bracket come where they must not.
    fond = [Fond(brackets, 3.0), Fond([*bins, 0], 1.0), CoordinateSyntax(tokenizer, grounding)]
    prompts = tokenizer(
        ["il gatto", "una [<WIDTH-001>", "il {"], padding=True, padding_side="left", return_tensors="pt"
    )
    made = model.generate(**prompts, max_new_tokens=40, logits_processor=fond, pad_token_id=0, **options)
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    found = 0
    for text in texts:
        rest = BEGUN.sub("", WHOLE.sub("", text))
        assert not re.search(r"<(TEMP|WIDTH|HEIGHT)-", rest), text
        found += len(parse_boxes(text, grounding)) + len(parse_spans(text, grounding))
    assert found >= len(texts)
