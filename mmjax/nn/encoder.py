"""The encoder stack of image and audio towers: pre-norm layers of attention within segments and a feed-forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from mmjax.nn.activations import ACTIVATIONS
from mmjax.nn.attention import encoder_attention
from mmjax.nn.norm import layer_norm
from mmjax.nn.rope import apply_rope
from mmjax.nn.weight import weight
from mmjax.sharding import round_up

Carry = tuple[Float[Array, "U C"], Float[Array, "n U C"]]  # hidden states, and those of the feature layers
Features = Mapping[str, Shaped[Array, "..."]]  # an encoder's input arrays, by name of the FeatureField


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a tower. act: a key of ACTIVATIONS. feature_layers: the numbers of the hidden states that the tower
    returns side by side, 0 for the input of the first layer; (): the output of the last layer alone."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    act: str
    feature_layers: tuple[int, ...] = ()

    @property
    def output_dim(self) -> int:
        """Width of what the tower returns."""
        return self.hidden_size * max(1, len(self.feature_layers))

    def for_tp(self, tp_size: int) -> EncoderConfig:
        """The same tower with every sharded size a multiple of `tp_size`, and rows of 16 bytes in bfloat16.

        cuBLAS has no fast kernel for other rows: at [16384, 3420] x [3420, 1280], Qwen2.5-VL's feed-forward, an H200
        reaches 283 TFLOP/s, and 839 with 3424.
        """
        return dataclasses.replace(
            self,
            num_heads=round_up(self.num_heads, tp_size),
            intermediate_size=round_up(self.intermediate_size, 8 * tp_size),
        )


class EncoderLayer(nnx.Module):
    """A layer. It declares the weights of all layers, stacked on a leading axis; a scan calls it with those of one."""

    def __init__(self, c: EncoderConfig) -> None:
        n, d, k, h, f = c.num_layers, c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size
        self.norm1 = weight(n, d, axes=("depth", "embed"))
        self.norm1_bias = weight(n, d, axes=("depth", "embed"))
        self.qkv = weight(n, d, 3, k, h, axes=("depth", "embed", "pair", "heads", "head_dim"))
        self.qkv_bias = weight(n, 3, k, h, axes=("depth", "pair", "heads", "head_dim"))
        self.o = weight(n, k, h, d, axes=("depth", "heads", "head_dim", "embed"))
        self.o_bias = weight(n, d, axes=("depth", "embed"))
        self.norm2 = weight(n, d, axes=("depth", "embed"))
        self.norm2_bias = weight(n, d, axes=("depth", "embed"))
        self.fc1 = weight(n, d, f, axes=("depth", "embed", "mlp"))
        self.fc1_bias = weight(n, f, axes=("depth", "mlp"))
        self.fc2 = weight(n, f, d, axes=("depth", "mlp", "embed"))
        self.fc2_bias = weight(n, d, axes=("depth", "embed"))
        self.c = c

    def __call__(
        self,
        x: Float[Array, "U C"],
        segment_ids: Int[Array, "U"],
        angles: Float32[Array, "U half_H"] | None,
        segment_len: int | None,
        key_mask: Bool[Array, "U"] | None = None,
    ) -> Float[Array, "U C"]:
        """The layer's output. The weights must have no leading axis."""
        c = self.c
        with jax.named_scope("attn"):
            y = layer_norm(x, self.norm1[...], self.norm1_bias[...], c.eps)
            qkv = self.qkv.einsum("ud,dpnh->upnh", y) + self.qkv_bias[...]
            q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
            if angles is not None:
                q, k = apply_rope(q, angles), apply_rope(k, angles)
            q, k, v = (part.astype(self.qkv.dtype) for part in (q, k, v))
            y = encoder_attention(
                q, k, v, segment_ids, scale=c.head_dim**-0.5, segment_len=segment_len, key_mask=key_mask
            ).astype(x.dtype)
            x = x + self.o.einsum("unh,nhd->ud", y) + self.o_bias[...]
        with jax.named_scope("mlp"):
            y = layer_norm(x, self.norm2[...], self.norm2_bias[...], c.eps)
            y = ACTIVATIONS[c.act](self.fc1.einsum("ud,df->uf", y) + self.fc1_bias[...])
            return x + self.fc2.einsum("uf,fd->ud", y) + self.fc2_bias[...]


class Encoder(nnx.Module):
    """Layers in a scan, which saves compile time. It costs little: an encoder is bound by arithmetic, not by memory."""

    def __init__(self, c: EncoderConfig) -> None:
        self.layers = EncoderLayer(c)
        self.feature_layers = c.feature_layers

    def __call__(
        self,
        x: Float[Array, "U C"],
        segment_ids: Int[Array, "U"],
        *,
        angles: Float32[Array, "U half_H"] | None = None,
        segment_len: int | None = None,
        key_mask: Bool[Array, "U"] | None = None,
    ) -> Float[Array, "U output_dim"]:
        """The output of the last layer, or of the `feature_layers`. segment_ids, segment_len, key_mask: see
        `encoder_attention`. angles: of rotary positions."""
        graph, weights = nnx.split(self.layers)
        depth = jax.tree.leaves(weights)[0].shape[0]
        is_feature = jnp.array([[layer == i + 1 for layer in self.feature_layers] for i in range(depth)], jnp.bool_)

        @jax.named_scope("layer")
        def body(carry: Carry, layer: tuple[Any, Bool[Array, "n"]]) -> tuple[Carry, None]:
            (x, features), (weights, is_feature) = carry, layer
            x = nnx.merge(graph, weights)(x, segment_ids, angles, segment_len, key_mask)
            return (x, jnp.where(is_feature[:, None, None], x, features)), None

        features = jnp.broadcast_to(x, (len(self.feature_layers), *x.shape))
        x, features = jax.lax.scan(body, (x, features), (weights, is_feature.reshape(depth, len(self.feature_layers))))[
            0
        ]
        return features.swapaxes(0, 1).reshape(x.shape[0], -1) if self.feature_layers else x


def feature_layers(number: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """The hidden states of `vision_feature_layer`, counted from 0, the input of the first of `depth` layers. Raises
    ValueError for one that does not exist."""
    numbers = [number] if isinstance(number, int) else list(number)
    layers = tuple(layer if layer >= 0 else depth + 1 + layer for layer in numbers)
    if not layers or min(layers) < 0 or max(layers) > depth:
        raise ValueError(f"vision_feature_layer {number!r} is not supported: the tower has {depth} layers")
    return layers
