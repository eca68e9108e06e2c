"""Likelihood scores equal those of a plain model that reads one sentence at a time."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

from llava.data.formats import build_format
from llava.data.media import load_media
from llava.data.placeholders import expand_placeholders
from llava.eval.likelihood import Candidate, Choice, LikelihoodScorer
from llava.eval.parallel import ParallelScorer, ScorerSource, ScoreShare, cut_evenly
from llava.io import read_json_lines
from llava.types import Media, Turn
from tests.conftest import FAMILIES, ITALIAN


def plain_scores(folder: Path, choices: list[Choice]) -> list[tuple[float, ...]]:
    """Each candidate alone, in float64, by transformers' own class."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(candidate: Candidate) -> float:
        encoded = tokenizer(candidate.text, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        by_token = log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return math.fsum(
            value
            for value, (_, end) in zip(by_token, encoded["offset_mapping"][1:], strict=True)
            if end > candidate.start
        )

    return [tuple(map(score, choice.candidates)) for choice in choices]


CHOICES = [
    *(
        Choice(f"pair-{i}", (Candidate(text), Candidate(text.replace(" e ", " o "), 4), Candidate(text + " Sì")))
        for i, text in enumerate(ITALIAN)
    ),
    Choice("same", (Candidate(ITALIAN[0]), Candidate(ITALIAN[0]))),
    Choice("end", (Candidate("una stella gialla", 11), Candidate("una stella muove", 11))),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_those_of_one_sentence_at_a_time(backbone_dirs, name: str) -> None:
    folder = backbone_dirs[name]
    scored: list[int] = []
    found = LikelihoodScorer.from_folder(str(folder), device="cpu").score(CHOICES, scored.append)
    expected = plain_scores(folder, CHOICES)
    assert sum(scored) == len(CHOICES)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-4)
    assert found[5][0] == found[5][1]


def test_branches_of_a_tree_see_what_they_share_behind_a_window(gpt2_dir: Path, tmp_path: Path) -> None:
    """GPT-Neo's local layers count the positions of other branches."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, window_size=48,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=128,
    )  # fmt: skip
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    endings = ["sì", "no", "la casa gialla", "due uomini e un cane", "una stella", "poi", "qui", "ora dorme", "il mare"]
    choices = [
        Choice(f"{i}", tuple(Candidate(f"{ITALIAN[0][:24]} {start} {end}") for end in endings))
        for i, start in enumerate(("un", "una", "il", "la", "gli", "le"))
    ]
    found = LikelihoodScorer.from_folder(str(tmp_path), device="cpu").score(choices)
    for one, other in zip(found, plain_scores(tmp_path, choices), strict=True):
        assert one == pytest.approx(other, abs=2e-4)


# With images and clips.


def save_multimodal(loaded, folder: Path) -> str:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def shown_scores(model, tokenizer, choice: Choice) -> list[float]:
    """Each candidate alone behind its media, as plain_lm writes a training sample, through the model's own forward."""
    media = [load_media(one, model.vision) for one in choice.media]
    kinds = {"image": "<image>", "video": "<video>"}
    scores = []
    for candidate in choice.candidates:
        words = "".join(f" {kinds[one.kind]}" for one in choice.media).strip()
        turns = expand_placeholders(
            [Turn("user", words), Turn("assistant", candidate.text)],
            model.vision,
            [len(one.frames) for one in media if one.kind == "video"],
            [one.original_size for one in media if one.kind == "image"],
        )
        segments = build_format("plain_lm", tokenizer).encode(turns)
        ids = torch.tensor([[i for segment in segments for i in segment.ids][:-1]])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                images=[one.frames for one in media],
                modalities=[one.kind for one in media],
                image_sizes=[one.original_size for one in media],
            ).logits
        log_probs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        count = len(tokenizer(" " + candidate.text[candidate.start :].lstrip(), add_special_tokens=False).input_ids)
        scores.append(log_probs[-count:].sum().item())
    return scores


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("llava_gpt2", "base"),
        ("llava_llama", "alternating"),
        ("llava_gpt2", "alternating_cross"),
        ("llava_mpt", "base"),
    ],
)
def test_scores_with_media_equal_those_of_each_candidate_alone(
    load_tiny, media_dir: Path, tmp_path: Path, name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_multimodal(load_tiny(name, variant=variant), tmp_path / "model")
    scorer = LikelihoodScorer.from_folder(folder, device="cpu")
    image, clip = Media("image", str(media_dir / "a.png")), Media("video", str(media_dir / "a.mp4"))
    choices = [
        Choice("one", (Candidate("una stella gialla"), Candidate("il gatto dorme")), (image,)),
        Choice("text", (Candidate("una stella gialla"), Candidate("il gatto dorme"))),
        Choice("clip", (Candidate("cosa? un gatto", 5), Candidate("cosa? una ragazza", 5)), (clip,)),
        Choice("both", (Candidate("una stella"), Candidate("il gatto")), (clip, image)),
        Choice("again", (Candidate("il gatto dorme"), Candidate("una stella"), Candidate("un uomo")), (image,)),
    ]
    calls: list[int] = []
    tower = scorer.model.get_vision_tower()
    tower.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    found = scorer.score(choices)
    assert calls == [1 + 3], "each image and clip goes through the tower once"
    for choice, one in zip(choices, found, strict=True):
        if choice.media:
            assert one == pytest.approx(shown_scores(scorer.model, scorer.tokenizer, choice), abs=2e-4), choice.id
    assert found[0][1] == pytest.approx(found[4][0], abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-2), "the image changes what is probable"


# What could go wrong silently, and what is said of bad input.


def test_a_model_in_memory_is_left_as_it_was_and_near_ties_agree_with_float64(gpt2_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=torch.bfloat16).train()
    model.transformer.h[0].eval()
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, config, random = [m.training for m in model.modules()], model.config.to_dict(), torch.get_rng_state()
    scorer = LikelihoodScorer(model, tokenizer)
    found = scorer.score(CHOICES)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    # Everything is near: all scores become those of float64.
    scorer._near_ties.share = 1.0
    settled = scorer.score(CHOICES)
    exact = LikelihoodScorer(model, tokenizer, dtype=torch.float64).score(CHOICES)
    assert [s for one in settled for s in one] == pytest.approx([s for one in exact for s in one], abs=1e-9)
    assert [s for one in found for s in one] == pytest.approx([s for one in exact for s in one], abs=2e-4)


def test_constant_logits_are_ties_and_infinite_ones_an_error(gpt2_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    model.transformer.ln_f.weight.data.zero_()  # The head's logits are all 0.
    pairs = [
        Choice(str(i), (Candidate(f"{a} dorme"), Candidate(f"{b} dorme"))) for i, (a, b) in enumerate(["xy", "zq"])
    ]
    assert all(one == other for one, other in LikelihoodScorer(model, tokenizer).score(pairs))
    model.transformer.ln_f.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"item '0': .*no finite numbers"):
        LikelihoodScorer(model, tokenizer).score(pairs)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice("a", (Candidate("ciao " * 600),), source="f.jsonl, line 3"), r"f.jsonl, line 3: .* context .* is 512"),
        (Choice("a", (Candidate("il gatto", 8),), source="f.jsonl, line 4"), "f.jsonl, line 4: no token .* scored"),
        (Choice("a", (Candidate(""),)), "item 'a': no token .* scored"),
        (Choice("a", ()), "item 'a': it has no candidates"),
        (Choice("a", (Candidate("x"),), (Media("image", "/none.png"),)), "reads text alone"),
    ],
)
def test_bad_input_is_one_clear_error(gpt2_dir: Path, choice: Choice, said: str) -> None:
    scorer = LikelihoodScorer.from_folder(str(gpt2_dir), device="cpu")
    with pytest.raises(ValueError, match=said) as error:
        scorer.score([Choice("good", (Candidate(ITALIAN[0]),)), choice])
    assert "\n" not in str(error.value)


def test_shares_of_processes_give_the_scores_of_one(gpt2_dir: Path, tmp_path: Path) -> None:
    # Without the processes, whose start takes longer than all of this file; run_shares has tests of its own.
    expected = LikelihoodScorer.from_folder(str(gpt2_dir), device="cpu").score(CHOICES)
    source, scored = ScorerSource(str(gpt2_dir)), []
    for number, part in enumerate(cut_evenly(CHOICES, 2)):
        share = pickle.loads(pickle.dumps(ScoreShare(source, part, "cpu", tmp_path / f"{number}.jsonl")))
        share.answer(scored.append)
    lines = [line["scores"] for number in range(2) for line in read_json_lines(tmp_path / f"{number}.jsonl")]
    assert [s for one in lines for s in one] == pytest.approx([s for one in expected for s in one], abs=1e-4)
    assert sum(scored) == len(CHOICES)
    assert ParallelScorer(source, ["cpu"]).score(CHOICES) == expected
    assert [len(part) for part in cut_evenly(CHOICES[:2], 5)] == [1, 1]
