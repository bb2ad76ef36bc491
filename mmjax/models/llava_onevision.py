"""LLaVA-OneVision: an image tower over an image and over crops of it at a higher resolution, and a text model; as
published, SigLIP and Qwen2.

The number of crops does not determine the number of embeddings: margins are cut off, large images and video frames are
scaled down after the tower, and each row of patches ends with a newline. So a field of the encoder says which patches
each embedding is made from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.hf_config import image_options
from mmjax.models import decoder_vlm
from mmjax.nn.encoder import Features
from mmjax.nn.text_config import ANY, decoder_config
from mmjax.nn.vision.pixels import PixelNorm
from mmjax.nn.vision.projector import Projector, ProjectorConfig
from mmjax.nn.vision.tower import SIGLIP, TowerConfig, drops_first, make_tower, tower_config
from mmjax.nn.weight import weight
from mmjax.processors.llava_onevision import NEWLINE, SLACK, crop_fields
from mmjax.spec import EncoderSpec, ModelSpec

MIN_FRAMES = 64  # frames of the longest video that fits in every configuration


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. drop_first: whether the first position of a crop, CLIP's class token, is dropped. max_crops,
    max_item_embeds: crops, without the global view, and embeddings of the largest image."""

    vision: TowerConfig
    projector: ProjectorConfig
    drop_first: bool
    pixels: PixelNorm
    max_crops: int
    max_item_embeds: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json. Raises ValueError for a layout that is not supported."""
        text = decoder_config(config["text_config"], "qwen2", tied=tied, choice=ANY)
        vision, drop_first = tower_config(config, SIGLIP, layer=-1), drops_first(config, "full")
        if vision.num_positions - drop_first != vision.grid_size**2:
            strategy = config.get("vision_feature_select_strategy")
            raise ValueError(
                f"config.json: vision_feature_select_strategy {strategy!r} is not supported with this tower: all "
                "patches and no class token are left by 'full' with SigLIP, and by 'default' with CLIP"
            )
        patches, aspect = vision.grid_size**2, config.get("vision_aspect_ratio", "anyres_max_9")
        max_patches = int(SLACK**2 * int(aspect.removeprefix("anyres_max_")) * patches)  # larger images are scaled down
        grids = [
            (height // vision.image_size, width // vision.image_size)
            for height, width in config["image_grid_pinpoints"]
        ]
        return cls(
            text=text,
            vision=vision,
            projector=ProjectorConfig.from_hf(config, vision.tower.output_dim, text.hidden_size),
            drop_first=drop_first,
            pixels=PixelNorm.from_hf(image_options(files)),
            max_crops=max(math.prod(grid) for grid in grids),
            max_item_embeds=patches
            + max(min(math.prod(grid) * patches, max_patches) + grid[0] * vision.grid_size for grid in grids),
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        grid = self.vision.grid_size
        patches = grid**2
        encoder = EncoderSpec(
            crop_fields(self.vision.image_size, patches),
            modalities=("image", "video"),
            embeds_per_group=patches + grid,  # in a column of crops, each row of patches adds a newline
            max_item_inputs=max(self.max_crops + 1, MIN_FRAMES),
        )
        return dataclasses.replace(
            super().spec,
            mm_embed_dim=self.text.hidden_size,
            encoders={"vision": encoder},
            max_item_embeds=self.max_item_embeds,
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, text=self.text.for_tp(tp_size), vision=self.vision.for_tp(tp_size))


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`. newline: the embedding at the end of a row of patches."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.vision = make_tower(c.vision)
        self.projector = Projector(c.projector)
        self.newline = weight(c.text.hidden_size, axes=("embed",))
        self.c = c

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        index, weights = features["source_index"], features["source_weight"]
        x = self.vision.encode(self.c.pixels.normalize(features["pixels"], axis=1))
        x = self.projector(x[:, 1:] if self.c.drop_first else x)
        x = x.reshape(-1, x.shape[-1])
        with jax.named_scope("gather"):
            total = jnp.zeros((), jnp.float32)
            for j in range(4):  # one at a time: all four together would be by far the largest array
                part = jnp.take(x, index[:, j], axis=0, mode="clip").astype(jnp.float32)
                total = total + part * weights[:, j, None]
            return jnp.where(index[:, :1] == NEWLINE, self.newline[...], total.astype(x.dtype))
