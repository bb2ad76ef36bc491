"""CLIP's image tower: the patches of a square image after a class token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from mmjax.nn.encoder import Encoder, EncoderConfig
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight

DEFAULTS: Mapping[str, Any] = {  # the defaults of transformers' CLIPVisionConfig
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
class ClipConfig:
    """Sizes. image_size, patch_size: edges in pixels."""

    tower: EncoderConfig
    image_size: int
    patch_size: int

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], layer: int) -> ClipConfig:
        """From a vision_config; `layer` numbers the hidden state to return; 0 is the input of the first layer."""
        vision = {**DEFAULTS, **vision}
        depth, heads = vision["num_hidden_layers"], vision["num_attention_heads"]
        tower = EncoderConfig(
            hidden_size=vision["hidden_size"],
            num_layers=layer if layer >= 0 else depth + 1 + layer,
            num_heads=heads,
            head_dim=vision["hidden_size"] // heads,
            intermediate_size=vision["intermediate_size"],
            eps=vision["layer_norm_eps"],
            act=vision["hidden_act"],
        )
        return cls(tower, vision["image_size"], vision["patch_size"])

    @property
    def grid_size(self) -> int:
        """Patches along one edge."""
        return self.image_size // self.patch_size

    def for_tp(self, tp_size: int) -> ClipConfig:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, tower=self.tower.for_tp(tp_size))


class ClipVisionEncoder(Encoder):
    """The tower, up to the layer whose output is used."""

    def __init__(self, c: ClipConfig) -> None:
        super().__init__(c.tower)
        width = c.tower.hidden_size
        self.class_embed = weight(width, axes=("embed",))
        self.patch = weight(3 * c.patch_size * c.patch_size, width, axes=("patch", "embed"))
        self.positions = weight(1 + c.grid_size**2, width, axes=("position", "embed"))
        self.pre_norm = weight(width, axes=("embed",))
        self.pre_norm_bias = weight(width, axes=("embed",))
        self.c = c

    def encode(self, pixels: Float32[Array, "I 3 height width"]) -> Float[Array, "I positions C"]:
        """Hidden states of normalized images, the class token first."""
        x = self._embed(pixels)
        num_inputs, num_positions, width = x.shape
        segment_ids = jnp.arange(num_inputs * num_positions, dtype=jnp.int32) // num_positions
        return self(x.reshape(-1, width), segment_ids, segment_len=num_positions).reshape(
            num_inputs, num_positions, width
        )

    @jax.named_scope("patch_embed")
    def _embed(self, pixels: Float32[Array, "I 3 height width"]) -> Float[Array, "I positions C"]:
        """The class token and the patches, with positions added, normalized."""
        c, grid = self.c, self.c.grid_size
        x = (
            pixels.astype(self.patch.dtype)
            .reshape(-1, 3, grid, c.patch_size, grid, c.patch_size)
            .transpose(0, 2, 4, 1, 3, 5)
        )
        x = x.reshape(-1, grid**2, 3 * c.patch_size * c.patch_size) @ self.patch[...]
        first = jnp.broadcast_to(self.class_embed[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        return layer_norm(x, self.pre_norm[...], self.pre_norm_bias[...], c.tower.eps)
