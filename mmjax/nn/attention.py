"""Attention as the models call it: keys and values go into the pool's pages, queries look through them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mmjax.batch import Batch, KVCache
from mmjax.kernels import kv_heads_first, paged_decode, paged_prefill, segment_attention, write_kv_cache
from mmjax.sharding import map_heads

QUERY = ("position", "kv_heads", "group", "head_dim")
KEY = ("position", "kv_heads", "head_dim")
ENCODER_INPUT = ("position", "heads", "head_dim")


def kv_cache_axes() -> tuple[str, str, str, str]:
    """Logical axes of the pool's arrays."""
    inner = ("kv_heads", "position") if kv_heads_first() else ("position", "kv_heads")
    return ("depth", *inner, "head_dim")


def _block_size(cache: jax.Array) -> int:
    return cache.shape[kv_cache_axes().index("position")]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: KVCache, batch: Batch, first_block: jax.Array, *, scale: float
) -> tuple[jax.Array, KVCache]:
    """Causal attention of q [T, K, G, H] over its sequence's pages, after writing k, v [T, K, H] into them.

    `first`: i32[], the layer's first page id. Returns [T, K, G, H] and the pool.
    """
    size, pooled = _block_size(kv_cache.k), kv_cache_axes()

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, k_pool: jax.Array, v_pool: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        slot = jnp.where(batch.slot_mapping >= 0, batch.slot_mapping + first_block * size, -1)
        k_pool, v_pool = write_kv_cache(k_pool, v_pool, _pad_heads(k, k_pool), _pad_heads(v, v_pool), slot)
        out = _paged_attention(
            q, k_pool, v_pool, batch.block_table + first_block, batch.context_lens, batch, causal=True, scale=scale
        )
        return out, k_pool, v_pool

    out, k_pool, v_pool = map_heads(run, (QUERY, KEY, KEY, pooled, pooled), (QUERY, pooled, pooled))(
        q, k, v, kv_cache.k, kv_cache.v
    )
    return out, KVCache(k_pool, v_pool)


def cross_attend(q: jax.Array, kv_cache: KVCache, batch: Batch, first_block: jax.Array, *, scale: float) -> jax.Array:
    """Attention of q [T, K, G, H] over all the encoder's keys of its sequence. Returns [T, K, G, H]."""

    def run(q: jax.Array, k_pool: jax.Array, v_pool: jax.Array) -> jax.Array:
        pages = batch.cross_block_table + first_block
        return _paged_attention(q, k_pool, v_pool, pages, batch.cross_context_lens, batch, causal=False, scale=scale)

    return map_heads(run, (QUERY, kv_cache_axes(), kv_cache_axes()), QUERY)(q, kv_cache.k, kv_cache.v)


def write_kv(k: jax.Array, v: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array, first_block: jax.Array) -> KVCache:
    """Write k, v [T, K, H] at the layer's slots i32[T] (negative: dropped), without attending."""
    size, pooled = _block_size(kv_cache.k), kv_cache_axes()
    slot_mapping = jnp.where(slot_mapping >= 0, slot_mapping + first_block * size, -1)

    def run(k: jax.Array, v: jax.Array, k_pool: jax.Array, v_pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        return write_kv_cache(k_pool, v_pool, _pad_heads(k, k_pool), _pad_heads(v, v_pool), slot_mapping)

    return KVCache(*map_heads(run, (KEY, KEY, pooled, pooled), (pooled, pooled))(k, v, kv_cache.k, kv_cache.v))


def encoder_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    segment_len: int | None,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Attention among units of equal segment, q, k, v [U, N, H]; `uniform` when every segment has that many units;
    `seen` bool[U] where some attend that are not attended to."""
    run = functools.partial(
        segment_attention, segment_ids=segment_ids, scale=scale, segment_len=segment_len, key_mask=key_mask
    )
    return map_heads(lambda q, k, v: run(q, k, v), (ENCODER_INPUT, ENCODER_INPUT, ENCODER_INPUT), ENCODER_INPUT)(
        q, k, v
    )


def _paged_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    block_table: jax.Array,
    context_lens: jax.Array,
    batch: Batch,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Blocks of one query are a decode step (sequence s is row s); longer blocks are chunks of a prompt."""
    tokens, heads, _, width = q.shape
    q = _pad_heads(q, k_cache)
    blocks = batch.seq_index.shape[0]
    if blocks == tokens:
        out = paged_decode(q, k_cache, v_cache, block_table, context_lens, scale=scale)
    else:
        chunks = q.reshape(blocks, tokens // blocks, *q.shape[1:])
        owner, start = batch.seq_index, batch.q_start
        out = paged_prefill(
            chunks, k_cache, v_cache, block_table, owner, start, context_lens, causal=causal, scale=scale
        )
        out = out.reshape(q.shape)
    return out[:, :heads, :, :width]


def _pad_heads(x: jax.Array, cache: jax.Array) -> jax.Array:
    """Zero-pad x [T, K, .., H] to the pool's heads and head size: zeros change no score, and what they yield is cut."""
    heads, width = cache.shape[kv_cache_axes().index("kv_heads")] - x.shape[1], cache.shape[3] - x.shape[-1]
    if heads == width == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, heads), *[(0, 0)] * (x.ndim - 3), (0, width)])
