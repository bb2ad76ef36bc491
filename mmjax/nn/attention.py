"""Attention as the models call it: keys and values go into the pool's pages, queries look through them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mmjax.batch import Batch, Pool
from mmjax.kernels import heads_first, paged_decode, paged_prefill, segment_attention, write_pages
from mmjax.sharding import per_head

QUERY = ("place", "kv_heads", "group", "head_dim")
KEY = ("place", "kv_heads", "head_dim")
UNIT = ("place", "heads", "head_dim")


def pool_axes() -> tuple[str, str, str, str]:
    """Logical axes of the pool's arrays."""
    inner = ("kv_heads", "place") if heads_first() else ("place", "kv_heads")
    return ("depth", *inner, "head_dim")


def _page(pool: jax.Array) -> int:
    return pool.shape[pool_axes().index("place")]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, pool: Pool, batch: Batch, first: jax.Array, *, scale: float
) -> tuple[jax.Array, Pool]:
    """Causal attention of q [T, K, G, H] over its sequence's pages, after writing k, v [T, K, H] into them.

    `first`: i32[], the layer's first page id. Returns [T, K, G, H] and the pool.
    """
    size, pooled = _page(pool.k), pool_axes()

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, k_pool: jax.Array, v_pool: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        slot = jnp.where(batch.slot >= 0, batch.slot + first * size, -1)
        k_pool, v_pool = write_pages(k_pool, v_pool, _widen(k, k_pool), _widen(v, v_pool), slot)
        out = _look(q, k_pool, v_pool, batch.pages + first, batch.length, batch, causal=True, scale=scale)
        return out, k_pool, v_pool

    out, k_pool, v_pool = per_head(run, (QUERY, KEY, KEY, pooled, pooled), (QUERY, pooled, pooled))(
        q, k, v, pool.k, pool.v
    )
    return out, Pool(k_pool, v_pool)


def cross_attend(q: jax.Array, pool: Pool, batch: Batch, first: jax.Array, *, scale: float) -> jax.Array:
    """Attention of q [T, K, G, H] over all the encoder's keys of its sequence. Returns [T, K, G, H]."""

    def run(q: jax.Array, k_pool: jax.Array, v_pool: jax.Array) -> jax.Array:
        pages = batch.cross_pages + first
        return _look(q, k_pool, v_pool, pages, batch.cross_length, batch, causal=False, scale=scale)

    return per_head(run, (QUERY, pool_axes(), pool_axes()), QUERY)(q, pool.k, pool.v)


def store(k: jax.Array, v: jax.Array, pool: Pool, slot: jax.Array, first: jax.Array) -> Pool:
    """Write k, v [T, K, H] at the layer's slots i32[T] (negative: dropped), without attending."""
    size, pooled = _page(pool.k), pool_axes()
    slot = jnp.where(slot >= 0, slot + first * size, -1)

    def run(k: jax.Array, v: jax.Array, k_pool: jax.Array, v_pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        return write_pages(k_pool, v_pool, _widen(k, k_pool), _widen(v, v_pool), slot)

    return Pool(*per_head(run, (KEY, KEY, pooled, pooled), (pooled, pooled))(k, v, pool.k, pool.v))


def within(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array,
    *,
    scale: float,
    uniform: int | None,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Attention among units of equal segment, q, k, v [U, N, H]; `uniform` when every segment has that many units;
    `seen` bool[U] where some attend that are not attended to."""
    run = functools.partial(segment_attention, segment=segment, scale=scale, uniform=uniform, seen=seen)
    return per_head(lambda q, k, v: run(q, k, v), (UNIT, UNIT, UNIT), UNIT)(q, k, v)


def _look(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    pages: jax.Array,
    length: jax.Array,
    batch: Batch,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Blocks of one query are a decode step (sequence s is row s); longer blocks are chunks of a prompt."""
    tokens, heads, _, width = q.shape
    q = _widen(q, k_pool)
    blocks = batch.owner.shape[0]
    if blocks == tokens:
        out = paged_decode(q, k_pool, v_pool, pages, length, scale=scale)
    else:
        chunks = q.reshape(blocks, tokens // blocks, *q.shape[1:])
        owner, start = batch.owner, batch.start
        out = paged_prefill(chunks, k_pool, v_pool, pages, owner, start, length, causal=causal, scale=scale)
        out = out.reshape(q.shape)
    return out[:, :heads, :, :width]


def _widen(x: jax.Array, pool: jax.Array) -> jax.Array:
    """Zero-pad x [T, K, .., H] to the pool's heads and head size: zeros change no score, and what they yield is cut."""
    heads, width = pool.shape[pool_axes().index("kv_heads")] - x.shape[1], pool.shape[3] - x.shape[-1]
    if heads == width == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, heads), *[(0, 0)] * (x.ndim - 3), (0, width)])
