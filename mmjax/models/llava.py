"""LLaVA-1.5: CLIP patches through a two-layer projector into Llama."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.models.family import Encoder, Shape
from mmjax.nn.decoder import Decoder, DecoderConfig
from mmjax.nn.norm import layer_norm
from mmjax.nn.pixels import Pixels
from mmjax.nn.tower import ACTIVATIONS, Tower, TowerConfig
from mmjax.nn.weight import weight

LLAMA = {  # what LlamaConfig fills in when the published text_config leaves it out
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}
CLIP = {  # what CLIPVisionConfig fills in
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; `drop_class` when the class token's row is not handed to the language model."""

    text: DecoderConfig
    vision: TowerConfig
    image: int
    patch: int
    act: str
    drop_class: bool
    pixels: Pixels

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json."""
        vision = CLIP | config["vision_config"]
        layer = config["vision_feature_layer"]
        if not isinstance(layer, int):
            raise ValueError(f"vision_feature_layer must be one layer, got {layer}")
        depth = vision["num_hidden_layers"]
        heads = vision["num_attention_heads"]
        return cls(
            text=DecoderConfig.from_hf(LLAMA | config["text_config"], bias=False, tied=tied),
            vision=TowerConfig(
                width=vision["hidden_size"],
                depth=layer if layer >= 0 else depth + 1 + layer,  # hidden state 0 is before the first block
                heads=heads,
                head_dim=vision["hidden_size"] // heads,
                mlp=vision["intermediate_size"],
                eps=vision["layer_norm_eps"],
                act=vision["hidden_act"],
            ),
            image=vision["image_size"],
            patch=vision["patch_size"],
            act=config.get("projector_hidden_act", "gelu"),
            drop_class=config.get("vision_feature_select_strategy", "default") == "default",
            pixels=Pixels.from_hf(files["preprocessor_config.json"]),
        )

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image // self.patch) ** 2

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        t = self.text
        rows = self.patches + (not self.drop_class)
        encoder = Encoder(features={"pixels": ((3, self.image, self.image), "uint8", 0)}, kinds=("image",), rows=rows)
        return Shape(
            layers=t.depth,
            kv_heads=t.kv_heads,
            head_dim=t.head_dim,
            vocab=t.vocab,
            width=t.width,
            max_len=t.max_len,
            slab_width=t.width,
            encoders={"vision": encoder},
            largest_item=rows,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, text=self.text.split(ways), vision=self.vision.split(ways))


class Vision(Tower):
    """CLIP's image tower up to the chosen layer."""

    def __init__(self, c: Config) -> None:
        super().__init__(c.vision)
        d = c.vision.width
        self.class_embed = weight(d, axes=("embed",))
        self.patch = weight(3 * c.patch * c.patch, d, axes=("patch", "embed"))
        self.positions = weight(1 + c.patches, d, axes=("place", "embed"))
        self.pre_norm = weight(d, axes=("embed",))
        self.pre_norm_bias = weight(d, axes=("embed",))
        self.c = c

    def rows(self, pixels: jax.Array) -> jax.Array:
        """u8[U, 3, image, image] to [U, 1 + patches, C]."""
        c, side = self.c, self.c.image // self.c.patch
        x = c.pixels.normalise(pixels, axis=1).astype(self.patch.dtype)
        x = x.reshape(-1, 3, side, c.patch, side, c.patch).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1, c.patches, 3 * c.patch * c.patch) @ self.patch[...]
        first = jnp.broadcast_to(self.class_embed[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        x = layer_norm(x, self.pre_norm[...], self.pre_norm_bias[...], c.vision.eps)
        units, places, width = x.shape
        segment = jnp.arange(units * places, dtype=jnp.int32) // places
        return self(x.reshape(-1, width), segment, uniform=places).reshape(units, places, width)


class Projector(nnx.Module):
    """Two dense layers from the tower's width to the language model's."""

    def __init__(self, c: Config) -> None:
        self.fc1 = weight(c.vision.width, c.text.width, axes=("embed", "embed_out"))
        self.fc1_bias = weight(c.text.width, axes=("embed_out",))
        self.fc2 = weight(c.text.width, c.text.width, axes=("embed", "embed_out"))
        self.fc2_bias = weight(c.text.width, axes=("embed_out",))
        self.act = c.act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., D]."""
        return ACTIVATIONS[self.act](x @ self.fc1[...] + self.fc1_bias[...]) @ self.fc2[...] + self.fc2_bias[...]


class Model(nnx.Module):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)
        self.vision = Vision(c)
        self.projector = Projector(c)
        self.c = c

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        return self.text(batch, pool, slab)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        x = self.vision.rows(features["pixels"])
        x = self.projector(x[:, 1:] if self.c.drop_class else x)
        return x.reshape(-1, x.shape[-1])
