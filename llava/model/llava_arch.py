"""The mixins that add vision to any decoder-only language model.

``LlavaMetaModel`` adds tower, projector and resampler to a decoder; ``LlavaMetaForCausalLM`` gives
the model with its head one ``forward``, the same for every backbone. With media it runs

    encode_media      tower -> projector -> positions -> resampler -> merged views    visual.py
    splice            features into the token embeddings, one scatter                 visual.py
    decoder           transformers
    supervised_loss   the head at supervised positions only                           loss.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from llava.compat import ModulesFilledLater, cache_name, choose_cache, keep_out_of_checkpoints, mark_unfilled
from llava.config import GroundingConfig, VisionConfig
from llava.geometry import SPATIAL_UNPAD
from llava.io import apply_umask
from llava.model.coordinates import (
    CoordinateEmbeddings,
    CoordinateTables,
    CoordinateTokens,
    TwoHot,
    Variables,
    embed_tokens,
    find_coordinate_tokens,
    two_hot_targets,
)
from llava.model.generation import MultimodalGeneration
from llava.model.grad_sync import encode_in_step, is_distributed, trains_vision_alone
from llava.model.lora import has_adapters, save_adapters
from llava.model.loss import add_balance_loss, supervised_loss
from llava.model.multimodal_encoder.base import VisionTower, build_tower
from llava.model.multimodal_projector.projectors import build_projector
from llava.model.multimodal_resampler import build_resampler
from llava.model.packing import PackLengths, run_decoder
from llava.model.visual import ViewMerger, encode_visual, splice
from llava.stored_forms import MODEL
from llava.types import MediaKind

if TYPE_CHECKING:  # What the mixin for a decoder is mixed into; at run time each backbone brings its own.
    from transformers import PreTrainedModel as _Decoder
else:
    _Decoder = object

CACHE = cache_name()
"""What the installed transformers calls a decoder's cache, as an argument and in outputs."""


class LlavaMetaModel(_Decoder):
    """Mixin for a decoder: holds the vision modules and the tables of coordinates that its configuration describes.

    Put it before the decoder's class. Without ``mm_`` entries in the configuration there are no
    vision modules and the decoder is the plain one.
    """

    has_attention_interface: ClassVar[bool] = True
    """Whether transformers' decoder runs its attention through ``AttentionInterface``."""

    layers_hand_down: ClassVar[bool] = True
    """Whether its layers hand keyword arguments that they do not know down to their attention."""

    def __init__(self, config: PretrainedConfig) -> None:
        if getattr(config, "use_bidirectional_attention", False):
            # Its loss would be that of tokens which it has seen.
            raise ValueError(
                "use_bidirectional_attention is true in its config.json: it is an encoder, in which a token sees those "
                "behind it, and learns and writes no text; use a model that generates"
            )
        super().__init__(config)
        self.vision = VisionConfig.from_model_config(config)
        self.grounding = GroundingConfig.from_model_config(config)
        self.used_vision_modules: set[str] = set()
        if self.vision is not None:
            self.vision_tower = build_tower(self.vision)
            self.vision_tower.requires_grad_(False)
            self.vision_tower.filled_later = not self.vision.save_vision_tower
            # OPT's embeddings may be narrower than its layers, and features stand among embeddings.
            width = cast(nn.Embedding, self.get_input_embeddings()).embedding_dim
            self.mm_projector = build_projector(self.vision, width)
            self.vision_resampler = build_resampler(self.vision, width)
            self.image_newline = None
            if self.vision.patch_merge_type == SPATIAL_UNPAD:
                self.image_newline = nn.Parameter(torch.empty(width))
                mark_unfilled(self)  # The plain decoder has marked itself as filled, and would be passed over.
            if self.grounding is not None and self.grounding.has_tables:
                self.coordinates = CoordinateTables(self.grounding, width)
            self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained`` for the decoder alone; a frozen tower comes from its own source."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.vision is not None:
            model.vision_tower.requires_grad_(False)
            if not model.vision.save_vision_tower:
                model.vision_tower.load_weights(model.vision.vision_tower)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        # The documented hook of transformers: fills every module that is new or missing from a checkpoint.
        super()._init_weights(module)
        newline = getattr(module, "image_newline", None)
        if newline is not None:
            # Of length one, whatever the width, as in the LLaVA family.
            init.normal_(newline, std=newline.numel() ** -0.5)
        if isinstance(module, CoordinateTables):
            for table in module.parameters():
                init.normal_(table, std=getattr(self.config, "initializer_range", 0.02))

    def coordinate_embeddings(self) -> CoordinateEmbeddings | None:
        """The tables of coordinates for one step, None without any; to be called once a step, on every rank alike."""
        return self.coordinates() if hasattr(self, "coordinates") else None

    def encode_media(
        self,
        images: list[Tensor] | Tensor,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        tables: CoordinateEmbeddings | None = None,
    ) -> list[Tensor]:
        """One (tokens, width) tensor of features for each image or video, see ``encode_visual``.

        Args:
            images, modalities, image_sizes: as for ``LlavaMetaForCausalLM.forward``.
            tables: of a model with tables of coordinates: tell the features where and when they are.
        """
        if self.vision is None:
            raise ValueError(
                "this model has no vision modules; load it with --vision_tower to give it images or videos"
            )
        # An image (3, side, side) has one frame; a stack is a video, unless it is said to be an anyres image, whose
        # frames are its views.
        media = [(image.unsqueeze(0) if image.ndim == 3 else image).to(self.device) for image in images]
        told: list[MediaKind] = ["image" if image.ndim == 3 else "video" for image in images]
        kinds = told if modalities is None else modalities
        merger = None if self.vision.anyres is None else ViewMerger(self.vision.anyres, self.image_newline)
        modules = (self.vision_tower, self.mm_projector, self.vision_resampler)  # in the order of the data
        positions = None if tables is None else partial(tables.patch_positions, grid_side=self.vision.grid_side)
        return encode_visual(*modules, media, kinds, image_sizes, merger, positions)


