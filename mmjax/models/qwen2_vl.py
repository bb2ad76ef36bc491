"""Qwen2-VL: patches of any number in one packed row, two-dimensional rope in the tower, three-axis rope in the text."""

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
from mmjax.nn.rope import Rope
from mmjax.nn.tower import Tower, TowerConfig, gelu
from mmjax.nn.weight import weight

EPS = 1e-6  # of the tower's norms; the config does not name it


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes. A patch is `frames` x `patch` x `patch` pixels; `merge` x `merge` patches become one row.

    largest: rows of the largest image that the preprocessor lets through.
    """

    text: DecoderConfig
    vision: TowerConfig
    patch: int
    frames: int
    merge: int
    pixels: Pixels
    largest: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json (flat as published, or with a text_config) and preprocessor_config.json."""
        vision = config["vision_config"]
        heads = vision["num_heads"]
        images = files["preprocessor_config.json"]
        area = images.get("max_pixels") or images["size"]["longest_edge"]  # both are areas, whatever the name says
        return cls(
            text=DecoderConfig.from_hf(config.get("text_config", config), bias=True, tied=tied),
            vision=TowerConfig(
                width=vision["embed_dim"],
                depth=vision["depth"],
                heads=heads,
                head_dim=vision["embed_dim"] // heads,
                mlp=int(vision["embed_dim"] * vision["mlp_ratio"]),
                eps=EPS,
                act=vision.get("hidden_act", "quick_gelu"),
            ),
            patch=vision["patch_size"],
            frames=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"],
            pixels=Pixels.from_hf(images),
            largest=area // (vision["patch_size"] * vision["spatial_merge_size"]) ** 2,
        )

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return 3 * self.frames * self.patch**2

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        t = self.text
        encoder = Encoder(
            features={
                "pixels": ((self.patch_values,), "uint8", 0),
                "place": ((2,), "int32", 0),
                "segment": ((), "int32", -1),
            },
            kinds=("image", "video"),
            grain=self.merge**2,
            rows=1,
            numbered=("segment",),
        )
        return Shape(
            layers=t.depth,
            kv_heads=t.kv_heads,
            head_dim=t.head_dim,
            vocab=t.vocab,
            width=t.width,
            max_len=t.max_len,
            rope_rows=t.rope.rows,
            slab_width=t.width,
            encoders={"vision": encoder},
            largest_item=self.largest,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, text=self.text.split(ways), vision=self.vision.split(ways))


class Vision(Tower):
    """The patch tower and the merger that turns squares of patches into rows."""

    def __init__(self, c: Config) -> None:
        super().__init__(c.vision)
        d, square = c.vision.width, c.merge**2 * c.vision.width
        self.patch = weight(c.patch_values, d, axes=("patch", "embed"))
        self.merge_norm = weight(d, axes=("embed",))
        self.merge_norm_bias = weight(d, axes=("embed",))
        self.merge1 = weight(square, square, axes=("embed", "mlp"))
        self.merge1_bias = weight(square, axes=("mlp",))
        self.merge2 = weight(square, c.text.width, axes=("mlp", "embed"))
        self.merge2_bias = weight(c.text.width, axes=("embed",))
        self.c = c

    def angles(self, place: jax.Array) -> jax.Array:
        """f32[U, H/2]: the first half of the slots turns by the patch's row, the second by its column, i32[U, 2]."""
        half = self.c.vision.head_dim // 2
        inverse = jnp.asarray(Rope.from_hf(half, 10000.0, None).inverse, jnp.float32)
        return (place.astype(jnp.float32)[:, :, None] * inverse).reshape(-1, half)

    def rows(self, pixels: jax.Array, place: jax.Array, segment: jax.Array) -> jax.Array:
        """u8[U, values] patches, i32[U, 2] places and i32[U] segments (one per frame) to [U / merge**2, D]."""
        c = self.c
        x = c.pixels.normalise(pixels.reshape(-1, 3, c.frames * c.patch**2), axis=1)
        x = x.reshape(pixels.shape).astype(self.patch.dtype) @ self.patch[...]
        x = self(x, segment, angles=self.angles(place))
        x = layer_norm(x, self.merge_norm[...], self.merge_norm_bias[...], EPS)
        x = x.reshape(-1, c.merge**2 * x.shape[-1])
        return gelu(x @ self.merge1[...] + self.merge1_bias[...]) @ self.merge2[...] + self.merge2_bias[...]


class Model(nnx.Module):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)
        self.vision = Vision(c)

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        return self.text(batch, pool, slab)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        return self.vision.rows(features["pixels"], features["place"], features["segment"])
