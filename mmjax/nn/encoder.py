"""The encoder stack that image and audio towers share: pre-norm blocks of attention within segments and a small MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mmjax.nn.attention import encoder_attention
from mmjax.nn.norm import layer_norm
from mmjax.nn.rope import apply_rope
from mmjax.nn.weight import weight
from mmjax.sharding import round_up

Activation = Callable[[jax.Array], jax.Array]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), CLIP's approximation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a tower; `act` is a key of ACTIVATIONS."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    act: str

    def for_tp(self, tp_size: int) -> EncoderConfig:
        """The same tower with every sharded size a multiple of `ways`."""
        return dataclasses.replace(
            self,
            num_heads=round_up(self.num_heads, tp_size),
            intermediate_size=round_up(self.intermediate_size, tp_size),
        )


class EncoderLayers(nnx.Module):
    """`depth` equal blocks with their weights stacked on a leading axis."""

    def __init__(self, c: EncoderConfig) -> None:
        n, d, k, h, f = c.num_layers, c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size
        self.norm1 = weight(n, d, axes=("depth", "embed"))
        self.norm1_bias = weight(n, d, axes=("depth", "embed"))
        self.qkv = weight(n, d, k, 3, h, axes=("depth", "embed", "heads", "pair", "head_dim"))
        self.qkv_bias = weight(n, k, 3, h, axes=("depth", "heads", "pair", "head_dim"))
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
        x: jax.Array,
        segment_ids: jax.Array,
        angles: jax.Array | None,
        segment_len: int | None,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """One block, once the scan has taken the depth axis off: x [U, C] to [U, C]."""
        c = self.c
        y = layer_norm(x, self.norm1[...], self.norm1_bias[...], c.eps)
        qkv = self.qkv.einsum("ud,dnph->upnh", y) + self.qkv_bias[...].swapaxes(0, 1)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        if angles is not None:
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        q, k, v = (part.astype(self.qkv.dtype) for part in (q, k, v))
        y = encoder_attention(
            q, k, v, segment_ids, scale=c.head_dim**-0.5, segment_len=segment_len, key_mask=key_mask
        ).astype(x.dtype)
        x = x + self.o.einsum("unh,nhd->ud", y) + self.o_bias[...]
        y = layer_norm(x, self.norm2[...], self.norm2_bias[...], c.eps)
        y = ACTIVATIONS[c.act](self.fc1.einsum("ud,df->uf", y) + self.fc1_bias[...])
        return x + self.fc2.einsum("uf,fd->ud", y) + self.fc2_bias[...]


class Encoder(nnx.Module):
    """Blocks run in order. Scanned: an encoder is bound by arithmetic, so what a scan saves is compile time."""

    def __init__(self, c: EncoderConfig) -> None:
        self.blocks = EncoderLayers(c)

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        *,
        angles: jax.Array | None = None,
        segment_len: int | None = None,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """x [U, C] to [U, C]; units attend within equal `segment` i32[U]; `angles` f32[U, H/2] turn q and k; `seen`
        bool[U] where some attend that are not attended to."""
        graph, weights = nnx.split(self.blocks)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x, segment_ids, angles, segment_len, key_mask), None

        return jax.lax.scan(body, x, weights)[0]
