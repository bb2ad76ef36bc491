"""SigLIP's image tower: the patches of square images or of images of any shape, without a class token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from mmjax.nn.activations import activation_of
from mmjax.nn.encoder import Encoder, EncoderConfig, feature_layers
from mmjax.nn.norm import layer_norm
from mmjax.nn.vision.pixels import to_patches
from mmjax.nn.weight import weight

DEFAULTS: Mapping[str, Any] = {  # the defaults of transformers' SiglipVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes. image_size, patch_size: edges in pixels. last_norm: whether there is a norm after the last layer."""

    tower: EncoderConfig
    image_size: int
    patch_size: int
    last_norm: bool

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any], layer: int | Sequence[int], *, last_norm: bool) -> SiglipConfig:
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
        return cls(tower, vision["image_size"], vision["patch_size"], last_norm)

    @property
    def grid_size(self) -> int:
        """Patches along one edge of a square image; the position table has the square of it."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Positions of a square image: its patches."""
        return self.grid_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return 3 * self.patch_size**2

    def for_tp(self, tp_size: int) -> SiglipConfig:
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(self, tower=self.tower.for_tp(tp_size))


class SiglipVisionEncoder(Encoder):
    """The tower, up to the layer whose output is used."""

    def __init__(self, c: SiglipConfig) -> None:
        super().__init__(c.tower)
        width = c.tower.hidden_size
        self.patch = weight(c.patch_dim, width, axes=("patch", "embed"))
        self.patch_bias = weight(width, axes=("embed",))
        self.positions = weight(c.num_positions, width, axes=("position", "embed"))
        self.last_norm = weight(width, axes=("embed",)) if c.last_norm else None
        self.last_norm_bias = weight(width, axes=("embed",)) if c.last_norm else None
        self.c = c

    def encode(self, pixels: Float32[Array, "I 3 height width"]) -> Float[Array, "I positions output_dim"]:
        """Hidden states of normalized square images: of their patches, row by row."""
        x = to_patches(pixels, self.c.patch_size)
        num_inputs, num_patches, _ = x.shape
        coords = jnp.arange(num_inputs * num_patches, dtype=jnp.int32)
        x = x.reshape(-1, self.c.patch_dim)
        x = self.encode_patches(x, coords % num_patches, coords // num_patches, segment_len=num_patches)
        return x.reshape(num_inputs, num_patches, -1)

    def encode_patches(
        self,
        patches: Float32[Array, "U patch_dim"],
        position_ids: Int[Array, "U"],
        segment_ids: Int[Array, "U"],
        segment_len: int | None = None,
    ) -> Float[Array, "U output_dim"]:
        """Hidden states of normalized patches. position_ids: rows of the position table. segment_ids, segment_len: see
        `encoder_attention`."""
        with jax.named_scope("patch_embed"):
            x = patches.astype(self.patch.dtype) @ self.patch[...] + self.patch_bias[...]
            x = x + jnp.take(self.positions[...], position_ids, axis=0, mode="clip")
        x = self(x, segment_ids, segment_len=segment_len)
        if self.last_norm is None or self.last_norm_bias is None:
            return x
        return layer_norm(x, self.last_norm[...], self.last_norm_bias[...], self.c.tower.eps)
