"""MiniCPM-V 2.6: SigLIP over slices of any shape, a resampler that turns each into the same number of rows, Qwen2.

A unit is a patch; slices lie end to end, each with its own segment number, and nothing is padded between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models import reader
from mmjax.models.family import Encoder, Shape
from mmjax.nn.decoder import DecoderConfig
from mmjax.nn.norm import layer_norm
from mmjax.nn.pixels import Pixels
from mmjax.nn.siglip import Siglip, SiglipConfig
from mmjax.nn.weight import product, weight
from mmjax.sharding import up

VERSION = 2.6  # the architecture's name also stands for 2.0 and 2.5, which are other models
EPS = 1e-6  # of the resampler's norms; the config does not name it
HEAD_DIM = 128  # of the resampler; its heads follow from the width
FRAMES = 64  # of a video that always fit
FAR = np.iinfo(np.int32).max
LOW = float(np.finfo(np.float32).min)  # not infinity: a slot without a slice has no finite score at all


@dataclasses.dataclass(frozen=True)
class Config(reader.Config):
    """Sizes. area: patches of a slice, about; slices: of the largest picture, without the view of the whole.

    queries: rows that a slice becomes. heads: of the resampler.
    """

    vision: SiglipConfig
    pixels: Pixels
    queries: int
    heads: int
    area: int
    slices: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json. Raises ValueError for another version than 2.6."""
        if config["version"] != VERSION:
            raise ValueError(f"MiniCPM-V {config['version']} is another model; only {VERSION} is supported")
        prepare = files["preprocessor_config.json"]
        layer = -2 if config.get("drop_vision_last_layer", True) else -1
        vision = SiglipConfig.from_hf(config["vision_config"], layer, last_norm=True)
        mean, std = prepare["norm_mean"], prepare["norm_std"]
        return cls(
            text=DecoderConfig.from_hf(config, bias=True, tied=tied),
            vision=vision,
            pixels=Pixels(1 / 255, tuple(mean), tuple(std)),
            queries=config["query_num"],
            heads=config["hidden_size"] // HEAD_DIM,
            area=(prepare["scale_resolution"] // vision.patch) ** 2,
            slices=prepare["max_slice_nums"],
        )

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        grain = max(1, self.area // 2)  # no slice has fewer patches
        largest = max(self.slices + 1, FRAMES) * self.area * 9 // 8  # few have more than an eighth above the area
        encoder = Encoder(
            features={
                "pixels": ((self.vision.patch_values,), "uint8", 0),
                "position": ((), "int32", 0),
                "place": ((2,), "int32", 0),
                "segment": ((), "int32", -1),
            },
            kinds=("image", "video"),
            grain=grain,
            rows=self.queries,
            numbered=("segment",),
            largest=up(largest, grain),
        )
        return dataclasses.replace(
            super().shape,
            slab_width=self.text.width,
            encoders={"vision": encoder},
            largest_item=(self.slices + 1) * self.queries,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(
            self, text=self.text.split(ways), vision=self.vision.split(ways), heads=up(self.heads, ways)
        )


class Resampler(nnx.Module):
    """One attention of learned queries over the patches of each slice, placed by sines and cosines."""

    def __init__(self, c: Config) -> None:
        width, n, h = c.text.width, c.heads, HEAD_DIM
        self.query = weight(c.queries, width, axes=("place", "embed"))
        self.key = weight(c.vision.tower.width, width, axes=("embed", "embed_out"))
        self.query_norm = weight(width, axes=("embed",))
        self.query_norm_bias = weight(width, axes=("embed",))
        self.key_norm = weight(width, axes=("embed",))
        self.key_norm_bias = weight(width, axes=("embed",))
        self.qkv = weight(width, n, 3, h, axes=("embed", "heads", "pair", "head_dim"))
        self.qkv_bias = weight(n, 3, h, axes=("heads", "pair", "head_dim"))
        self.o = weight(n, h, width, axes=("heads", "head_dim", "embed"))
        self.o_bias = weight(width, axes=("embed",))
        self.last_norm = weight(width, axes=("embed",))
        self.last_norm_bias = weight(width, axes=("embed",))
        self.out = weight(width, width, axes=("embed", "embed_out"))
        self.c = c

    def __call__(self, x: jax.Array, place: jax.Array, segment: jax.Array, slices: int) -> jax.Array:
        """Patches [U, C] at (row, column) i32[U, 2] to [slices * queries, D]; slice s is segment s."""
        query = layer_norm(self.query[...], self.query_norm[...], self.query_norm_bias[...], EPS)
        value = layer_norm(x @ self.key[...], self.key_norm[...], self.key_norm_bias[...], EPS)
        key = value + waves(place, value.shape[-1]).astype(value.dtype)
        q, k, v = (
            product("ud,dnh->unh", part, self.qkv[:, :, j]) + self.qkv_bias[:, j]
            for j, part in enumerate((query, key, value))
        )
        y = self._attend(q, k, v, segment, slices)
        y = self.o.einsum("qnh,nhd->qd", y) + self.o_bias[...]
        return layer_norm(y, self.last_norm[...], self.last_norm_bias[...], EPS) @ self.out[...]

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, slices: int) -> jax.Array:
        """q [Q, N, H] over each slice's k, v [U, N, H]: [slices * Q, N, H]."""
        window = min(k.shape[0], 2 * self.c.area)  # no slice has more patches
        segment = jnp.where(segment < 0, FAR, segment)
        first = jnp.searchsorted(segment, jnp.arange(slices, dtype=segment.dtype))

        def one(at: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, start = at
            mine, keys, values = (jax.lax.dynamic_slice_in_dim(a, start, window) for a in (segment, k, v))
            score = jnp.einsum("qnh,unh->nqu", q, keys, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
            score = jnp.where(mine == number, score, LOW)
            return jnp.einsum("nqu,unh->qnh", jax.nn.softmax(score).astype(values.dtype), values)

        found = jax.lax.map(one, (jnp.arange(slices, dtype=segment.dtype), first))
        return found.reshape(-1, *q.shape[1:])


def waves(place: jax.Array, width: int) -> jax.Array:
    """Places (row, column) i32[U, 2] as f32[U, width]: sines and cosines of the column, then of the row."""
    slots = width // 4
    rate = 1.0 / 10000 ** (np.arange(slots, dtype=np.float32) / np.float32(slots))
    angle = place[:, ::-1].astype(jnp.float32)[:, :, None] * jnp.asarray(rate, jnp.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(-1, width)


class Model(reader.Model):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.vision = Siglip(c.vision)
        self.resampler = Resampler(c)
        self.c = c

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        """position: of each patch in the tower's table; place: its row and column in its slice."""
        pixels, segment = features["pixels"], features["segment"]
        units = pixels.shape[0]
        x = self.c.pixels.normalise(pixels.reshape(units, 3, -1), axis=1).reshape(units, -1)
        x = self.vision.rows(x, features["position"], segment)
        return self.resampler(x, features["place"], segment, units // self.c.shape.encoders["vision"].grain)
