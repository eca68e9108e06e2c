"""Vision towers: from frames to patch features. Importing this package registers them."""

from llava.model.multimodal_encoder import hf, timm  # noqa: F401
