"""The two mixins that give any decoder-only language model eyes.

``LlavaMetaModel`` adds tower, projector and resampler to a decoder; ``LlavaMetaForCausalLM`` gives
the model with its head one ``forward`` and one ``generate``, the same for every backbone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from llava.compat import OwnGenerationDefaults, cache_argument, cache_of, choose_cache
from llava.config import GroundingConfig, VisionConfig
from llava.geometry import SPATIAL_UNPAD
from llava.model.coordinates import (
    CoordinateRows,
    CoordinateTables,
    PlacedTokens,
    Variables,
    embed_tokens,
    place_tokens,
    two_hot_targets,
)
from llava.model.generation import MultimodalGeneration
from llava.model.grad_sync import encode_through_gate, is_distributed
from llava.model.loss import load_balancing_loss, share_of_batch, supervised_loss
from llava.model.multimodal_encoder.base import VisionTower, build_tower
from llava.model.multimodal_projector.projectors import build_projector
from llava.model.multimodal_resampler import build_resampler
from llava.model.tower_weights import TowerWeights
from llava.model.visual import ViewMerger, as_media, encode_visual, infer_modalities, splice
from llava.types import MediaKind


class FamilyDefaults(OwnGenerationDefaults):
    """Mixin for a configuration: the LLaVA family's defaults for generating. Put it first.

    The family's configurations say that a model answers greedily with at most 1,024 new tokens. They are class
    attributes, read from here as from the family's: what one model generates with is in its ``generation_config``.
    """

    temperature: ClassVar[float] = 0.0
    max_new_tokens: ClassVar[int] = 1024
    do_sample: ClassVar[bool] = False
    top_p: ClassVar[float | None] = None


class LlavaMetaModel:
    """Mixin for a decoder: holds the vision modules and the tables of coordinates that its configuration describes.

    Put it before the decoder's class. Without ``mm_`` entries in the configuration there are no
    vision modules and the decoder is the plain one.
    """

    has_attention_interface: ClassVar[bool] = True
    """Whether transformers' decoder runs its attention through ``AttentionInterface``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.vision = VisionConfig.from_model_config(config)
        self.grounding = GroundingConfig.from_model_config(config)
        self.used_vision_modules: set[str] = set()
        if self.vision is not None:
            self.vision_tower = build_tower(self.vision)
            self.vision_tower.requires_grad_(False)
            # OPT's embeddings may be narrower than its layers, and features stand among embeddings.
            width = self.get_input_embeddings().embedding_dim  # type: ignore[attr-defined]
            self.mm_projector = build_projector(self.vision, width)
            self.vision_resampler = build_resampler(self.vision, width)
            self.image_newline = None
            if self.vision.patch_merge_type == SPATIAL_UNPAD:
                self.image_newline = nn.Parameter(torch.empty(width))
                # The plain decoder has marked itself as filled, and would be passed over.
                self._is_hf_initialized = False
            if self.grounding is not None and self.grounding.has_tables:
                self.coordinates = CoordinateTables(self.grounding, width)
            self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained`` for the decoder alone; a frozen tower comes from its own source."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.vision is not None:
            model.vision_tower.requires_grad_(False)
            if not model.vision.save_vision_tower:
                model.vision_tower.load_weights(model.vision.vision_tower)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        # What transformers fills every new module with, be it built here or missing from a checkpoint.
        super()._init_weights(module)  # type: ignore[misc]
        newline = getattr(module, "image_newline", None)
        if newline is not None:
            # Of length one, whatever the width, as in the LLaVA family.
            init.normal_(newline, std=newline.numel() ** -0.5)
        if isinstance(module, CoordinateTables):
            for table in module.parameters():
                init.normal_(table, std=getattr(self.config, "initializer_range", 0.02))  # type: ignore[attr-defined]

    def get_vision_tower(self) -> VisionTower | None:
        return getattr(self, "vision_tower", None)

    def coordinate_rows(self) -> CoordinateRows | None:
        """The tables of coordinates for one step, None without any; to be called once a step, on every rank alike."""
        return self.coordinates() if hasattr(self, "coordinates") else None

    def encode_media(
        self,
        images: list[Tensor] | Tensor,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        rows: CoordinateRows | None = None,
    ) -> list[Tensor]:
        """One (tokens, width) tensor of features for each image or video, see ``encode_visual``.

        ``rows``, of a model with tables of coordinates, tell the features where and when they are.
        """
        if self.vision is None:
            raise ValueError(
                "this model has no vision modules; load it with --vision_tower to give it images or videos"
            )
        media = [frames.to(self.device) for frames in as_media(images)]  # type: ignore[attr-defined]
        kinds = modalities if modalities is not None else infer_modalities(images)
        merger = None if self.vision.anyres is None else ViewMerger(self.vision.anyres, self.image_newline)
        modules = (self.vision_tower, self.mm_projector, self.vision_resampler)
        positions = None if rows is None else partial(rows.of_patches, grid_side=self.vision.grid_side)
        return encode_visual(*modules, media, kinds, image_sizes, merger, positions)


