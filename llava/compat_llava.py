"""Names that scripts of the LLaVA family import, each with what it is today: ``docs/migrating.md`` has the table.

The old modules (``llava.mm_utils``, ``llava.conversation``, ...) have no files: ``import`` finds their names here. A
name that cannot be kept is an ImportError that says what to use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX, VISUAL_TOKEN

if TYPE_CHECKING:  # Every script that imports llava loads this module: what is heavy waits for its function.
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, StoppingCriteria

    from llava.config import VisionConfig
    from llava.data.collator import SupervisedCollator
    from llava.data.dataset import SupervisedDataset


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a model's path, with the folder above for a checkpoint. Nothing here goes by it any more."""
    *above, last = model_path.strip("/").split("/")
    return f"{above[-1]}_{last}" if above and last.startswith("checkpoint-") else last


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str = "",
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: object = "auto",
    device: str | None = None,
    torch_dtype: str | None = None,
    attn_implementation: str | None = None,
    overwrite_config: Mapping[str, object] | None = None,
    use_flash_attn: bool = False,
    **kwargs: object,
) -> tuple[PreTrainedTokenizerBase, Any, ImageProcessor | None, int]:
    """A model that is ready to answer. Today: ``llava.model.load_model``, or ``llava.serve.generate.Captioner``.

    Args:
        model_path, model_base: as for ``load_model``; the model's own files say what it is.
        model_name, device_map: not looked at; the model goes to one device.
        load_8bit, load_4bit: hold the language model's linear layers in so many bits.
        device: "cpu", "cuda" or "cuda:1"; by default a GPU if there is one.
        torch_dtype: "float16", "bfloat16" or "float32"; by default float16 on a GPU, as in the family, else float32.
        attn_implementation, use_flash_attn: by default what transformers picks.
        overwrite_config: visual settings in place of the checkpoint's, such as ``mm_spatial_pool_stride``.
        **kwargs: ``multimodal`` is not looked at; another is a TypeError.

    Returns:
        Tokenizer, model, image processor (None for a model of text) and context length. ``generate`` of the model
        takes ids with ``IMAGE_TOKEN_INDEX`` and returns the new tokens alone, both as in the family.
    """
    import torch

    from llava.model.loading import choose_device, load_model
    from llava.model.quantization import Quantization

    kwargs.pop("multimodal", None)
    if kwargs:
        raise TypeError(f"load_pretrained_model does not take {', '.join(kwargs)}; see llava.model.load_model")
    where = choose_device(device)
    dtype = getattr(torch, torch_dtype or ("float16" if where.type == "cuda" else "float32"))
    bits = 4 if load_4bit else 8 if load_8bit else 16
    settings = {name.removeprefix("mm_"): value for name, value in (overwrite_config or {}).items()}
    loaded = load_model(
        model_path,
        model_base=model_base,
        attn_implementation="flash_attention_2" if use_flash_attn else attn_implementation,
        dtype=dtype,
        quantization=None if bits == 16 else Quantization(bits, device=str(where)),
        flag="model_path",
        **settings,  # type: ignore[arg-type] # Fields of VisionConfig, checked there.
    )
    loaded.check_complete(f"model_path {model_path!r}")
    model = loaded.model.to(where).eval()
    model.config.mm_use_im_start_end = False  # Scripts read it; no markers stand in a prompt.
    model.generate = partial(_generate, model, model.generate)  # type: ignore[method-assign]
    processor = None if loaded.vision is None else ImageProcessor(loaded.vision)
    return loaded.tokenizer, model, processor, int(model.config.max_position_embeddings)


