"""The layers of a decoder in a decode step on one GPU, in as few kernels as they take.

What each kernel fuses is in `mmjax.kernels`; here is which kernels make a layer. For one sequence, five: the products,
each of which adds what the one before it left and norms it on the way, and all of attention. For more sequences a
residual sum and its norm are a kernel of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Shaped

from mmjax.batch import Batch, KVCache
from mmjax.kernels import (
    AttnStates,
    Product,
    QKVEpilogue,
    ResidualParts,
    Tile,
    add_rms_norm,
    current_platform,
    fused_decode,
    merge_attn_states,
    skinny_matmul,
    tile_for,
)
from mmjax.nn.layers import jit_layers
from mmjax.nn.norm import rms_norm
from mmjax.nn.weight import QuantizedArray, Weight

if TYPE_CHECKING:
    from mmjax.nn.decoder import DecoderConfig, DecoderLayer

CosSin = tuple[Float32[Array, "S half_H"], Float32[Array, "S half_H"]]


def can_run(c: DecoderConfig, x: Float[Array, "T D"], kv_cache: KVCache, batch: Batch) -> bool:
    """Whether this is a decode step that the fused kernels serve: bfloat16, on one GPU, dense feed-forwards gated by
    silu, biases of q, k and v only, heads that are rotated whole and as the cache has them."""
    mesh = jax.sharding.get_abstract_mesh()
    on_one_gpu = current_platform() == "gpu" and (mesh.empty or mesh.size == 1)
    decoding = batch.seq_index.shape[0] == x.shape[0]
    heads = kv_cache.k.shape[2:] == (c.num_kv_heads, c.head_dim)
    plain = c.moe is None and c.act in ("silu", "swish") and not (c.o_bias or c.mlp_bias or c.partial_rope)
    return on_one_gpu and decoding and x.dtype == kv_cache.k.dtype == jnp.bfloat16 and heads and plain


def run(
    layers: Sequence[DecoderLayer],
    c: DecoderConfig,
    norm: Float[Array, "D"],
    x: Float[Array, "S D"],
    angles: Float32[Array, "S half_H"],
    kv_cache: KVCache,
    batch: Batch,
) -> tuple[Float[Array, "S D"], KVCache]:
    """The hidden states of embeddings x after the final norm, and the cache with the step's keys and values."""
    cos_sin = jnp.cos(angles), jnp.sin(angles)
    num_blocks = kv_cache.k.shape[0] // c.num_layers
    tiles = _tiles(layers[0], x.shape[0])
    fused = {name: tile for name, tile in tiles.items() if tile is not None}
    if x.shape[0] == 1 and len(fused) == len(tiles):
        parts = jnp.pad(x, ((0, fused["down"].split_k), (0, 0)))
        for i, layer in enumerate(jit_layers(layers, functools.partial(_one_row, tiles=fused))):
            with jax.named_scope(f"layer_{i}"):
                parts, kv_cache = layer(parts, cos_sin, kv_cache, batch, jnp.int32(i * num_blocks))
        with jax.named_scope("norm"):
            return add_rms_norm(parts[:1], parts[1:, None], norm, eps=c.eps)[1], kv_cache
    pending: Float[Array, "*parts S D"] | None = None
    for i, layer in enumerate(jit_layers(layers, functools.partial(_rows, tiles=tiles))):
        with jax.named_scope(f"layer_{i}"):
            x, pending, kv_cache = layer(x, pending, cos_sin, kv_cache, batch, jnp.int32(i * num_blocks))
    assert pending is not None
    with jax.named_scope("norm"):
        return add_rms_norm(x, pending, norm, eps=c.eps)[1], kv_cache


def _one_row(
    layer: DecoderLayer,
    parts: Float[Array, "R D"],
    cos_sin: CosSin,
    kv_cache: KVCache,
    batch: Batch,
    first_block: Int[Array, ""],
    *,
    tiles: Mapping[str, Tile],
) -> tuple[Float[Array, "R D"], KVCache]:
    """A layer for one sequence. R is 1 + split_k of down: the parts of the residual that it takes and leaves."""

    def product(name: str, x: Float[Array, "one K"] | AttnStates | ResidualParts, **options: Any) -> Product:
        weight, scale = _matrix(getattr(layer, name), name)
        return skinny_matmul(x, weight, scale, tile=tiles[name], eps=layer.c.eps, **options)

    with jax.named_scope("attn"):
        qkv = product("qkv", ResidualParts(parts, layer.attn_norm[...]), reserve=tiles["o"].split_k)
        out, kv_cache = _attend(layer, qkv.out, cos_sin, kv_cache, batch, first_block, qkv.sum_squares)
        parts = product("o", out, into=qkv.residual).out
    with jax.named_scope("mlp"):
        mlp = product("gate_up", ResidualParts(parts, layer.mlp_norm[...]), reserve=tiles["down"].split_k)
        return product("down", mlp.out, into=mlp.residual).out, kv_cache


