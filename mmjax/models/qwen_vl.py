"""Base of the Qwen vision families: a decoder and a vision tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from mmjax.models import decoder_vlm
from mmjax.nn.encoder import Features
from mmjax.nn.vision.qwen_vl import QwenVisionConfig, QwenVisionEncoder
from mmjax.processors.qwen_vl import patch_fields
from mmjax.spec import EncoderSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. max_item_embeds: embeddings of the largest item that the preprocessor yields."""

    vision: QwenVisionConfig
    max_item_embeds: int

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        v = self.vision
        encoder = EncoderSpec(
            patch_fields(v.patch_dim, windows=v.full_attention_layers is not None, position_grid=v.position_grid > 0),
            modalities=("image", "video"),
            group_size=v.patches_per_embed,
            embeds_per_group=1,
        )
        return dataclasses.replace(
            super().spec,
            mm_embed_dim=v.mm_embed_dim,
            encoders={"vision": encoder},
            max_item_embeds=self.max_item_embeds,
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, text=self.text.for_tp(tp_size), vision=self.vision.for_tp(tp_size))


def max_pixels(options: Mapping[str, Any], default: int = 28 * 28 * 1280) -> int:
    """The largest area that a processor's options allow; `max_pixels` and `size` are both areas. default: of the
    published processor."""
    size = options.get("size") or {}
    return int(options.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or default)


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.vision = QwenVisionEncoder(c.vision)

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        return self.vision(features)