def _generate(
    model: Any,
    generate: Callable[..., Any],
    inputs: Tensor | None = None,
    images: list[Tensor] | Tensor | None = None,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    modalities: Sequence[str] = ("image",),
    **kwargs: Any,
) -> Any:
    """``generate`` as the family calls it.

    Args:
        model, generate: its own.
        inputs: int64 (batch, length) with ``IMAGE_TOKEN_INDEX`` where media stand; also ``input_ids``. Without
            ``attention_mask`` all of it counts.
        images: pixels of each, as ``process_images`` gives them.
        image_sizes: (width, height) of each image, as Pillow has it; needed for anyres alone.
        modalities: "image" or "video" of each, or one for all.
        **kwargs: as for ``MultimodalGeneration.generate``.

    Returns:
        int64 (batch, new tokens).
    """
    import torch

    ids, mask = kwargs.pop("input_ids", None) if inputs is None else inputs, kwargs.pop("attention_mask", None)
    if ids is None:  # Embeddings, of which transformers returns the new tokens alone.
        return generate(ids, attention_mask=mask, **kwargs)
    # (frames, 3, side, side) each
    media = [frames if frames.dim() == 4 else frames[None] for frames in (() if images is None else images)]
    kinds = list(modalities) * len(media) if len(modalities) == 1 else list(modalities)
    sizes = [(height, width) for width, height in image_sizes or ()]
    if media and image_sizes is None and model.vision.anyres is not None:
        raise ValueError("generate needs image_sizes, the (width, height) of each image: anyres cuts images by it")
    rows, used = [], 0
    # Padding goes: images take another room in each row, so that the rows are padded anew.
    for row, kept in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True):
        new: list[int] = []
        for token in row[kept.bool()].tolist():
            if token != IMAGE_TOKEN_INDEX:
                new.append(token)
                continue
            if used == len(media):
                raise ValueError(f"the prompts show more images or videos than the {len(media)} that were given")
            size = sizes[used] if sizes and kinds[used] == "image" else None
            span = VISUAL_TOKEN.findall(model.vision.layout.text(kinds[used], len(media[used]), size))
            new += [model.vision.token_ids[token] for token in span]
            used += 1
        rows.append(new)
    if used < len(media):
        raise ValueError(
            f"{len(media)} images or videos were given, but the prompts show {used}; write <image> for each"
        )
    longest, pad = max(map(len, rows)), model.generation_config.pad_token_id or 0
    padded = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    kwargs.setdefault("pad_token_id", pad)
    if media:
        frames = [one.to(model.device) for one in media]
        kwargs |= {"images": frames, "modalities": kinds, "image_sizes": sizes or None}
    out = generate(padded, attention_mask=mask, **kwargs)
    if not torch.is_tensor(out):  # return_dict_in_generate
        out.sequences = out.sequences[:, longest:]
        return out
    return out[:, longest:]


@dataclass(frozen=True)
class ImageProcessor:
    """How pictures are shown to a model. Today: ``llava.data.media.load_image`` and ``fit_frames``.

    Args:
        vision: the visual settings of the model.
    """

    vision: VisionConfig

    @property
    def image_mean(self) -> tuple[float, ...]:
        return self.vision.image_mean

    @property
    def image_std(self) -> tuple[float, ...]:
        return self.vision.image_std

    @property
    def crop_size(self) -> dict[str, int]:
        return {"height": self.vision.image_size, "width": self.vision.image_size}

    size = crop_size

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Tensor]:
        """``pixel_values``: float32 (pictures, 3, side, side), normalised; frames of a clip are pictures."""
        import torch

        from llava.data.media import fit_frames

        if return_tensors not in (None, "pt"):
            raise ValueError(f'return_tensors is {return_tensors!r}; only "pt" is made here')
        pictures = images if isinstance(images, list | tuple) or hasattr(images, "shape") else [images]
        frames = [fit_frames(_to_pixels(picture)[None], self.vision) for picture in pictures]
        return {"pixel_values": self.normalize(torch.cat(frames))}

    __call__ = preprocess

    def normalize(self, frames: Tensor) -> Tensor:
        """uint8 (frames, 3, side, side) to float32, by the tower's mean and standard deviation."""
        import torch

        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (frames.float() / 255 - mean) / std


