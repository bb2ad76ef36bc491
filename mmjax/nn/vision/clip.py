"""CLIP's image tower: the patches of a square image after a class token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from mmjax.nn.activations import activation_of
from mmjax.nn.encoder import Encoder, EncoderConfig, feature_layers
from mmjax.nn.norm import layer_norm
from mmjax.nn.vision.pixels import to_patches
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
    def from_hf(cls, vision: Mapping[str, Any], layer: int | Sequence[int]) -> ClipConfig:
        """From a vision_config. layer: the hidden states to return side by side, see `feature_layers`."""
        vision = {**DEFAULTS, **vision}
        heads, layers = vision["num_attention_heads"], feature_layers(layer, vision["num_hidden_layers"])
        tower = EncoderConfig(
            hidden_size=vision["hidden_size"],
            num_layers=max(layers),
            num_heads=heads,
            head_dim=vision["hidden_size"] // heads,
            intermediate_size=vision["intermediate_size"],
            eps=vision["layer_norm_eps"],
            act=activation_of(vision, "hidden_act", DEFAULTS["hidden_act"]),
            feature_layers=() if isinstance(layer, int) else layers,
        )
        return cls(tower, vision["image_size"], vision["patch_size"])

    @property
    def grid_size(self) -> int:
        """Patches along one edge."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Positions of an image: the class token and the patches."""
        return 1 + self.grid_size**2

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
        self.positions = weight(c.num_positions, width, axes=("position", "embed"))
        self.pre_norm = weight(width, axes=("embed",))
        self.pre_norm_bias = weight(width, axes=("embed",))
        self.c = c

    def encode(self, pixels: Float32[Array, "I 3 height width"]) -> Float[Array, "I positions output_dim"]:
        """Hidden states of normalized images, the class token first."""
        x = self._embed(pixels)
        num_inputs, num_positions, width = x.shape
        segment_ids = jnp.arange(num_inputs * num_positions, dtype=jnp.int32) // num_positions
        x = self(x.reshape(-1, width), segment_ids, segment_len=num_positions)
        return x.reshape(num_inputs, num_positions, -1)

    @jax.named_scope("patch_embed")
    def _embed(self, pixels: Float32[Array, "I 3 height width"]) -> Float[Array, "I positions C"]:
        """The class token and the patches, with positions added, normalized."""
        c = self.c
        x = to_patches(pixels.astype(self.patch.dtype), c.patch_size) @ self.patch[...]
        first = jnp.broadcast_to(self.class_embed[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        return layer_norm(x, self.pre_norm[...], self.pre_norm_bias[...], c.tower.eps)