class LlavaMetaForCausalLM(MultimodalGeneration, ModulesFilledLater):
    """Mixin for a language model with head: images and videos in, text out.

    Put it before the language model's class and name, in the subclass, the decoder's class. The decoder lies where
    transformers keeps it, in the attribute ``base_model_prefix``.
    """

    config_class: type[PretrainedConfig]
    decoder_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PretrainedConfig) -> None:
        # The parent builds its plain decoder, which is replaced at once: no time is spent to fill it.
        with no_init_weights():
            super().__init__(config)
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.post_init()
        self.keep_tower_weights_out(self.vision is not None and not self.vision.save_vision_tower)

    def get_model(self) -> Any:
        """The decoder, with the vision modules."""
        return getattr(self, self.base_model_prefix)

    @property
    def vision(self) -> VisionConfig | None:
        return self.get_model().vision

    @property
    def grounding(self) -> GroundingConfig | None:
        return self.get_model().grounding

    def get_input_embeddings(self) -> nn.Module:
        return self.get_model().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        # Through the decoder: transformers would take GPT-2's alias embed_tokens for a module of its own.
        self.get_model().set_input_embeddings(value)

    def get_vision_tower(self) -> VisionTower | None:
        return getattr(self.get_model(), "vision_tower", None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: list[Tensor] | Tensor | None = None,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        variables: Variables | None = None,
        pixel_values: list[Tensor] | Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        smoothing: float = 0.0,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        pack_lengths: PackLengths | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | tuple[object, ...]:
        """One step of the language model over text, images and videos.

        Args:
            input_ids: int64 (batch, length), visual spans included.
            attention_mask: (batch, length), one where a token is real.
            position_ids: (batch, length); by default 0, 1, 2 ...
            past_key_values: the cache while decoding; ``cache``, as transformers 5.24 has it, is another name of it.
            inputs_embeds: (batch, length, width) in place of ``input_ids``; media are then in it already.
            labels: int64 (batch, length), -100 where nothing is predicted.
            use_cache: whether to return the cache.
            images: one entry for each image or video over the batch in reading order, (3, side, side)
                or (frames, 3, side, side), the frames of an anyres image being its views; uint8, or
                floats normalised already. (frames, 1, patches, tower width) are features of the tower.
                ``pixel_values`` is another name of it.
            modalities: "image" or "video" for each entry; by default told from its axes.
            image_sizes: original (height, width) of each entry; needed for anyres images alone.
            variables: for each sample its six lists of coordinates (``Coordinates.to_variables``) or None, in the
                tower's square; an error for a model without tables of coordinates.
            logits_to_keep: as in transformers: how many last positions, or which, get logits.
            num_items_in_batch: predicted labels in the global batch, see ``supervised_loss``.
            return_logits: False leaves the logits out beside a loss, as the trainer does: the head then runs
                at supervised positions alone.
            smoothing: label smoothing of the loss, see ``supervised_loss``; the load balancing loss is not smoothed.
            output_router_logits: whether the loss of a mixture of experts has its load balancing part; by default what
                the configuration says.
            return_dict: False returns a tuple; by default what the configuration says.
            pack_lengths: of rows with several samples, the tokens of each (see ``packing``); ``variables`` are then a
                row's all together.
            **kwargs: handed to the decoder.

        Returns:
            Loss (with labels), logits and cache; for a mixture of experts that balances its load,
            ``aux_loss`` and ``router_logits`` too.
        """
        images = pixel_values if images is None else images
        # Tables are propagated once a step, here: text, pictures and the head share the result and its gradient.
        tables, tokens = self.get_model().coordinate_embeddings(), None
        if input_ids is not None:
            tokens = self.find_coordinates(input_ids, variables)
        if inputs_embeds is None:
            inputs_embeds = self.embed_multimodal(input_ids, images, modalities, image_sizes, tables, tokens)
            if inputs_embeds is not None:  # (batch, length, width); plain text goes on as ids
                kwargs = {**self.decoder_inputs(input_ids), **kwargs}
                input_ids = None
        elif images is not None:
            raise ValueError("pass either inputs_embeds or input_ids with images, not both")
        # None asks the configuration; a caller's False holds against it.
        balances = output_router_logits
        if balances is None:
            balances = getattr(self.config, "output_router_logits", False)
        kwargs |= {CACHE: choose_cache(cache, past_key_values), **({"output_router_logits": True} if balances else {})}
        rows = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        options = {"position_ids": position_ids, "use_cache": use_cache, "return_dict": True, **kwargs}
        outputs = run_decoder(self.get_model(), pack_lengths, **rows, **options)
        hidden, kept = outputs.last_hidden_state, logits_to_keep  # (batch, length, width)
        head, targets = self._head_and_targets(labels, tables, tokens)
        loss = None if targets is None else supervised_loss(hidden, targets, head, num_items_in_batch, smoothing)
        logits = None
        if targets is None or return_logits:
            logits = head(hidden[:, slice(-kept, None) if isinstance(kept, int) else kept])  # (batch, kept, vocabulary)
        others = {name: getattr(outputs, name) for name in (CACHE, "hidden_states", "attentions")}
        plain = CausalLMOutputWithPast(loss=loss, logits=logits, **others)
        counted = (attention_mask, labels, num_items_in_batch)
        result = add_balance_loss(plain, outputs.router_logits, self.config, *counted) if balances else plain
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _head_and_targets(
        self, labels: Tensor | None, tables: CoordinateEmbeddings | None, tokens: CoordinateTokens | None
    ) -> tuple[Callable[[Tensor], Tensor], Tensor | TwoHot | None]:
        """The head, with the bins of a model that has tables of coordinates, and what it is to predict."""
        head: Callable[[Tensor], Tensor] = cast(nn.Linear, self.get_output_embeddings())
        targets: Tensor | TwoHot | None = labels
        if tables is not None:
            head = tables.extend_head(cast(nn.Linear, head))
            if labels is not None and tokens is not None:
                targets = two_hot_targets(labels, tables.grounding, tokens)
        # Gemma 2 keeps its logits between -30 and 30.
        cap = getattr(self.config, "final_logit_softcapping", None)
        return (head if cap is None else lambda hidden: torch.tanh(head(hidden) / cap) * cap), targets

    def target_ids(self, input_ids: Tensor, labels: Tensor, variables: Variables | None = None) -> Tensor:
        """Labels, (batch, length), as ids that logits have: those of coordinates become the bins nearest to them."""
        tokens = self.find_coordinates(input_ids, variables)
        if tokens is None or self.grounding is None:
            return labels
        targets = two_hot_targets(labels, self.grounding, tokens)  # (batch, length) each
        return torch.where(targets.fraction > 0.5, targets.upper, targets.lower)

    def find_coordinates(self, input_ids: Tensor, variables: Variables | None) -> CoordinateTokens | None:
        """The tokens of a batch that stand for coordinates, None for a model without tables of them."""
        grounding = self.grounding
        if grounding is not None and grounding.has_tables:
            return find_coordinate_tokens(input_ids, grounding, variables)
        if variables is not None and any(any((sample or {}).values()) for sample in variables):
            raise ValueError(
                "variables (coordinates) were given, but this model has no coordinate tables; train it with --stage 2"
            )
        return None

    def embed_multimodal(
        self,
        input_ids: Tensor | None,
        images: list[Tensor] | Tensor | None,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        tables: CoordinateEmbeddings | None = None,
        tokens: CoordinateTokens | None = None,
    ) -> Tensor | None:
        """Embeddings of a batch with its media and coordinates in place, or None for plain text.

        Args:
            input_ids: int64 (batch, length).
            images, modalities, image_sizes: as for ``forward``.
            tables, tokens: of the step, for a model with tables of coordinates.

        Returns:
            (batch, length, width). Plain text gives None, so that it takes the backbone's own way from
            ids to logits; only a model with tables of coordinates, and a rank among several, embeds it here
            as it does a batch with media: ranks must call the same modules in the same order.
        """
        if input_ids is None:
            raise ValueError("pass input_ids or inputs_embeds")
        model, vision = self.get_model(), self.vision
        media = (images, modalities, image_sizes, tables) if images is not None and len(images) else None
        learns = self.training and torch.is_grad_enabled()
        in_step = is_distributed() or (learns and vision is not None and trains_vision_alone(model))
        if media is None and tables is None and (vision is None or not in_step):
            return None
        # The media before the text: their gradients then come last, behind the language model's, on every rank.
        if in_step and learns:
            features = encode_in_step(model, media)
        else:
            features = [] if media is None else model.encode_media(*media)  # one (tokens, width) for each
        assert vision is not None
        embed = self.get_input_embeddings()
        if tables is not None and tokens is not None:
            embeddings = embed_tokens(input_ids, embed, tables, tokens)  # (batch, length, width)
        else:
            embeddings = embed(input_ids)  # (batch, length, width)
        # Without ids, which load_model adds to the vocabulary, the property says so.
        visual = list(vision.token_ids.values()) or vision.visual_token_ids
        return splice(input_ids, embeddings, features, visual)

    def decoder_inputs(self, input_ids: Tensor | None) -> dict[str, Tensor]:
        """What a decoder takes beside the embeddings of a batch with media; most take nothing."""
        return {}

    # Checkpoints: a frozen tower is kept out of them, and found again by its source and its hash.

    @classmethod
    def from_pretrained(
        cls, *args: Any, vision_tower: str | None = None, fill_tower: Callable[[Any], None] | None = None, **kwargs: Any
    ) -> Any:
        """transformers' ``from_pretrained``; a frozen tower's weights come from their own source.

        Args:
            vision_tower: another place of the same tower, where it has moved; its weights must hash
                to what the checkpoint says.
            fill_tower: gives a model its tower's weights, in place of ``load_vision_tower``.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        MODEL.check(model.config.to_dict(), f"config.json of {model.config.name_or_path or 'this model'}")
        if model.vision is not None:
            # Loading replaces parameters, and with them what the structure said about gradients.
            model.get_model().vision_tower.requires_grad_(False)
            if fill_tower is not None:
                fill_tower(model)
            elif not model.vision.save_vision_tower:
                model.load_vision_tower(vision_tower)
        return loaded

    def load_vision_tower(self, source: str | None = None) -> None:
        """Fill the tower with its weights.

        Args:
            source: folder or hub name; by default the configuration's, which gets it, with the hash of the weights.
        """
        decoder = self.get_model()
        source = source or decoder.vision.vision_tower
        found = decoder.vision_tower.load_weights(source)
        source = os.path.abspath(source) if os.path.isdir(source) else source
        self.set_vision(replace(decoder.vision, vision_tower=source, vision_tower_hash=found))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; a model with adapters leaves these and its vision modules, not its base."""
        if state_dict is not None:
            # DeepSpeed copies what is tied, and a file would hold the embeddings twice.
            tied = self.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        self.config.update(MODEL.stamp)
        if not has_adapters(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        elif is_main_process:
            save_adapters(self, os.fspath(save_directory), state_dict)
        if is_main_process:
            apply_umask(save_directory)

    def set_vision(self, vision: VisionConfig) -> None:
        """Record changed visual settings in the model and in its configuration."""
        decoder = self.get_model()
        if vision.anyres is not None and decoder.grounding is not None and decoder.grounding.has_tables:
            raise ValueError(
                f"--grounding lape tells every patch where it is, and the tiles of --image_aspect_ratio "
                f"{vision.image_aspect_ratio} are not placed; use pad or square"
            )
        # The decoder acts on the settings, and config.json takes them along with a checkpoint.
        decoder.vision = vision
        self.config.update(vision.to_model_config())
        self.keep_tower_weights_out(not vision.save_vision_tower)

    def keep_trained_tower(self) -> None:
        """Let checkpoints hold the tower's weights: trained ones are stored nowhere else."""
        self.set_vision(replace(self.get_model().vision, save_vision_tower=True))

    def keep_tower_weights_out(self, out: bool) -> None:
        """Whether checkpoints leave the tower's weights to their source (its name and hash are in the config)."""
        tensors = (*self.named_parameters(), *self.named_buffers())
        names = {name for name, _ in tensors if ".vision_tower." in name}
        keep_out_of_checkpoints(self, names, r"\.vision_tower\.", out)
