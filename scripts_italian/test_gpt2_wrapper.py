"""Checks of the GPT-2 wrapper, a line each: ``python scripts_italian/test_gpt2_wrapper.py``.

Runs offline on a tiny GPT-2 and a tiny DINOv2 that are built from configurations in a temporary
folder. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava.command import CommandParser, run_command

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

    from llava.model.loading import LoadedModel

# What a broken wrapper raises: a failed check is a line here, never the end of the run.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
CAPTION = "Un uomo con una maglia nera muove le mani davanti al petto."
TEXTS = [CAPTION, "una stella gialla si muove verso destra", "Il gatto dorme sul divano e il cane guarda la strada."]

Check = Callable[["Bench"], None]
CHECKS: list[tuple[str, Check]] = []


def check(name: str) -> Callable[[Check], Check]:
    """Add a function to the checks, under the name that its line has."""

    def add(function: Check) -> Check:
        CHECKS.append((name, function))
        return function

    return add


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@dataclass(frozen=True)
class Bench:
    """Folders of a plain GPT-2 and of a tower, and ways to make models and batches of them."""

    folder: Path

    @property
    def gpt2(self) -> str:
        return str(self.folder / "gpt2")

    def build(self) -> None:
        """Write tokenizer, language model and tower; the tower's grid is DINOv2's, 16 x 16."""
        from tokenizers import ByteLevelBPETokenizer
        from transformers import Dinov2Config, Dinov2Model, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        end = "<|endoftext|>"
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(TEXTS * 4, vocab_size=320, special_tokens=[end], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end)
        tokenizer.save_pretrained(self.gpt2)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(self.gpt2)
        tower = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4, mlp_ratio=2
        )
        Dinov2Model(tower).save_pretrained(self.folder / "tower")

    def load(self, vision: bool = True) -> LoadedModel:
        """A ``LoadedModel``, in evaluation mode, with the token counts of the Italian recipe."""
        from llava.model.loading import load_model

        settings = {
            "vision_tower": str(self.folder / "tower"), "projector_type": "mlp2x_gelu", "num_frames": 4,
            "resampler_type": "fast_slow_resampler", "perceiver_latents": 81, "perceiver_latents_fast": 9,
            "resampler_width": 32, "resampler_heads": 8,
        }  # fmt: skip
        torch.manual_seed(1)
        loaded = load_model(self.gpt2, **(settings if vision else {}))  # type: ignore[arg-type]
        loaded.model.eval()
        return loaded

    def plain(self) -> GPT2LMHeadModel:
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel.from_pretrained(self.gpt2).eval()

    def encode(self, loaded: LoadedModel, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and labels of samples whose turns are a text with placeholders and the caption."""
        from llava.train.train import preprocess_multimodal, preprocess_plain_lm

        sources = [[{"from": "human", "value": text}, {"from": "gpt", "value": CAPTION}] for text in texts]
        encoded = preprocess_plain_lm(preprocess_multimodal(sources, loaded.vision), loaded.tokenizer, has_image=True)
        return encoded["input_ids"], encoded["labels"]

    def batch(self, loaded: LoadedModel) -> dict[str, Tensor]:
        """A video and a text in one batch, the text padded."""
        from llava.data.collator import SupervisedCollator, model_inputs
        from llava.types import Example, VisualInput

        ids, labels = self.encode(loaded, ["<video>", ""])
        media = [[VisualInput("video", self.frames(4), (64, 64))], []]
        examples = [Example(str(i), *row) for i, row in enumerate(zip(ids, labels, media, strict=True))]
        return model_inputs(SupervisedCollator(loaded.tokenizer.pad_token_id)(examples))

    @staticmethod
    def frames(num_frames: int, seed: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (num_frames, 3, 64, 64), dtype=torch.uint8, generator=generator)


