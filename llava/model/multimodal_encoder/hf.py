"""Vision models of the transformers library as towers: what all of them share."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from llava.config import VisionConfig
from llava.model.loading_errors import check_counts
from llava.model.multimodal_encoder.base import TOWERS, TowerDescription, VisionTower
from llava.model.pretrained import (
    NOT_JUST_TENSORS,
    UNSAFE_WEIGHTS,
    describe_damage,
    drop_remote_kernels,
    locate_model,
    quiet_transformers,
)


class HuggingFaceTower(VisionTower):
    """Features of one layer of a transformers vision model.

    Layers behind the selected one are never built: they would cost memory, time and, where the
    tower is trained, leave parameters without gradients. The final norm goes with them, since a
    hidden state is what stands before it; with ``vision_final_norm`` it stays.

    A family of models is a subclass that declares where it differs:

    Attributes:
        final_norm: name of the norm behind the last layer.
        num_class_tokens: tokens before the patches, besides the registers that the configuration counts.
        unused_parameters: last parts of the names of parameters that features never depend on.
        asks_to_interpolate: whether the model fits its position table to another side only when asked to.
        image_mean, image_std: statistics of a model that comes without an image processor.
    """

    final_norm: ClassVar[str]
    num_class_tokens: ClassVar[int] = 0
    unused_parameters: ClassVar[tuple[str, ...]] = ()
    asks_to_interpolate: ClassVar[bool] = False
    image_mean: ClassVar[tuple[float, ...]] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: ClassVar[tuple[float, ...]] = tuple(IMAGENET_DEFAULT_STD)

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__(vision)
        config = build_config(vision)
        check_grid(vision, config)
        self.vision_tower = self.build_model(config)

    @classmethod
    def describe(cls, source: str, config: PretrainedConfig) -> TowerDescription:
        images = read_image_format(source, cls.image_mean, cls.image_std)
        patch = square_side(config.patch_size, source, "patch_size")
        own_side = cls.own_side(source, config, images)
        side = images.side or own_side
        return TowerDescription(
            vision_config=config.to_diff_dict() | {"model_type": config.model_type},
            hidden_size=config.hidden_size,
            image_size=side,
            patches_per_side=count_patches(source, side, patch, own_side),
            image_resize_size=images.resize,
            image_mean=images.mean,
            image_std=images.std,
        )

    @classmethod
    def own_side(cls, source: str, config: PretrainedConfig, images: ImageFormat) -> int:
        """The side in pixels that the model was made for."""
        return square_side(config.image_size, source, "image_size")

    def build_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """Build the model up to the selected layer."""
        config.num_hidden_layers = count_layers(self.vision, config.num_hidden_layers)
        model = AutoModel.from_config(config, trust_remote_code=False)
        # LLaVA takes a hidden state, which stands before this norm (Liu et al., arXiv 2310.03744).
        if not self.vision.vision_final_norm:
            setattr(model, self.final_norm, nn.Identity())
        return model

    def freeze_unused(self) -> None:
        for name, parameter in self.vision_tower.named_parameters():
            if name.rpartition(".")[2] in self.unused_parameters:
                parameter.requires_grad = False

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, which stand before the patches."""
        return self.num_class_tokens + getattr(self.vision_tower.config, "num_register_tokens", 0)

    def encode(self, pixels: Tensor) -> Tensor:
        options = {"interpolate_pos_encoding": True} if self.asks_to_interpolate else {}
        # (frames, prefix + patches, width); the last state, as layers behind the selected one are not there.
        hidden = self.vision_tower(pixel_values=pixels, **options).last_hidden_state
        return hidden[:, self.num_prefix_tokens :]

    def load_weights(self, source: str) -> str:
        """Load the selected layers' weights from a folder or a hub name.

        Raises:
            ValueError: the source is gone, lacks weights of this tower, or (where the configuration
                has a hash) holds other weights than those the model was trained with.
        """
        weights = self.read_weights(source)
        found = hash_weights(weights)
        expected = self.vision.vision_tower_hash
        if expected is not None and found != expected:
            raise ValueError(
                f"the vision tower at {source!r} is not the one this model was trained with (its weights "
                f"hash to {found[:12]}, expected {expected[:12]}); give the right folder with --vision_tower"
            )
        # Copied into the tower's own parameters, and so into their dtype and onto their device.
        self.vision_tower.load_state_dict(weights)
        return found

    def read_weights(self, source: str, stored: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """This tower's weights at a source, in the dtype that they are stored in.

        The tower's own class and configuration read them, so that of a two-tower model the other
        half is left out, and layers that are not built.

        Args:
            source: a folder or hub name.
            stored: tensors under the names of the tower's class, or those that it had once, which are taken in place
                of the source's files.
        """
        try:
            source = source if stored is not None else locate_model(source, "vision tower")
        except ValueError as error:
            raise ValueError(
                f"{error}. Give the folder that has its weights with --vision_tower; a checkpoint written with "
                "--save_vision_tower holds them itself."
            ) from error
        # In the stored dtype, so that the hash is that of the files whatever precision the model around it has.
        model_class: Any = type(self.vision_tower)
        config = copy.deepcopy(self.vision_tower.config)
        try:
            with quiet_transformers():
                loaded, info = model_class.from_pretrained(
                    source if stored is None else None,
                    config=config,
                    state_dict=None if stored is None else dict(stored),
                    dtype="auto",
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"the vision tower's weights cannot be read from {source!r}: {describe_damage(source, error)}. "
                "Give the folder that has them with --vision_tower; a checkpoint written with "
                "--save_vision_tower holds them itself."
            ) from error
        except UNSAFE_WEIGHTS as error:
            raise ValueError(f"--vision_tower {source!r}: {NOT_JUST_TENSORS}") from error
        # Of a CLIP's file only these are taken: it holds a text tower, and layers behind the selected one.
        names = set(self.vision_tower.state_dict())
        mismatched = {name for name, *_ in info["mismatched_keys"]}
        missing = sorted(names & (mismatched | set(info["missing_keys"])))
        if missing:
            raise ValueError(
                f"the vision tower at {source!r} lacks weights of the expected shape: {missing[:5]}; "
                "give the right folder with --vision_tower"
            )
        return {name: tensor for name, tensor in loaded.state_dict().items() if name in names}


def build_config(vision: VisionConfig) -> PretrainedConfig:
    """The vision model's whole configuration."""
    # Without the dtype its files were written in: the tower gets that of the model around it.
    settings = {name: value for name, value in vision.vision_config.items() if name != "dtype"}
    settings = drop_remote_kernels(settings, vision.vision_tower)
    check_counts(settings, f"the vision tower {vision.vision_tower!r}")
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def check_grid(vision: VisionConfig, config: PretrainedConfig) -> None:
    """A ValueError where a model's visual settings say another grid or width than its tower's configuration."""
    of_tower = f"the tower {vision.vision_tower!r}"
    patch = square_side(config.patch_size, vision.vision_tower, "patch_size")
    if vision.image_size // patch != vision.patches_per_side:
        raise ValueError(
            f"mm_patches_per_side is {vision.patches_per_side}, but {of_tower} makes {vision.image_size // patch} of "
            f"{vision.image_size} pixels (mm_image_size), in patches of {patch}; take config.json as it was written"
        )
    if vision.hidden_size != config.hidden_size:
        raise ValueError(f"mm_hidden_size is {vision.hidden_size}, but {of_tower} is {config.hidden_size} wide")


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the hashes of all tensors, in sorted order.

    Names do not count: transformers renames parameters from one version to the next (DINOv2's queries,
    keys and values between 5.17 and 5.23), and a model must find its tower again.
    """
    digest = hashlib.sha256()
    for tensor_digest in sorted(_hash_tensor(tensor) for tensor in weights.values()):
        digest.update(tensor_digest)
    return digest.hexdigest()


def _hash_tensor(tensor: Tensor) -> bytes:
    """SHA-256 over type, shape and bytes."""
    tensor = tensor.detach().contiguous().cpu()  # as the file has it, wherever the model lies
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def count_layers(vision: VisionConfig, num_layers: int) -> int:
    """How many of a vision model's layers stand before the selected hidden state.

    Hidden states are counted as in the list of the embeddings and every layer's output.
    """
    selected = vision.vision_select_layer
    # With the embeddings there is one hidden state more than layers: -2 is the output of the last layer but one.
    kept = selected if selected >= 0 else num_layers + 1 + selected
    if not 1 <= kept <= num_layers:
        raise ValueError(
            f"--mm_vision_select_layer is {selected}, but {vision.vision_tower!r} has {num_layers} layers; "
            f"use 1 to {num_layers}, or -1 to {-num_layers}"
        )
    return kept


# How a vision model's images are prepared: squares of which side, cut and normalised how.


@dataclass(frozen=True)
class ImageFormat:
    """What a model's image processor does; None where it does not say.

    Attributes:
        side: side in pixels of the square that the model sees.
        resize: length of the shorter side before a centre crop.
        max_num_patches: for a processor of variable grids, the most patches of one image.
        mean, std: per channel, of pixels in [0, 1].
    """

    side: int | None
    resize: int | None
    max_num_patches: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_image_format(source: str, mean: Sequence[float], std: Sequence[float]) -> ImageFormat:
    """Read ``preprocessor_config.json`` of a vision model, where present; mean and deviation hold where it has none.

    Raises:
        ValueError: the processor makes images that are not square.
    """
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        processor = {}
    size = processor.get("size")
    # Two ways to a square: the picture stretched to "size", or its shorter side, and the centre cut to "crop_size".
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    height, width = _height_and_width(crop or size)
    if height != width or (size and height is None):
        raise ValueError(
            f"--vision_tower {source!r} wants images of {height} x {width} pixels; only squares are supported: "
            "set one side for height and width in its preprocessor_config.json"
        )
    if processor.get("do_normalize") is False:  # Pixels stay in [0, 1].
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return ImageFormat(
        side=height,
        resize=_shorter_side(size) if crop else None,
        max_num_patches=processor.get("max_num_patches"),
        mean=tuple(processor.get("image_mean") or mean),
        std=tuple(processor.get("image_std") or std),
    )


def square_side(size: int | Sequence[int], source: str, what: str) -> int:
    """The side of a square that is given as one number or as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(
            f"--vision_tower {source!r} has {what} {height} x {width} in its config.json; only squares are supported: "
            "give one that has been trained on squares"
        )
    return height


def count_patches(source: str, side: int, patch: int, own_side: int) -> int:
    """Patches along a side.

    A remainder is an error, unless the model was made with it: SigLIP so400m cuts 384 pixels into 27
    patches of 14 and leaves the last six out.
    """
    if side % patch and side != own_side:
        raise ValueError(
            f"--vision_tower {source!r} sees {side} x {side} pixels in patches of {patch}, which is no "
            f"whole square grid; use a multiple of {patch} in its preprocessor_config.json"
        )
    return side // patch


def _height_and_width(size: int | Mapping[str, int] | None) -> tuple[int | None, int | None]:
    """A size as processors write it; a number or a shorter side stands for a square."""
    if not isinstance(size, Mapping):
        return size, size
    return size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))


