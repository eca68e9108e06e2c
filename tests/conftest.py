"""Tiny models, tokenizers and media, made offline from configurations and seeds."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from warm_python import WarmPython

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("LLAVA_SHARED_DATA", ROOT.parent / "shared" / "data"))

# Tiny tensors gain nothing from threads, and tests run side by side.
torch.set_num_threads(1)

# An encoder of a clip that a test wrote is garbage with threads of its own. A forked worker has none of these threads,
# and would wait for them for ever when it collects the garbage: so it is collected before.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gc.collect)


def define_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision, which timm needs, be imported beside a torch that it was not built for.

    Its compiled operators are then missing (CUDA wheels beside a CPU torch), and with them two names that
    it looks up on import. No test calls them. The library must be kept: it goes when its object does.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


TORCHVISION_OPERATORS = define_torchvision_operators() if importlib.util.find_spec("timm") else None


SLOWEST = (
    "train/test_mixed_ranks.py", "train/test_training.py", "faults/test_elastic.py", "faults/test_watchdog.py",
    "faults/test_kill.py", "train/test_data_order.py", "train/test_verify.py", "train/test_slurm.py",
    "train/test_sharding.py", "scripts_italian/test_italian_shell.py", "model/test_llava_arch.py",
    "data/test_video_frames.py",
    "model/language_model/test_families.py", "eval/test_eval_run.py", "train/test_feature_cache_training.py",
    "model/language_model/test_alternating.py", "faults/test_early_signals.py", "model/test_lora.py",
    "model/test_backbones.py", "train/test_transformers_flags.py", "train/test_resuming.py",
    "train/test_predictions.py", "model/test_packing.py", "faults/test_two_rank_runs.py",
    "faults/test_storage.py",
)  # fmt: skip
"""Files that take 8 s or more: they are run first, so that no process waits for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """What is there once all tests are collected stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache_dir(tmp_path_factory: pytest.TempPathFactory):
    """Indexes of the tests' data files, those of the commands they start included, stay out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session")
def warm_python(own_cache_dir: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python for programs that tests start as processes: it has the large packages imported."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    warm = WarmPython(folder)
    yield warm.path
    warm.close()


@pytest.fixture(scope="session")
def server(warm_python: str) -> Iterator[object]:
    """The fork server of ``faults/runs.py``: runs in processes of their own, which have all of training imported."""
    server = load_script("tests/faults/runs.py").ForkServer(warm_python)
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real media; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}; set LLAVA_SHARED_DATA")
    return SHARED_DATA


COMMITTED_VIDEO = Path(__file__).parent / "media" / "video"
"""Real clips that every clone has (their sources stand in ``media/NOTICE``)."""