def _rows(
    layer: DecoderLayer,
    x: Float[Array, "S D"],
    pending: Float[Array, "*parts S D"] | None,
    cos_sin: CosSin,
    kv_cache: KVCache,
    batch: Batch,
    first_block: Int[Array, ""],
    *,
    tiles: Mapping[str, Tile | None],
) -> tuple[Float[Array, "S D"], Float[Array, "*out_parts S D"], KVCache]:
    """A layer. pending: what is still to be added to x, summed over its parts; the layer leaves such a sum too."""
    eps = layer.c.eps
    with jax.named_scope("attn"):
        if pending is None:
            y = rms_norm(x, layer.attn_norm[...], eps)
        else:
            x, y = add_rms_norm(x, pending, layer.attn_norm[...], eps=eps)
        qkv = _product(layer, "qkv", "td,dkgh->tkgh", y, tiles)
        out, kv_cache = _attend(layer, qkv, cos_sin, kv_cache, batch, first_block)
        if isinstance(out, AttnStates):
            out = merge_attn_states(out)
        out = _product(layer, "o", "tkgh,kghd->td", out, tiles)
    with jax.named_scope("mlp"):
        x, y = add_rms_norm(x, out, layer.mlp_norm[...], eps=eps)
        y = _product(layer, "gate_up", "td,dpf->tpf", y, tiles)
        if y.ndim == 3:
            y = jax.nn.silu(y[:, 0]) * y[:, 1]
        return x, _product(layer, "down", "tf,fd->td", y, tiles), kv_cache


def _tiles(layer: DecoderLayer, rows: int) -> dict[str, Tile | None]:
    """How to tile each product of a layer for so many rows, None where XLA is to do it."""
    tiles = {}
    for name in ("qkv", "o", "gate_up", "down"):
        matrix, scale = _matrix(getattr(layer, name), name)
        shape = matrix.shape if scale is None else (matrix.shape[-1], *matrix.shape[:-1])
        head_dim = layer.c.head_dim if name == "o" and rows == 1 else 0
        tiles[name] = tile_for(rows, shape, head_dim=head_dim, int8=scale is not None)
    return tiles


def _product(
    layer: DecoderLayer, name: str, spec: str, x: Float[Array, "S K"], tiles: Mapping[str, Tile | None]
) -> Float[Array, "..."]:
    """By the kernel, [S, F] if gated or f32[P, S, N], or by XLA as `spec` says."""
    weight: Weight = getattr(layer, name)
    tile = tiles[name]
    if tile is not None:
        return skinny_matmul(x, *_matrix(weight, name), tile=tile).out
    heads = (layer.c.num_kv_heads, layer.c.q_per_kv, layer.c.head_dim)
    return weight.einsum(spec, x.reshape(-1, *heads) if name == "o" else x)


def _matrix(weight: Weight, name: str) -> tuple[Shaped[Array, "..."], Float[Array, "*pair N"] | None]:
    """A weight of a layer as [K, N], or [D, 2, F] for gate_up; of int8 as [N, K] or [2, F, D], and its scale."""
    stored = weight.stored
    if isinstance(stored, QuantizedArray):
        outer = stored.values.shape[: -len(stored.last)]
        kept = outer if name == "gate_up" else (-1,)
        return stored.values.reshape(*kept, math.prod(stored.values.shape[len(outer) :])), stored.scale.reshape(kept)
    value = weight[...]
    if name == "gate_up":
        return value, None
    return value.reshape(value.shape[0], -1) if name == "qkv" else value.reshape(-1, value.shape[-1]), None


def _attend(
    layer: DecoderLayer,
    qkv: Float[Array, "..."],
    cos_sin: CosSin,
    kv_cache: KVCache,
    batch: Batch,
    first_block: Int[Array, ""],
    sum_squares: Float32[Array, "P S"] | None = None,
) -> tuple[Float[Array, "S KGH"] | AttnStates, KVCache]:
    """qkv f32[P, S, N] or [S, K, G + 2, H] to attention [S, K * G * H] and the cache with the new keys."""
    c = layer.c
    bias, q_norm, k_norm = (
        None if weight is None else weight[...] for weight in (layer.qkv_bias, layer.q_norm, layer.k_norm)
    )
    epilogue = QKVEpilogue(*cos_sin, sum_squares, bias, q_norm, k_norm, hidden_size=c.hidden_size, eps=c.eps)
    leading = qkv.shape[:2] if qkv.ndim == 3 else qkv.shape[:1]
    out, k, v = fused_decode(
        qkv.reshape(*leading, c.num_kv_heads, c.q_per_kv + 2, c.head_dim),
        epilogue,
        kv_cache.k,
        kv_cache.v,
        batch.block_table,
        batch.context_lens,
        batch.slot_mapping,
        first_block,
        scale=c.scale,
        window=layer.window,
    )
    return out, KVCache(k, v)
