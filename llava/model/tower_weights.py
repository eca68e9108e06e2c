"""Where a model's tower comes from and whether its weights join the checkpoints, the same for every backbone."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import Tensor

from llava.config import VisionConfig
from llava.io import apply_umask
from llava.model.lora import has_adapters, save_adapters


class TowerWeights:
    """The part of ``LlavaMetaForCausalLM`` that reads and writes checkpoints."""

    config: Any
    get_model: Any
    _keys_to_ignore_on_save: Any
    _keys_to_ignore_on_load_missing: Any

    @classmethod
    def from_pretrained(cls, *args: Any, vision_tower: str | None = None, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained``; a frozen tower's weights come from their own source.

        Args:
            vision_tower: another place of the same tower, where it has moved; its weights must hash
                to what the checkpoint says.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.vision is not None:
            # Loading replaces parameters, and with them what the structure said about gradients.
            model.get_vision_tower().requires_grad_(False)
            if not model.vision.save_vision_tower:
                model.load_vision_tower(vision_tower)
        return loaded

    def load_vision_tower(self, source: str | None = None) -> None:
        """Fill the tower with its weights.

        Args:
            source: folder or hub name; by default what the configuration says. What it is goes into the
                configuration, with the hash of the weights.
        """
        decoder = self.get_model()
        source = source or decoder.vision.vision_tower
        found = decoder.vision_tower.load_weights(source)
        source = os.path.abspath(source) if os.path.isdir(source) else source
        self.set_vision(replace(decoder.vision, vision_tower=source, vision_tower_hash=found))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; a model with adapters leaves these and its vision modules, not its base."""
        if state_dict is not None:
            # DeepSpeed copies what is tied, and a file would hold the embeddings twice.
            tied: Any = self.all_tied_weights_keys  # type: ignore[attr-defined]
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        if not has_adapters(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)  # type: ignore[misc]
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
        decoder.vision = vision
        self.config.update(vision.to_model_config())
        self.keep_tower_weights_out(not vision.save_vision_tower)

    def keep_trained_tower(self) -> None:
        """Let checkpoints hold the tower's weights: trained ones stand nowhere else."""
        self.set_vision(replace(self.get_model().vision, save_vision_tower=True))

    def keep_tower_weights_out(self, out: bool) -> None:
        """Whether checkpoints leave the tower's weights to their source (its name and hash are in the config)."""
        names = {name for name, _ in self.named_parameters() if ".vision_tower." in name}  # type: ignore[attr-defined]
        names |= {name for name, _ in self.named_buffers() if ".vision_tower." in name}  # type: ignore[attr-defined]
        pattern = r"\.vision_tower\."
        if out:
            self._keys_to_ignore_on_save = set(self._keys_to_ignore_on_save or ()) | names
            self._keys_to_ignore_on_load_missing = set(self._keys_to_ignore_on_load_missing or ()) | {pattern}
        else:
            self._keys_to_ignore_on_save = set(self._keys_to_ignore_on_save or ()) - names
            self._keys_to_ignore_on_load_missing = set(self._keys_to_ignore_on_load_missing or ()) - {pattern}

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        # Random values for hundreds of millions of tower weights that load_weights is about to overwrite.
        decoder = self.get_model()
        if decoder.vision is not None and not decoder.vision.save_vision_tower:
            for parameter in decoder.vision_tower.parameters():
                parameter._is_hf_initialized = True
        super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]
