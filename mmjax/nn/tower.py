"""The encoder stack that image and audio towers share: pre-norm blocks of attention within segments and a small MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mmjax.nn.attention import within
from mmjax.nn.norm import layer_norm
from mmjax.nn.rope import rotate
from mmjax.nn.weight import weight
from mmjax.sharding import up

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
class TowerConfig:
    """Sizes of a tower; `act` is a key of ACTIVATIONS."""

    width: int
    depth: int
    heads: int
    head_dim: int
    mlp: int
    eps: float
    act: str

    def split(self, ways: int) -> TowerConfig:
        """The same tower with every sharded size a multiple of `ways`."""
        return dataclasses.replace(self, heads=up(self.heads, ways), mlp=up(self.mlp, ways))


class Blocks(nnx.Module):
    """`depth` equal blocks with their weights stacked on a leading axis."""

    def __init__(self, c: TowerConfig) -> None:
        n, d, k, h, f = c.depth, c.width, c.heads, c.head_dim, c.mlp
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
        segment: jax.Array,
        angles: jax.Array | None,
        uniform: int | None,
        seen: jax.Array | None = None,
    ) -> jax.Array:
        """One block, once the scan has taken the depth axis off: x [U, C] to [U, C]."""
        c = self.c
        y = layer_norm(x, self.norm1[...], self.norm1_bias[...], c.eps)
        qkv = self.qkv.einsum("ud,dnph->upnh", y) + self.qkv_bias[...].swapaxes(0, 1)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (part.astype(self.qkv.dtype) for part in (q, k, v))
        y = within(q, k, v, segment, scale=c.head_dim**-0.5, uniform=uniform, seen=seen).astype(x.dtype)
        x = x + self.o.einsum("unh,nhd->ud", y) + self.o_bias[...]
        y = layer_norm(x, self.norm2[...], self.norm2_bias[...], c.eps)
        y = ACTIVATIONS[c.act](self.fc1.einsum("ud,df->uf", y) + self.fc1_bias[...])
        return x + self.fc2.einsum("uf,fd->ud", y) + self.fc2_bias[...]


class Tower(nnx.Module):
    """Blocks run in order. Scanned: an encoder is bound by arithmetic, so what a scan saves is compile time."""

    def __init__(self, c: TowerConfig) -> None:
        self.blocks = Blocks(c)

    def __call__(
        self,
        x: jax.Array,
        segment: jax.Array,
        *,
        angles: jax.Array | None = None,
        uniform: int | None = None,
        seen: jax.Array | None = None,
    ) -> jax.Array:
        """x [U, C] to [U, C]; units attend within equal `segment` i32[U]; `angles` f32[U, H/2] turn q and k; `seen`
        bool[U] where some attend that are not attended to."""
        graph, weights = nnx.split(self.blocks)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x, segment, angles, uniform, seen), None

        return jax.lax.scan(body, x, weights)[0]