ITALIAN = [
    "Un uomo con una maglia nera muove le mani davanti al petto.",
    "Una ragazza con un maglione giallo unisce le mani e le apre.",
    "Un ragazzo in maglietta grigia porta una mano alla bocca.",
    "una stella gialla si muove verso destra",
    "Il gatto dorme sul divano e il cane guarda la strada.",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of GPT-2's kind, with one special token: the end of text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(ITALIAN * 4, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path):
    """A fresh copy of the tokenizer without visual tokens."""
    from llava.model.vocabulary import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


_LLAMA_LIKE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = 12
"""How far layers with a sliding window see: less than a video takes."""
_GEMMA = _LLAMA_LIKE | {
    "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "tie_word_embeddings": True,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}

TINY_BACKBONES: dict[str, tuple[str, dict]] = {
    "llava_gpt2": ("gpt2", {
        "n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
    "llava_llama": ("llama", _LLAMA_LIKE),
    "llava_mistral": ("mistral", _LLAMA_LIKE | {"sliding_window": None}),
    "llava_mixtral": ("mixtral", _LLAMA_LIKE | _EXPERTS | {"num_local_experts": 4}),
    "llava_qwen": ("qwen2", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "llava_qwen_moe": ("qwen2_moe", _LLAMA_LIKE | _EXPERTS | {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    }),
    "llava_gemma": ("gemma", _LLAMA_LIKE | {"head_dim": 8, "tie_word_embeddings": True}),
    "llava_mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "llava_opt": ("opt", {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "word_embed_proj_dim": 24, "dropout": 0.0, "attention_dropout": 0.0,
    }),
    "llava_gpt_neox": ("gpt_neox", {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "rotary_pct": 0.5,
    }),
    "llava_qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 16, "tie_word_embeddings": True}),
    "llava_phi3": ("phi3", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "llava_smollm3": ("smollm3", _LLAMA_LIKE | {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True}),
    "llava_stablelm": ("stablelm", _LLAMA_LIKE | {"qk_layernorm": True, "use_parallel_residual": True}),
    "llava_olmo": ("olmo", _LLAMA_LIKE | {"clip_qkv": 8.0}),
    "llava_olmo2": ("olmo2", _LLAMA_LIKE),
    "llava_gemma2": ("gemma2", _GEMMA | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0,
    }),
    "llava_gemma3": ("gemma3_text", _GEMMA | {"layer_types": ["full_attention", "sliding_attention"] * 2}),
}  # fmt: skip
"""Plain checkpoints by the backbone that wraps them: model type and settings; 2 layers of width 32, context 512.

Among them are tied and untied heads, embeddings narrower than the layers (OPT), grouped keys and experts. Of the last
eight some layers see the last tokens alone (Phi-3, Gemma 2 and 3), and some logits are capped (Gemma 2).
"""

ROWS = ["llava_qwen3", "llava_phi3", "llava_smollm3", "llava_stablelm", "llava_olmo", "llava_olmo2", "llava_gemma2",
        "llava_gemma3"]  # fmt: skip
"""Families that ``model/language_model/test_families.py`` goes through, and other tests do not."""

FAMILIES = sorted(set(TINY_BACKBONES) - set(ROWS))
"""Families that every test of all backbones goes through."""


class TinyBackbones(dict[str, Path]):
    """Folders of plain checkpoints, each written when it is first asked for."""

    def __init__(self, root: Path, tokenizer_dir: Path, num_layers: int = 2) -> None:
        super().__init__()
        self.root, self.tokenizer_dir, self.num_layers = root, tokenizer_dir, num_layers

    def __missing__(self, name: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        model_type, settings = TINY_BACKBONES[name]
        settings = {
            key: self.num_layers if key in ("n_layer", "n_layers", "num_hidden_layers") else value
            for key, value in settings.items()
        }
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_dir)
        config = AutoConfig.for_model(
            model_type, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings
        )
        torch.manual_seed(list(TINY_BACKBONES).index(name))
        self[name] = self.root / name
        AutoModelForCausalLM.from_config(config).save_pretrained(self[name])
        tokenizer.save_pretrained(self[name])
        return self[name]


@pytest.fixture(scope="session")
def backbone_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> TinyBackbones:
    return TinyBackbones(tmp_path_factory.mktemp("backbones"), tokenizer_dir)


@pytest.fixture(scope="session")
def gpt2_dir(backbone_dirs: TinyBackbones) -> Path:
    """A plain GPT-2 checkpoint, 2 x 32, with a context of 512."""
    return backbone_dirs["llava_gpt2"]


@pytest.fixture(scope="session")
def dropout_dir(gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain GPT-2 that drops values at random while it trains, so that a run depends on random states too."""
    folder = shutil.copytree(gpt2_dir, tmp_path_factory.mktemp("dropout") / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resid_pdrop": 0.2, "embd_pdrop": 0.2}))
    return folder


@pytest.fixture(scope="session")
def llama_dir(backbone_dirs: TinyBackbones) -> Path:
    """A plain Llama checkpoint, 2 x 32, with untied embeddings and a context of 512."""
    return backbone_dirs["llava_llama"]


def make_tower(folder: Path, side: int = 56, patch: int = 14, width: int = 32, layers: int = 3) -> Path:
    """A DINOv2 folder with random weights and a processor configuration."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        mlp_ratio=2,
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": side * 8 // 7},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 tower with a 4 x 4 grid and 3 layers."""
    return make_tower(tmp_path_factory.mktemp("tower"))


TINY_VISION = {
    "resampler_type": "fast_slow_resampler", "perceiver_latents": 9, "perceiver_latents_fast": 4,
    "resampler_width": 32, "resampler_heads": 4, "num_frames": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def load_tiny(backbone_dirs: dict[str, Path], tower_dir: Path):
    """A function that loads a tiny backbone with the tiny tower and a TokenPacker."""
    from llava.model.loading import load_model

    def load(name: str = "llava_gpt2", **changes):
        folder = str(backbone_dirs[name])  # Made at the first asking, with random numbers of its own.
        torch.manual_seed(3)
        return load_model(folder, **{"vision_tower": str(tower_dir), **TINY_VISION, **changes})

    return load


def write_video(path: Path, num_frames: int = 12, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """An H.264 clip of (width, height) whose frames are distinct flat colours with a moving bar."""
    import av

    rng = np.random.default_rng(seed)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        colour = rng.integers(40, 200, 3)
        for i in range(num_frames):
            image = np.full((height, width, 3), colour, np.uint8)
            image[:, i * width // num_frames : (i + 1) * width // num_frames] = 255 - colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips (a.mp4, b.mp4) and two pictures (a.png, b.jpg)."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    for seed, name in enumerate("ab"):
        write_video(folder / f"{name}.mp4", seed=seed)
    rng = np.random.default_rng(5)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def real_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of real clips with Italian captions: that of the real data or, without these, of a committed clip."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA / "real_video_it.json"
    path = tmp_path_factory.mktemp("real") / "videos.json"
    (path.parent / "milk.mkv").write_bytes((COMMITTED_VIDEO / "signs" / "milk.mkv").read_bytes())
    samples = [
        {"id": str(i), "video": "milk.mkv", "conversations": turns("<video>", text)} for i, text in enumerate(ITALIAN)
    ]
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


def load_script(path: str) -> ModuleType:
    """Import a script by its path from the project's root, once."""
    name = Path(path).with_suffix("").as_posix().replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        # dataclasses, and processes that are begun anew, look their module up by name.
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def turns(human: str, assistant: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": assistant}]


@pytest.fixture(scope="session")
def mixed_data(media_dir: Path) -> Path:
    """A data file with two videos, two images, one sample with both and two texts."""
    samples = [
        {"id": "video-a", "video": "a.mp4", "conversations": turns("<video>", ITALIAN[0])},
        {"id": "video-b", "video": "b.mp4", "conversations": turns("<video>", ITALIAN[1])},
        {"id": "image-a", "image": "a.png", "conversations": turns("<image>", ITALIAN[2])},
        {"id": "image-b", "image": "b.jpg", "conversations": turns("<image>", ITALIAN[3])},
        {"id": "both", "image": "a.png", "video": "a.mp4", "conversations": turns("<video> poi <image>", ITALIAN[4])},
        {"id": "text-1", "conversations": turns("", ITALIAN[4])},
        {"id": "text-2", "conversations": turns("", ITALIAN[0])},
    ]
    path = media_dir / "mixed.json"
    path.write_text(json.dumps(samples, ensure_ascii=False))
    return path


@pytest.fixture(scope="session")
def make_batch(mixed_data: Path):
    """A function: rows of ``mixed_data`` as a batch. Media are decoded once for all models that see alike."""
    from llava.data.collator import SupervisedCollator, model_inputs
    from llava.data.dataset import SupervisedDataset
    from llava.data.records import read_records

    records = read_records(str(mixed_data))
    decoded: dict[str, dict] = {}

    def make(loaded, rows: Sequence[int], capacity: int = 0) -> dict:
        dataset = SupervisedDataset(records, loaded.tokenizer, loaded.vision, 512)
        dataset._decoded = decoded.setdefault(repr(loaded.vision), {})
        collator = SupervisedCollator(loaded.tokenizer.pad_token_id, capacity)
        return model_inputs(collator([dataset[i] for i in rows]))

    return make


@pytest.fixture(scope="session")
def visual_tokenizer(tokenizer_dir: Path):
    """The tokenizer with the visual tokens: ids 383 to 390, behind a vocabulary of 383."""
    from llava.model.vocabulary import add_visual_tokens, load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    add_visual_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_vision():
    """The visual side of the tiny models: 56 pixels, a 4 x 4 grid, 3 frames, 12 fast and 27 slow tokens."""
    from llava.config import VisionConfig

    return VisionConfig(
        vision_tower="tiny", vision_config={}, hidden_size=32, image_size=56, patches_per_side=4, image_resize_size=64,
        **TINY_VISION,
    )  # fmt: skip


@pytest.fixture(scope="session")
def italian_vision():
    """The visual side of the Italian recipe: 224 pixels, a 16 x 16 grid, 4 frames, 9 and 81 latents."""
    from llava.config import VisionConfig

    return VisionConfig(
        vision_tower="dinov2", vision_config={}, hidden_size=1024, image_size=224, patches_per_side=16,
        image_resize_size=256, resampler_type="fast_slow_resampler",
    )  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that runs train from here on."""
    from llava.train.trainer import LlavaTrainer

    taken: list[int] = []
    step = LlavaTrainer.training_step

    def counted(self, *words, **named):
        taken.append(self.state.global_step)
        return step(self, *words, **named)

    monkeypatch.setattr(LlavaTrainer, "training_step", counted)
    return taken