def _to_pixels(picture: Any) -> Tensor:
    """uint8 (height, width, 3) of a picture of Pillow, or of an array of such pixels."""
    import numpy as np
    import torch

    from llava.data.images import to_rgb

    pixels = np.asarray(to_rgb(picture) if hasattr(picture, "convert") else picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(
            f"a picture must be of Pillow or uint8 (height, width, 3), found {pixels.dtype} {pixels.shape}"
        )
    return torch.from_numpy(pixels.copy())


def process_images(images: Sequence[Image], image_processor: ImageProcessor, model_cfg: object) -> Any:
    """Pixels of pictures as the model's training had them. Today: ``load_model`` and ``Captioner`` do so themselves.

    Args:
        images: of Pillow.
        image_processor: of ``load_pretrained_model``.
        model_cfg: the model's configuration, which settles the aspect ratio.

    Returns:
        float32 (pictures, 3, side, side); under anyres a list of (views, 3, side, side), one tensor where all agree.
    """
    import torch

    from llava.config import VisionConfig
    from llava.data.media import cut_views

    vision = VisionConfig.from_model_config(model_cfg) or image_processor.vision
    if vision.anyres is None:
        return ImageProcessor(vision).preprocess(list(images))["pixel_values"]
    views = [ImageProcessor(vision).normalize(cut_views(_to_pixels(image), vision)) for image in images]
    return torch.stack(views) if len({len(view) for view in views}) == 1 else views


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """Ids of a prompt with ``image_token_index`` for each ``<image>``. Today: ``Captioner``.

    Returns:
        A list, or an int64 tensor (length,) for ``return_tensors="pt"``.
    """
    import torch

    from llava.data.formats.base import prefix_ids

    ids = list(prefix_ids(tokenizer))
    for number, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        ids += ([image_token_index] if number else []) + list(tokenizer(piece, add_special_tokens=False).input_ids)
    return torch.tensor(ids) if return_tensors else ids


def KeywordsStoppingCriteria(  # noqa: N802
    keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: object = None
) -> StoppingCriteria:
    """Ends answers at one of some texts. Today: ``generate(..., stop_strings=[...], tokenizer=tokenizer)``."""
    from transformers.generation import StopStringCriteria

    return StopStringCriteria(tokenizer, list(keywords))


def expand2square(pil_img: Image, background_color: tuple[int, int, int]) -> Image:
    """A picture in the middle of a square of one colour. Today: ``--image_aspect_ratio pad``."""
    from PIL import Image as Pillow

    side = max(pil_img.size)
    square = Pillow.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return square


# Training.


def LazySupervisedDataset(  # noqa: N802
    data_path: str, tokenizer: PreTrainedTokenizerBase, data_args: object, vision_config: VisionConfig | None = None
) -> SupervisedDataset:
    """Samples of data files, read as they are asked for. Today: ``llava.data.module.make_supervised_data_module``.

    Args:
        data_path: as for ``--data_path``.
        tokenizer: of the model.
        data_args: ``llava.train.arguments.DataArguments``.
        vision_config: the model's visual settings; by default those of ``data_args.image_processor``, if there is one.
    """
    from llava.data.dataset import SupervisedDataset
    from llava.data.formats import PLAIN_LM, build_format
    from llava.data.records import read_records

    vision = vision_config or getattr(getattr(data_args, "image_processor", None), "vision", None)
    folders = (getattr(data_args, "image_folder", None), getattr(data_args, "video_folder", None))
    text_format = build_format(getattr(data_args, "version", None) or PLAIN_LM, tokenizer)
    records = read_records(data_path, *folders, allow_duplicate_ids=True)
    return SupervisedDataset(records, tokenizer, vision, tokenizer.model_max_length, text_format=text_format)


def DataCollatorForSupervisedDataset(tokenizer: PreTrainedTokenizerBase) -> SupervisedCollator:  # noqa: N802
    """Makes batches of samples. Today: ``llava.data.collator.SupervisedCollator``."""
    from llava.data.collator import SupervisedCollator

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return SupervisedCollator(int(pad))  # type: ignore[call-overload]


def disable_torch_init() -> None:
    """Does nothing: models are built without random weights that would be overwritten."""


def rank0_print(*args: object) -> None:
    """Prints in the first process alone. Today: Python's ``logging``, which training sets up so."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args)


# The old modules.

OLD_MODULES: dict[str, tuple[str, ...]] = {
    "llava.mm_utils": (
        "tokenizer_image_token", "process_images", "get_model_name_from_path", "KeywordsStoppingCriteria",
        "expand2square",
    ),
    "llava.conversation": ("conv_templates", "default_conversation", "Conversation", "SeparatorStyle"),
    "llava.eval.run_llava": (),
    "llava.utils": ("disable_torch_init", "rank0_print"),
    "llava.model.builder": ("load_pretrained_model",),
    **{f"llava.model.multimodal_{part}.builder": () for part in ("encoder", "projector", "resampler")},
    "llava.train.llava_trainer": ("LLaVATrainer",),
    "llava.train.train": ("LazySupervisedDataset", "DataCollatorForSupervisedDataset"),
}  # fmt: skip
"""The family's modules, with the names that are found here. All but ``llava.train.train`` have no file any more."""

GONE_MODULES = {
    "llava.eval": (
        "python -m llava.eval.run, or python -m llava.eval.babylm",
        "eval_pope eval_science_qa eval_textvqa evaluate_interleave m4c_evaluator model_qa model_vqa model_vqa_loader "
        "model_vqa_mmbench model_vqa_science",
    ),
    "llava.serve": (
        "python -m llava.serve.cli", "controller gradio_multi_image gradio_web_server model_worker sglang_worker",
    ),
    "llava.model": ("llava.model.load_model", "apply_delta consolidate make_delta utils"),
    "llava.model.multimodal_encoder": (
        "--vision_tower, which takes any of their models",
        "clip_encoder hf_vision imagebind open_clip_encoder siglip_encoder mlcd_encoder",
    ),
    "llava.train": (
        "python -m llava.train.train, with --attn_implementation",
        "llama_flash_attn_monkey_patch llama_xformers_attn_monkey_patch llava_trainer_eval train_dpo train_xformers",
    ),
}  # fmt: skip
"""By package, what to use in place of modules of the family that have nothing here, and their names."""

_FAMILIES = "llava.model.language_model.llava_"
"""How modules of language models begin, whose classes ``llava.model`` has."""

GONE = {
    "eval_model": "python -m llava.serve.cli, or llava.serve.generate.Captioner",
    "process_anyres_image": "process_images, or llava.data.media.cut_views",
    **dict.fromkeys(("select_best_resolution", "get_anyres_image_grid_shape"), "llava.geometry.AnyRes"),
    "load_image_from_base64": "a data: address in the data (docs/data.md)",
    "load_lora_model": "llava.model.load_model with the folder of the adapters",
    **dict.fromkeys(("process_video_with_decord", "process_video_with_pyav"), "llava.data.media.load_media"),
    "build_logger": "Python's logging",
    "preprocess": "llava.data.formats.build_format",
    **{f"preprocess_{name}": "llava.data.formats.build_format" for name in ("qwen", "v1", "llama3", "plain")},
    "build_vision_tower": "--vision_tower, or llava.model.load_model with vision_tower",
    "build_vision_projector": "--mm_projector_type, or llava.model.load_model with projector_type",
    "build_vision_resampler": "--mm_resampler_type, or llava.model.load_model with resampler_type",
    "smart_tokenizer_and_embedding_resize": "llava.model.load_model, which adds tokens itself",
    "safe_save_model_for_hf_trainer": "LlavaTrainer.save_model",
    "find_all_linear_names": "--lora_enable",
    "maybe_zero_3": "LlavaTrainer.save_model, which gathers what ZeRO has spread",
    "unpad_image": "llava.model.visual.ViewMerger",
    "LengthGroupedSampler": "--train_sampling_strategy group_by_length",
}
"""Names of the family that cannot be kept, and what to use."""


def find_old_name(module: str, name: str) -> Any:
    """What a name of one of the family's modules is today.

    Raises:
        ImportError: it cannot be kept; says what to use.
        AttributeError: the family has no such name.
    """
    if name == "LLaVATrainer":
        from llava.train.trainer import LlavaTrainer

        return LlavaTrainer
    if module.startswith(_FAMILIES):
        from llava.model.backbones import find_class

        return find_class("LlavaLlamaConfig" if name == "LlavaConfig" else name)
    if name in OLD_MODULES[module]:
        if module == "llava.conversation":
            from llava.data.formats import conversation

            return getattr(conversation, name)
        return globals()[name]
    if name in GONE:
        raise ImportError(f"{module}.{name} of the LLaVA family is not kept; use {GONE[name]} (docs/migrating.md)")
    raise AttributeError(f"module {module!r} has no attribute {name!r}; docs/migrating.md has the family's names")


class _OldModules(MetaPathFinder, Loader):
    """Finds ``OLD_MODULES``, behind all finders of real files."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        if package in GONE_MODULES and last in GONE_MODULES[package][1].split():
            raise ModuleNotFoundError(
                f"{name} of the LLaVA family is not kept; use {GONE_MODULES[package][0]} (docs/migrating.md)", name=name
            )
        return ModuleSpec(name, self) if name in OLD_MODULES or self._is_family(name) else None

    @staticmethod
    def _is_family(name: str) -> bool:
        if not name.startswith(_FAMILIES):
            return False
        from llava.model.backbones import BACKBONES

        return name.rpartition(".")[2] in BACKBONES

    def exec_module(self, module: ModuleType) -> None:
        names = OLD_MODULES.get(module.__name__, ("those of llava.model",))
        module.__doc__ = f"Names of the LLaVA family that are kept: {', '.join(names)}."
        module.__dict__["__getattr__"] = partial(find_old_name, module.__name__)


def install_old_modules() -> None:
    """Let Python's ``import`` find the old modules."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