@check("model types are registered")
def check_registered(bench: Bench) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from llava.model import AVAILABLE_MODELS
    from llava.model.language_model.llava_gpt2 import LlavaGPT2Config, LlavaGPT2ForCausalLM

    expect("llava_gpt2" in AVAILABLE_MODELS, f"AVAILABLE_MODELS has only {sorted(AVAILABLE_MODELS)}")
    config = AutoConfig.for_model("llava_gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=9)
    expect(type(config) is LlavaGPT2Config, f"AutoConfig gives {type(config).__name__}")
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expect(type(model) is LlavaGPT2ForCausalLM, f"AutoModelForCausalLM gives {type(model).__name__}")
    expect(type(bench.load().model) is LlavaGPT2ForCausalLM, "load_model chose another class for model type gpt2")


@check("model, embed_tokens and get_model() lead to GPT-2's own parts")
def check_attributes(bench: Bench) -> None:
    model = bench.load().model
    expect(model.get_model() is model.transformer, "get_model() is not transformer")
    expect(model.model is model.transformer, "model is not transformer")
    expect(model.transformer.model is model.transformer, "the decoder's model is not itself")
    expect(model.transformer.embed_tokens is model.transformer.wte, "embed_tokens is not wte")
    expect(model.get_input_embeddings() is model.transformer.wte, "get_input_embeddings() is not wte")


@check("text logits equal GPT2LMHeadModel's exactly")
def check_text_parity(bench: Bench) -> None:
    loaded, plain = bench.load(vision=False), bench.plain()
    ids = torch.randint(0, plain.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        difference = (loaded.model(ids).logits - plain(ids).logits).abs().max().item()
    expect(difference == 0, f"they differ by up to {difference:g}")


@check("a plain checkpoint lacks only multimodal parameters")
def check_new_parameters(bench: Bench) -> None:
    from llava.model.visual import vision_module_of

    new = bench.load().new_parameters
    foreign = [name for name in new if vision_module_of(name) is None]
    expect(not foreign, f"also reported as new: {foreign[:3]}")
    for module in ("mm_projector", "vision_resampler"):
        expect(any(f"{module}." in name for name in new), f"{module} is not reported as new")
    expect(not bench.load(vision=False).new_parameters, "a text model reports new parameters")


@check("the head stays tied and old rows stay as they were when the vocabulary grows")
def check_vocabulary(bench: Bench) -> None:
    model, old = bench.load().model, bench.plain().get_input_embeddings().weight
    new = model.transformer.wte.weight
    expect(model.lm_head.weight is new, "head and embeddings are two tensors")
    expect(len(new) == len(old) + 8, f"{len(old)} rows grew to {len(new)}, expected 8 more")
    expect(torch.equal(new[: len(old)], old), "rows of old tokens changed")
    expect(torch.allclose(new[len(old) :], old.mean(0).expand(8, -1), atol=1e-6), "new rows are not the mean")


@check("<video> is 34 + 322 patches and 4 markers, each overwritten by a feature of its own")
def check_layout(bench: Bench) -> None:
    from llava import constants

    loaded = bench.load()
    ids = bench.encode(loaded, ["<video>"])[0][0]
    tokens = loaded.tokenizer.convert_ids_to_tokens(ids)[:360]
    expected = [constants.VIDEO_START, *[constants.VIDEO_PATCH] * 34, constants.VIDEO_END]
    expected += [constants.SLOW_VIDEO_START, *[constants.VIDEO_PATCH] * 322, constants.SLOW_VIDEO_END]
    expect(tokens == expected, f"found {tokens.count(constants.VIDEO_PATCH)} patches and starts {tokens[:2]}")
    expect(constants.VIDEO_PATCH not in loaded.tokenizer.convert_ids_to_tokens(ids)[360:], "more than 360 positions")
    frames = bench.frames(4)
    with torch.no_grad():
        embedded = loaded.model.embed_multimodal(torch.tensor([ids]), [frames], ["video"])
        features = loaded.model.get_model().encode_media([frames], ["video"])[0]
        text = loaded.model.transformer.wte(torch.tensor(ids[360:]))
    expect(tuple(features.shape) == (360, 32), f"the clip gives features of shape {tuple(features.shape)}")
    expect(torch.equal(embedded[0, :360], features), "the embeddings at the span are not the clip's features")
    expect(torch.equal(embedded[0, 360:], text), "the embeddings behind the span are not the caption's")


@check("labels are the caption and the end of text, never the span")
def check_labels(bench: Bench) -> None:
    from llava.constants import IGNORE_INDEX

    loaded = bench.load()
    ids, labels = (rows[0] for rows in bench.encode(loaded, ["<video>"]))
    expect(labels[:360] == [IGNORE_INDEX] * 360, "positions of the span are supervised")
    expect(labels[360:] == ids[360:], "positions of the caption are not all supervised")
    expect(ids[-1] == loaded.tokenizer.eos_token_id, "the sample does not end with the end of text")
    text = loaded.tokenizer.decode(labels[360:-1]).strip()
    expect(text == CAPTION, f"the labels read {text!r}")


@check("the loss at supervised positions equals the full computation")
def check_loss(bench: Bench) -> None:
    loaded = bench.load()
    batch = bench.batch(loaded)
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = loaded.model(**batch, labels=labels).loss
        logits = loaded.model(**batch).logits[:, :-1].flatten(0, 1)
    full = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    expect(abs(loss - full).item() <= 5e-6, f"{loss.item():.8f} instead of {full.item():.8f}")


@check("gradients reach the projector, the main, slow and fast packer and all of the language model")
def check_gradients(bench: Bench) -> None:
    from llava.train.parts import set_trainable_parts

    loaded = bench.load()
    model = loaded.model.train()
    set_trainable_parts(model, ["mm_mlp_adapter", "mm_vision_resampler", "mm_language_model"])
    model(**bench.batch(loaded)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    expect(not without, f"no gradient at {without[:3]}")
    for part in ("mm_projector", "vision_resampler.main", "vision_resampler.slow", "vision_resampler.fast", "wte"):
        reached = [gradient for name, gradient in gradients.items() if f"{part}." in name]
        expect(any(gradient.any() for gradient in reached), f"{part} has no gradient but zeros")
    new_rows = model.transformer.wte.weight.grad[loaded.vision.visual_token_ids]
    expect(bool(new_rows.any(1).all()), "rows of new tokens have no gradient but zeros")
    tower = [name for name, p in model.named_parameters() if "vision_tower." in name and p.grad is not None]
    expect(not tower, f"the frozen tower has gradients at {tower[:3]}")


@check("save and reload are exact, through AutoModelForCausalLM too")
def check_reload(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM

    from llava.model.loading import load_model

    loaded = bench.load()
    batch = bench.batch(loaded)
    batch.pop("labels")
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder, torch.no_grad():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        before = loaded.model(**batch).logits
        for way, model in (
            ("load_model", load_model(folder).model),
            ("AutoModelForCausalLM", AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)),
        ):
            expect(type(model) is type(loaded.model), f"{way} gives {type(model).__name__}")
            expect(model.lm_head.weight is model.get_input_embeddings().weight, f"{way} unties the head")
            expect(torch.equal(model.eval()(**batch).logits, before), f"{way} changes the logits")


@check("decoding with the cache equals decoding without it")
def check_cache(bench: Bench) -> None:
    loaded = bench.load()
    spread_logits(loaded.model)
    cached, uncached = (generate(bench, loaded, use_cache=use_cache) for use_cache in (True, False))
    expect(torch.equal(cached, uncached), f"{cached.tolist()} with it, {uncached.tolist()} without")
    expect(len(cached.unique()) > 1, "the same token over and over proves nothing")


@check("visual tokens are never generated")
def check_suppressed(bench: Bench) -> None:
    loaded = bench.load()
    visual = torch.tensor(loaded.vision.visual_token_ids)
    # Head and embeddings are tied: a long row along the mean of all states makes a token the likeliest.
    with torch.no_grad():
        loaded.model.transformer.ln_f.bias.fill_(1.0)
        loaded.model.transformer.wte.weight[visual] = 9.0
        ids = torch.tensor([bench.encode(loaded, ["<video>"])[0][0][:-1]])
        logits = loaded.model(ids, images=[bench.frames(4)], modalities=["video"]).logits[0, -1]
    expect(bool(torch.isin(logits.argmax(), visual)), "the check is void: no visual token is the likeliest")
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        new = generate(bench, loaded, **options)
        expect(
            not torch.isin(new, visual).any().item(), f"found one in {new.tolist()} with {options or 'greedy search'}"
        )


@check("a batch of text alone never calls the tower")
def check_text_batch(bench: Bench) -> None:
    loaded = bench.load()
    calls: list[int] = []
    loaded.model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    batch = bench.batch(loaded)
    text = {name: batch[name][1:] for name in ("input_ids", "labels", "attention_mask")}
    loaded.model(**text).loss.backward()
    expect(not calls, f"it was called {len(calls)} times")
    loaded.model(**batch)
    expect(len(calls) == 1, f"a batch with a video called it {len(calls)} times, expected 1")


def spread_logits(model: nn.Module) -> None:
    """Give a model of tiny random weights something to say: larger ones, so that tokens differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("transformer.") and parameter.ndim == 2 and "vision_tower" not in name:
                parameter.mul_(4)


def generate(bench: Bench, loaded: LoadedModel, **options: object) -> Tensor:
    """Twelve new tokens for each of two clips."""
    torch.manual_seed(4)
    span = bench.encode(loaded, ["<video>"])[0][0][:363]
    clips = [bench.frames(4, seed) for seed in (5, 6)]
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    ids = torch.tensor([span, span])
    mask = torch.ones_like(ids)
    output = loaded.model.generate(ids, attention_mask=mask, images=clips, modalities=["video"] * 2, **options)
    return output[:, ids.shape[1] :]


def run_checks(checks: Sequence[tuple[str, Check]], bench: Bench) -> int:
    """Run the checks and print a line for each; returns how many failed."""
    failed = 0
    for name, function in checks:
        try:
            function(bench)
        except FAILURES as error:
            failed += 1
            reason = " ".join(str(error).split())
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            print(f"FAIL  {name}: {kind}{reason}", flush=True)
        else:
            print(f"pass  {name}", flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; returns the exit status: 1 if one failed, 2 for a wrong command line."""
    parser = CommandParser(
        description="Check the GPT-2 wrapper on a tiny model, offline; prints a pass or FAIL line for each property.",
    )

    def run() -> int:
        parser.parse_args(argv)
        return check_wrapper()

    return run_command(run)


def check_wrapper() -> int:
    """Build the bench in a temporary folder and run all checks; returns 1 if one failed."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Models as tiny as these lose time to threads, much of it where other programs run.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            bench.build()
            failed = run_checks(CHECKS, bench)
    finally:
        torch.set_num_threads(threads)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