def _shorter_side(size: int | Mapping[str, int] | None) -> int | None:
    return size.get("shortest_edge") if isinstance(size, Mapping) else size


# The families: each says where it differs.


@TOWERS.register("clip_vision_model")
class ClipTower(HuggingFaceTower):
    """The vision half of CLIP. Its norm before the first layer belongs to the embeddings and stays."""

    final_norm = "post_layernorm"
    num_class_tokens = 1
    asks_to_interpolate = True
    image_mean = tuple(OPENAI_CLIP_MEAN)
    image_std = tuple(OPENAI_CLIP_STD)


@TOWERS.register("dinov2")
@TOWERS.register("dinov2_with_registers")
class DinoV2Tower(HuggingFaceTower):
    """DINOv2, with and without registers. Its mask token, for patches that pretraining hides, is not used."""

    final_norm = "layernorm"
    num_class_tokens = 1
    unused_parameters = ("mask_token",)


@TOWERS.register("dinov3_vit")
class DinoV3Tower(DinoV2Tower):
    """DINOv3's vision transformers. Training scales their rotary positions at random, as the configuration says."""

    final_norm = "norm"


@TOWERS.register("siglip_vision_model")
class SiglipTower(HuggingFaceTower):
    """The vision half of SigLIP. It has no class token: its head pools the patches, and is not built."""

    final_norm = "post_layernorm"
    asks_to_interpolate = True
    image_mean = tuple(IMAGENET_STANDARD_MEAN)
    image_std = tuple(IMAGENET_STANDARD_STD)

    def build_model(self, config: PretrainedConfig) -> PreTrainedModel:
        # The head would pool all patches into one feature, and get no gradient.
        config.vision_use_head = False
        return super().build_model(config)


