"""Phi-3.5-vision and VLM2Vec: CLIP over square crops and a global view of an image, learned separators, and Phi-3."""

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
from mmjax.nn.activations import gelu
from mmjax.nn.encoder import Features
from mmjax.nn.text_config import decoder_config
from mmjax.nn.vision.clip import ClipConfig, ClipVisionEncoder
from mmjax.nn.vision.pixels import PixelNorm
from mmjax.nn.weight import weight
from mmjax.processors.phi3_v import CLIP_IMAGE_SIZE, CLIP_PATCH_SIZE, DIVIDER, NEWLINE, crop_fields
from mmjax.spec import EncoderSpec, ModelSpec

CLIP_LARGE: Mapping[str, Any] = {  # openai/clip-vit-large-patch14-336, of which config.json has only the name
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": CLIP_IMAGE_SIZE,
    "patch_size": CLIP_PATCH_SIZE,
}
FEATURE_LAYER = -2  # the hidden state of the tower that is used, by default
MIN_CROPS = 16  # crops that fit in every configuration: the number recommended for single images
NO_VIEW = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Config(decoder_vlm.Config):
    """Sizes. max_crops: of the largest image."""

    vision: ClipConfig
    pixels: PixelNorm
    max_crops: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and preprocessor_config.json. Raises ValueError for an unsupported layout of images."""
        layout, tower = config["embd_layer"], config["img_processor"]
        order = layout.get("hd_transform_order")
        feature = tower.get("type_feature", "patch")
        if not layout.get("use_hd_transform") or not layout.get("with_learnable_separator") or feature != "patch":
            raise ValueError(f"images are laid out in a way that is not supported: {layout}, {feature} features")
        if order not in ("sub_glb", "glb_sub"):
            raise ValueError(f"hd_transform_order {order!r} is not supported; known: sub_glb, glb_sub")
        preprocessor = image_options(files)
        vision = {**CLIP_LARGE, **tower.get("vision_config", {})}
        return cls(
            text=decoder_config(config, "phi3", tied=tied),
            vision=ClipConfig.from_hf(vision, tower.get("layer_idx", FEATURE_LAYER)),
            pixels=PixelNorm.from_hf(preprocessor),
            max_crops=max(MIN_CROPS, preprocessor.get("num_crops", 0)),
        )

    @property
    def embeds_per_edge(self) -> int:
        """Embeddings along one edge of a crop. Each is made from a square of four patches."""
        return self.vision.grid_size // 2

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        edge = self.embeds_per_edge
        # n inputs (crops and the global view) in one column have n * edge rows of edge + 1 embeddings, and one divider
        max_embeds = edge * (edge + 1) + 1
        encoder = EncoderSpec(
            crop_fields(self.vision.image_size, edge),
            modalities=("image",),
            embeds_per_group=max_embeds,
            max_item_inputs=self.max_crops + 1,
        )
        return dataclasses.replace(
            super().spec,
            mm_embed_dim=self.text.hidden_size,
            encoders={"vision": encoder},
            max_item_embeds=(self.max_crops + 1) * (max_embeds - 1) + 1,
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, text=self.text.for_tp(tp_size), vision=self.vision.for_tp(tp_size))


class Projector(nnx.Module):
    """Two dense layers from a square of four patches to the language model's width."""

    def __init__(self, c: Config) -> None:
        square, width = 4 * c.vision.tower.hidden_size, c.text.hidden_size
        self.fc1 = weight(square, width, axes=("embed", "embed_out"))
        self.fc1_bias = weight(width, axes=("embed_out",))
        self.fc2 = weight(width, width, axes=("embed", "embed_out"))
        self.fc2_bias = weight(width, axes=("embed_out",))

    @jax.named_scope("projector")
    def __call__(self, x: Float[Array, "E square"]) -> Float[Array, "E D"]:
        """Squares of four patches to embeddings."""
        return gelu(x @ self.fc1[...] + self.fc1_bias[...]) @ self.fc2[...] + self.fc2_bias[...]


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`. newline: ends each row of embeddings. divider: separates crops and global view."""

    def __init__(self, c: Config) -> None:
        square = 4 * c.vision.tower.hidden_size
        super().__init__(c)
        self.vision = ClipVisionEncoder(c.vision)
        self.projector = Projector(c)
        self.newline = weight(square, axes=("embed",))
        self.divider = weight(square, axes=("embed",))
        self.c = c

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        c = self.c
        pixels = global_views(features["pixels"].astype(jnp.float32), features["crop_coords"], features["view_index"])
        x = self.vision.encode(c.pixels.normalize(pixels, axis=1))[:, 1:]
        edge, width = c.embeds_per_edge, x.shape[-1]
        x = x.reshape(-1, edge, 2, edge, 2, width).swapaxes(2, 3).reshape(-1, 4 * width)
        x = self.projector(jnp.concatenate([x, self.newline[...][None], self.divider[...][None]]))
        index, newline = features["patch_index"], x.shape[0] - 2
        index = jnp.where(index == NEWLINE, newline, jnp.where(index == DIVIDER, newline + 1, index))
        return jnp.take(x, index, axis=0, mode="clip")


@jax.named_scope("global_views")
def global_views(
    pixels: Float32[Array, "I 3 size size"], crop_coords: Int[Array, "I 4"], view_index: Int[Array, "I"]
) -> Float32[Array, "I 3 size size"]:
    """Compute the pixels of global views, which are zero in `pixels`.

    A view is the canvas of its image, resized by bicubic interpolation (a = -0.75, edges repeated, no antialiasing).
    That is linear, so every crop adds its part. crop_coords: (row, number of rows, column, number of columns) of the
    crop in its canvas. view_index: the input that is the crop's global view, or -1.
    """
    size = pixels.shape[-1]
    row, rows, column, columns = crop_coords.T
    row_weights, column_weights = _resize_weights(row, rows, size), _resize_weights(column, columns, size)
    exact = jax.lax.Precision.HIGHEST  # a fast product would round the pixels
    parts = jnp.einsum("uyp,ucpq,uxq->ucyx", row_weights, pixels, column_weights, precision=exact)
    return pixels.at[jnp.where(view_index >= 0, view_index, NO_VIEW)].add(parts, mode="drop")


def _resize_weights(index: Int[Array, "I"], count: Int[Array, "I"], size: int) -> Float32[Array, "I {size} {size}"]:
    """Weights of bicubic interpolation along one axis: for each pixel of the view (middle axis), that of each pixel of
    the crop (last axis). index: of the crop among the `count` crops along this axis of the canvas."""
    source = (jnp.arange(size, dtype=jnp.float32) + 0.5) * count.astype(jnp.float32)[:, None] - 0.5
    first = jnp.floor(source)
    total = jnp.zeros((), jnp.float32)
    for tap in (-1, 0, 1, 2):
        pixel = (first.astype(jnp.int32) + tap).clip(0, count[:, None] * size - 1) - index[:, None] * size
        weights = _cubic(jnp.abs(source - first - tap))
        total = total + jnp.where(pixel[:, :, None] == jnp.arange(size, dtype=jnp.int32), weights[:, :, None], 0.0)
    return total


def _cubic(x: Float32[Array, "*shape"], a: float = -0.75) -> Float32[Array, "*shape"]:
    """The interpolation kernel of Keys (1981), at distances x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))
