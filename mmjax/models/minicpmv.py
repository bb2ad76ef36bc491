"""MiniCPM-V 2.6: SigLIP over slices of any shape, a resampler from each to a fixed number of embeddings, and Qwen2.

An encoder input is a patch. Slices are packed end to end without padding, each with its own segment id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from mmjax.hf_config import image_options
from mmjax.models import decoder_vlm
from mmjax.nn.encoder import Features
from mmjax.nn.norm import layer_norm
from mmjax.nn.text_config import decoder_config
from mmjax.nn.vision.pixels import PixelNorm
from mmjax.nn.vision.siglip import SiglipConfig, SiglipVisionEncoder
from mmjax.nn.weight import weight, weight_einsum
from mmjax.processors.minicpmv import AREA_FACTOR, patch_fields
from mmjax.sharding import round_up
from mmjax.spec import EncoderSpec, ModelSpec

VERSION = 2.6  # versions 2.0 and 2.5 have the same architecture in config.json and are other models
EPS = 1e-6  # of the resampler's norms; config.json does not name it
HEAD_DIM = 128  # of the resampler, which has width / HEAD_DIM heads
MIN_FRAMES = 64  # frames of the longest video that fits in every configuration
NO_SEGMENT = np.iinfo(np.int32).max
MASKED = float(np.finfo(np.float32).min)  # finite: where there is no slice, every scores is masked


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. num_queries: embeddings of a slice. num_heads: of the resampler. slice_patches: patches of a square slice;
    others have about as many. max_slices: of the largest image, without the global view.
    """

    vision: SiglipConfig
    pixels: PixelNorm
    num_queries: int
    num_heads: int
    slice_patches: int
    max_slices: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json. Raises ValueError for another version than 2.6."""
        if config["version"] != VERSION:
            raise ValueError(f"MiniCPM-V {config['version']} is another model; only {VERSION} is supported")
        preprocessor = image_options(files)
        layer = -2 if config.get("drop_vision_last_layer", True) else -1
        vision = SiglipConfig.from_hf(config["vision_config"], layer, last_norm=True)
        mean, std = preprocessor["norm_mean"], preprocessor["norm_std"]
        return cls(
            text=decoder_config(config, "qwen2", tied=tied),
            vision=vision,
            pixels=PixelNorm(1 / 255, tuple(mean), tuple(std)),
            num_queries=config["query_num"],
            num_heads=config["hidden_size"] // HEAD_DIM,
            slice_patches=(preprocessor["scale_resolution"] // vision.patch_size) ** 2,
            max_slices=preprocessor["max_slice_nums"],
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        group_size = max(1, self.slice_patches // AREA_FACTOR)  # no slice has fewer patches
        # the slices of few images have more than 9/8 as many patches as square slices
        max_patches = max(self.max_slices + 1, MIN_FRAMES) * self.slice_patches * 9 // 8
        encoder = EncoderSpec(
            patch_fields(self.vision.patch_dim),
            modalities=("image", "video"),
            group_size=group_size,
            embeds_per_group=self.num_queries,
            max_item_inputs=round_up(max_patches, group_size),
        )
        return dataclasses.replace(
            super().spec,
            mm_embed_dim=self.text.hidden_size,
            encoders={"vision": encoder},
            max_item_embeds=(self.max_slices + 1) * self.num_queries,
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(
            self,
            text=self.text.for_tp(tp_size),
            vision=self.vision.for_tp(tp_size),
            num_heads=round_up(self.num_heads, tp_size),
        )


class Resampler(nnx.Module):
    """Cross attention of learned queries over the patches of each slice, with sinusoidal positions."""

    def __init__(self, c: Config) -> None:
        width, n, h = c.text.hidden_size, c.num_heads, HEAD_DIM
        self.query = weight(c.num_queries, width, axes=("position", "embed"))
        self.key = weight(c.vision.tower.hidden_size, width, axes=("embed", "embed_out"))
        self.query_norm = weight(width, axes=("embed",))
        self.query_norm_bias = weight(width, axes=("embed",))
        self.key_norm = weight(width, axes=("embed",))
        self.key_norm_bias = weight(width, axes=("embed",))
        self.qkv = weight(width, 3, n, h, axes=("embed", "pair", "heads", "head_dim"))
        self.qkv_bias = weight(3, n, h, axes=("pair", "heads", "head_dim"))
        self.o = weight(n, h, width, axes=("heads", "head_dim", "embed"))
        self.o_bias = weight(width, axes=("embed",))
        self.last_norm = weight(width, axes=("embed",))
        self.last_norm_bias = weight(width, axes=("embed",))
        self.out = weight(width, width, axes=("embed", "embed_out"))
        self.c = c

    @jax.named_scope("resampler")
    def __call__(
        self, x: Float[Array, "U C"], patch_coords: Int[Array, "U 2"], segment_ids: Int[Array, "U"], num_slices: int
    ) -> Float[Array, "E D"]:
        """The embeddings of all slices; slice s is segment s. patch_coords: (row, column) of a patch in its slice."""
        query = layer_norm(self.query[...], self.query_norm[...], self.query_norm_bias[...], EPS)
        value = layer_norm(x @ self.key[...], self.key_norm[...], self.key_norm_bias[...], EPS)
        key = value + sincos_2d(patch_coords, value.shape[-1]).astype(value.dtype)
        q, k, v = (
            weight_einsum("ud,dnh->unh", part, self.qkv[:, j]) + self.qkv_bias[j]
            for j, part in enumerate((query, key, value))
        )
        y = self._attend(q, k, v, segment_ids, num_slices)
        y = self.o.einsum("qnh,nhd->qd", y) + self.o_bias[...]
        return layer_norm(y, self.last_norm[...], self.last_norm_bias[...], EPS) @ self.out[...]

    def _attend(
        self,
        q: Float[Array, "queries N H"],
        k: Float[Array, "U N H"],
        v: Float[Array, "U N H"],
        segment_ids: Int[Array, "U"],
        num_slices: int,
    ) -> Float[Array, "E N H"]:
        """All queries over the keys of each slice; E = num_slices * queries."""
        max_keys = min(k.shape[0], AREA_FACTOR * self.c.slice_patches)  # of a slice
        segment_ids = jnp.where(segment_ids < 0, NO_SEGMENT, segment_ids)
        first = jnp.searchsorted(segment_ids, jnp.arange(num_slices, dtype=segment_ids.dtype))

        def attend_slice(segment: tuple[Int[Array, ""], Int[Array, ""]]) -> Float[Array, "queries N H"]:
            number, start = segment
            ids, keys, values = (jax.lax.dynamic_slice_in_dim(a, start, max_keys) for a in (segment_ids, k, v))
            scores = jnp.einsum("qnh,unh->nqu", q, keys, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
            scores = jnp.where(ids == number, scores, MASKED)
            return jnp.einsum("nqu,unh->qnh", jax.nn.softmax(scores).astype(values.dtype), values)

        out = jax.lax.map(attend_slice, (jnp.arange(num_slices, dtype=segment_ids.dtype), first))
        return out.reshape(-1, *q.shape[1:])


def sincos_2d(coords: Int[Array, "U 2"], width: int) -> Float32[Array, "U {width}"]:
    """Sinusoidal positions of (row, column): sines and cosines of the column, then of the row."""
    num_freqs = width // 4
    inv_freq = 1.0 / 10000 ** (np.arange(num_freqs, dtype=np.float32) / np.float32(num_freqs))
    angle = coords[:, ::-1].astype(jnp.float32)[:, :, None] * jnp.asarray(inv_freq, jnp.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(-1, width)


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.vision = SiglipVisionEncoder(c.vision)
        self.resampler = Resampler(c)
        self.c = c

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        pixels, segment_ids = features["pixels"], features["segment_ids"]
        num_inputs = pixels.shape[0]
        x = self.c.pixels.normalize(pixels.reshape(num_inputs, 3, -1), axis=1).reshape(num_inputs, -1)
        x = self.vision.encode_patches(x, features["position_ids"], segment_ids)
        return self.resampler(
            x, features["patch_coords"], segment_ids, num_inputs // self.c.spec.encoders["vision"].group_size
        )
