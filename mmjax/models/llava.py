"""LLaVA-1.5: CLIP patches through a two-layer projector into Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from mmjax.hf_config import image_options
from mmjax.models import decoder_vlm
from mmjax.nn.decoder import DecoderConfig
from mmjax.nn.encoder import Features
from mmjax.nn.vision.clip import ClipConfig, ClipVisionEncoder
from mmjax.nn.vision.pixels import PixelNorm
from mmjax.nn.vision.projector import Projector
from mmjax.processors.llava import image_fields
from mmjax.spec import EncoderSpec, ModelSpec

LLAMA_DEFAULTS = {  # of transformers' LlamaConfig; the published text_config leaves them out
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. drop_class: whether the embedding of the class token is dropped."""

    vision: ClipConfig
    act: str
    drop_class: bool
    pixels: PixelNorm

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json."""
        layer = config["vision_feature_layer"]
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer must be one layer, got {layer}")
        return cls(
            text=DecoderConfig.from_hf(LLAMA_DEFAULTS | config["text_config"], bias=False, tie_embeddings=tied),
            vision=ClipConfig.from_hf(config["vision_config"], layer),
            act=config.get("projector_hidden_act", "gelu"),
            drop_class=config.get("vision_feature_select_strategy", "default") == "default",
            pixels=PixelNorm.from_hf(image_options(files)),
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        num_embeds = self.vision.grid_size**2 + (not self.drop_class)
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
        self.vision = ClipVisionEncoder(c.vision)
        self.projector = Projector(c.vision.tower.hidden_size, c.text.hidden_size, c.act)
        self.c = c

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        x = self.vision.encode(self.c.pixels.normalize(features["pixels"], axis=1))
        x = self.projector(x[:, 1:] if self.c.drop_class else x)
        return x.reshape(-1, x.shape[-1])
