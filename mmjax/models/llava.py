"""LLaVA-1.5 and its kin: patches of CLIP or SigLIP through a two-layer projector into Llama or another text model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from mmjax.hf_config import image_options
from mmjax.models import decoder_vlm
from mmjax.nn.encoder import Features
from mmjax.nn.text_config import ANY, decoder_config
from mmjax.nn.vision.pixels import PixelNorm
from mmjax.nn.vision.projector import Projector, ProjectorConfig
from mmjax.nn.vision.tower import CLIP, TowerConfig, drops_first, make_tower, tower_config
from mmjax.processors.llava import image_fields
from mmjax.spec import EncoderSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. drop_first: whether the first position of an image, CLIP's class token, is dropped."""

    vision: TowerConfig
    projector: ProjectorConfig
    drop_first: bool
    pixels: PixelNorm

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json. Raises ValueError for what is not supported."""
        text = decoder_config(config["text_config"], "llama", tied=tied, choice=ANY)
        vision = tower_config(config, CLIP, layer=-2)
        return cls(
            text=text,
            vision=vision,
            projector=ProjectorConfig.from_hf(config, vision.tower.output_dim, text.hidden_size),
            drop_first=drops_first(config, "default"),
            pixels=PixelNorm.from_hf(image_options(files)),
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        num_embeds = self.vision.num_positions - self.drop_first
        encoder = EncoderSpec(image_fields(self.vision.image_size), ("image",), embeds_per_group=num_embeds)
        return dataclasses.replace(
            super().spec, mm_embed_dim=self.text.hidden_size, encoders={"vision": encoder}, max_item_embeds=num_embeds
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, text=self.text.for_tp(tp_size), vision=self.vision.for_tp(tp_size))


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.vision = make_tower(c.vision)
        self.projector = Projector(c.projector)
        self.c = c

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        x = self.vision.encode(self.c.pixels.normalize(features["pixels"], axis=1))
        x = self.projector(x[:, 1:] if self.c.drop_first else x)
        return x.reshape(-1, x.shape[-1])