class LlavaMetaForCausalLM(MultimodalGeneration, TowerWeights):
    """Mixin for a language model with head: images and videos in, text out.

    Put it before the language model's class and name, in the subclass, the decoder's class. The decoder lies where
    transformers keeps it, in the attribute ``base_model_prefix``.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    decoder_class: ClassVar[type[PreTrainedModel]]
    base_model_prefix: str

    config: Any
    training: bool

    def __init__(self, config: Any) -> None:
        # The parent builds its plain decoder, which is replaced at once: no time is spent to fill it.
        with no_init_weights():
            super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.post_init()  # type: ignore[attr-defined]
        self.keep_tower_weights_out(self.vision is not None and not self.vision.save_vision_tower)

    def get_model(self) -> Any:
        """The decoder, with the vision modules."""
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_model().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        # Through the decoder: transformers would take GPT-2's alias embed_tokens for a module of its own.
        self.get_model().set_input_embeddings(value)

    def get_vision_tower(self) -> VisionTower | None:
        return self.get_model().get_vision_tower()

    @property
    def vision(self) -> VisionConfig | None:
        return self.get_model().vision

    @property
    def grounding(self) -> GroundingConfig | None:
        return self.get_model().grounding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
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
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """One step of the language model over text, images and videos.

        Args:
            input_ids: int64 (batch, length), visual spans included.
            attention_mask: (batch, length), one where a token is real.
            position_ids: (batch, length); by default 0, 1, 2 ...
            past_key_values: the cache while decoding; ``cache``, as transformers 5.24 has it, is another name of it.
            inputs_embeds: (batch, length, width) in place of ``input_ids``; media are then in it already.
            labels: int64 (batch, length), -100 where nothing is predicted.
            use_cache: whether to return the cache.
            images: one entry a medium over the batch in reading order, (3, side, side) for an image
                or (frames, 3, side, side), the frames of an anyres image being its views; uint8, or
                floats normalised already. ``pixel_values`` is another name of it.
            modalities: "image" or "video" for each entry; by default told from its axes.
            image_sizes: original (height, width) of each entry; needed for anyres images alone.
            variables: for each row its six lists of coordinates (``Coordinates.to_variables``) or None, in the
                tower's square; an error for a model without tables of coordinates.
            logits_to_keep: as in transformers: how many last positions, or which, get logits.
            num_items_in_batch: predicted labels in the global batch, see ``supervised_loss``.
            return_logits: False leaves the logits out beside a loss, as the trainer does: the head then runs
                at supervised positions alone.
            smoothing: label smoothing of the loss, see ``supervised_loss``; the load balancing loss is not smoothed.
            output_router_logits: for mixtures of experts, whether the loss has its load balancing
                part; by default what the configuration says.
            return_dict: False returns a tuple; by default what the configuration says.
            **kwargs: handed to the decoder.

        Returns:
            Loss (with labels), logits and cache; for a mixture of experts that balances its load,
            ``aux_loss`` and ``router_logits`` too.
        """
        images = pixel_values if images is None else images
        rows, tokens = self.get_model().coordinate_rows(), None
        if input_ids is not None:
            tokens = self.place_coordinates(input_ids, variables)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("pass input_ids or inputs_embeds")
            inputs_embeds = self.embed_multimodal(input_ids, images, modalities, image_sizes, rows, tokens)
            if inputs_embeds is not None:
                kwargs = self.decoder_inputs(input_ids) | kwargs
                input_ids = None
        elif images is not None:
            raise ValueError("pass either inputs_embeds or input_ids with images, not both")
        balances = output_router_logits
        if balances is None:
            balances = getattr(self.config, "output_router_logits", False)
        outputs = self.get_model()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache_argument(choose_cache(cache, past_key_values)),
            return_dict=True,
            **({"output_router_logits": True} if balances else {}),
            **kwargs,
        )
        hidden, head = outputs.last_hidden_state, self.get_output_embeddings()  # type: ignore[attr-defined]
        targets: Any = labels
        if rows is not None:
            head = rows.extend(head)
            targets = labels if labels is None or tokens is None else two_hot_targets(labels, rows.grounding, tokens)
        loss = logits = None
        if labels is not None:
            loss = supervised_loss(hidden, targets, head, num_items_in_batch, smoothing)
        if labels is None or return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head(hidden[:, kept])
        result: CausalLMOutputWithPast | MoeCausalLMOutputWithPast = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **cache_argument(cache_of(outputs)),
        )
        if balances:
            balance = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
            result = MoeCausalLMOutputWithPast(**result, aux_loss=balance, router_logits=outputs.router_logits)
            if labels is not None:
                weight = self.config.router_aux_loss_coef * share_of_batch(labels, num_items_in_batch)
                result.loss = loss + weight * balance
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def target_ids(self, input_ids: Tensor, labels: Tensor, variables: Variables | None = None) -> Tensor:
        """Labels as ids that logits have: those of coordinates become the bins nearest to them.

        Args:
            input_ids, labels: int64 (batch, length).
            variables: as for ``forward``.

        Returns:
            int64 (batch, length), -100 where nothing is predicted.
        """
        tokens = self.place_coordinates(input_ids, variables)
        if tokens is None or self.grounding is None:
            return labels
        targets = two_hot_targets(labels, self.grounding, tokens)
        return torch.where(targets.fraction > 0.5, targets.upper, targets.lower)

    def place_coordinates(self, input_ids: Tensor, variables: Variables | None) -> PlacedTokens | None:
        """The tokens of a batch that stand for coordinates, None for a model without tables of them."""
        if self.grounding is not None and self.grounding.has_tables:
            return place_tokens(input_ids, self.grounding, variables)
        if variables is not None and any(any((row or {}).values()) for row in variables):
            raise ValueError(
                "variables (coordinates) were given, but this model has no coordinate tables; train it with --stage 2"
            )
        return None

    def embed_multimodal(
        self,
        input_ids: Tensor,
        images: list[Tensor] | Tensor | None,
        modalities: list[MediaKind] | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        rows: CoordinateRows | None = None,
        tokens: PlacedTokens | None = None,
    ) -> Tensor | None:
        """Embeddings of a batch with its media and coordinates in place, or None for plain text.

        Args:
            input_ids: int64 (batch, length).
            images, modalities, image_sizes: as for ``forward``.
            rows, tokens: of the step, for a model with tables of coordinates.

        Returns:
            (batch, length, width). Plain text gives None, so that it takes the backbone's own way from
            ids to logits; only a model with tables of coordinates, and a rank among several, embeds it here
            as it does a batch with media: ranks must call the same modules in the same order.
        """
        model, vision = self.get_model(), self.vision
        media = (images, modalities, image_sizes, rows) if images is not None and len(images) else None
        if media is None and rows is None and (vision is None or not self._is_rank()):
            return None
        if self._is_rank() and self.training and torch.is_grad_enabled():
            features = encode_through_gate(model, media)
        else:
            features = [] if media is None else model.encode_media(*media)
        assert vision is not None
        embed = self.get_input_embeddings()
        if rows is not None and tokens is not None:
            embeddings = embed_tokens(input_ids, embed, rows, tokens)
        else:
            embeddings = embed(input_ids)
        return splice(input_ids, embeddings, features, vision.visual_token_ids)

    def decoder_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """What a decoder wants to know about a batch with media, beside its embeddings; most want nothing."""
        return {}

    def _is_rank(self) -> bool:
        """Whether this process is one of a group, whose other ranks may hold other modalities."""
        return is_distributed()