@TOWERS.register("siglip2_vision_model")
class Siglip2Tower(SiglipTower):
    """The vision half of SigLIP2 with variable grids (NaFlex), used with one square grid: no patch is padding."""

    @classmethod
    def own_side(cls, source: str, config: PretrainedConfig, images: ImageFormat) -> int:
        """Side of the largest square within the processor's patches, or else the position table's."""
        patch = square_side(config.patch_size, source, "patch_size")
        return math.isqrt(images.max_num_patches or config.num_patches) * patch

    def encode(self, pixels: Tensor) -> Tensor:
        side = self.vision.patches_per_side
        # On the CPU: transformers reads the shapes one by one.
        shapes = torch.tensor([[side, side]]).expand(len(pixels), -1)  # (frames, 2): rows and columns
        return self.vision_tower(
            # NaFlex takes (frames, patches, patch * patch * 3); without a mask, as no patch is padding.
            pixel_values=cut_patches(pixels, side),
            pixel_attention_mask=None,
            spatial_shapes=shapes,
        ).last_hidden_state


def cut_patches(pixels: Tensor, side: int) -> Tensor:
    """Flatten (frames, 3, height, width) to (frames, side * side, patch * patch * 3), row by row, channels last."""
    patches = pixels.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # (frames, 3, row, y, column, x)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
