"""Attention as the models call it: keys and values are written to the KV cache, queries attend through block tables."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from mmjax.batch import Batch, KVCache
from mmjax.kernels import kv_heads_first, paged_decode, paged_prefill, segment_attention, write_kv_cache
from mmjax.sharding import map_heads

QUERY = ("position", "kv_heads", "group", "head_dim")
KEY = ("position", "kv_heads", "head_dim")
ENCODER_INPUT = ("position", "heads", "head_dim")


def kv_cache_axes() -> tuple[str, str, str, str]:
    """Logical axes of the cache's arrays."""
    inner = ("kv_heads", "position") if kv_heads_first() else ("position", "kv_heads")
    return ("depth", *inner, "head_dim")


def _block_size(cache: Num[Array, "num_blocks _ _ cache_H"]) -> int:
    return cache.shape[kv_cache_axes().index("position")]


def attend(
    q: Float[Array, "T K G H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: KVCache,
    batch: Batch,
    first_block: Int[Array, ""],
    *,
    scale: float,
) -> tuple[Float[Array, "T K G H"], KVCache]:
    """Causal attention over each sequence's cache blocks, after writing k and v into them.

    first_block: the layer's first block id.
    """
    block_size, cache_axes = _block_size(kv_cache.k), kv_cache_axes()

    def run(
        q: Float[Array, "T K G H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        k_cache: Num[Array, "num_blocks _ _ cache_H"],
        v_cache: Num[Array, "num_blocks _ _ cache_H"],
    ) -> tuple[Array, Array, Array]:
        slots = jnp.where(batch.slot_mapping >= 0, batch.slot_mapping + first_block * block_size, -1)
        with jax.named_scope("kv_cache/write"):
            k_cache, v_cache = write_kv_cache(k_cache, v_cache, _pad_heads(k, k_cache), _pad_heads(v, v_cache), slots)
        out = _paged_attention(
            q, k_cache, v_cache, batch.block_table + first_block, batch.context_lens, batch, causal=True, scale=scale
        )
        return out, k_cache, v_cache

    out, k_cache, v_cache = map_heads(run, (QUERY, KEY, KEY, cache_axes, cache_axes), (QUERY, cache_axes, cache_axes))(
        q, k, v, kv_cache.k, kv_cache.v
    )
    return out, KVCache(k_cache, v_cache)


def cross_attend(
    q: Float[Array, "T K G H"], kv_cache: KVCache, batch: Batch, first_block: Int[Array, ""], *, scale: float
) -> Float[Array, "T K G H"]:
    """Attention over all of the encoder's keys of each sequence."""

    def run(
        q: Float[Array, "T K G H"],
        k_cache: Num[Array, "num_blocks _ _ cache_H"],
        v_cache: Num[Array, "num_blocks _ _ cache_H"],
    ) -> Float[Array, "T K G H"]:
        block_table = batch.cross_block_table + first_block
        return _paged_attention(
            q, k_cache, v_cache, block_table, batch.cross_context_lens, batch, causal=False, scale=scale
        )

    return map_heads(run, (QUERY, kv_cache_axes(), kv_cache_axes()), QUERY)(q, kv_cache.k, kv_cache.v)


@jax.named_scope("kv_cache/write")
def write_kv(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: KVCache,
    slot_mapping: Int[Array, "T"],
    first_block: Int[Array, ""],
) -> KVCache:
    """Write k and v at the layer's slots (negative: dropped), without attending."""
    block_size, cache_axes = _block_size(kv_cache.k), kv_cache_axes()
    slot_mapping = jnp.where(slot_mapping >= 0, slot_mapping + first_block * block_size, -1)

    def run(
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        k_cache: Num[Array, "num_blocks _ _ cache_H"],
        v_cache: Num[Array, "num_blocks _ _ cache_H"],
    ) -> tuple[Array, Array]:
        return write_kv_cache(k_cache, v_cache, _pad_heads(k, k_cache), _pad_heads(v, v_cache), slot_mapping)

    return KVCache(
        *map_heads(run, (KEY, KEY, cache_axes, cache_axes), (cache_axes, cache_axes))(k, v, kv_cache.k, kv_cache.v)
    )


@jax.named_scope("segment_attention")
def encoder_attention(
    q: Float[Array, "U N H"],
    k: Float[Array, "U N H"],
    v: Float[Array, "U N H"],
    segment_ids: Int[Array, "U"],
    *,
    scale: float,
    segment_len: int | None,
    key_mask: Bool[Array, "U"] | None = None,
) -> Float[Array, "U N H"]:
    """Attention among positions of equal segment id.

    segment_len: the length of every segment, where all have the same. key_mask: False for positions that attend but are
    not attended to.
    """
    run = functools.partial(
        segment_attention, segment_ids=segment_ids, scale=scale, segment_len=segment_len, key_mask=key_mask
    )
    return map_heads(lambda q, k, v: run(q, k, v), (ENCODER_INPUT, ENCODER_INPUT, ENCODER_INPUT), ENCODER_INPUT)(
        q, k, v
    )


def _paged_attention(
    q: Float[Array, "T K G H"],
    k_cache: Num[Array, "num_blocks _ _ cache_H"],
    v_cache: Num[Array, "num_blocks _ _ cache_H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    batch: Batch,
    *,
    causal: bool,
    scale: float,
) -> Float[Array, "T K G H"]:
    """Query blocks of one token are a decode step (token s is of sequence s); longer ones are chunks of prompts."""
    tokens, heads, _, head_dim = q.shape
    q = _pad_heads(q, k_cache)
    num_blocks = batch.seq_index.shape[0]
    if num_blocks == tokens:
        with jax.named_scope("paged_decode"):
            out = paged_decode(q, k_cache, v_cache, block_table, context_lens, scale=scale)
    else:
        blocks = q.reshape(num_blocks, tokens // num_blocks, *q.shape[1:])
        seq_index, q_start = batch.seq_index, batch.q_start
        with jax.named_scope("paged_prefill"):
            out = paged_prefill(
                blocks, k_cache, v_cache, block_table, seq_index, q_start, context_lens, causal=causal, scale=scale
            )
        out = out.reshape(q.shape)
    return out[:, :heads, :, :head_dim]


def _pad_heads(
    x: Float[Array, "T K *group H"], cache: Num[Array, "num_blocks _ _ cache_H"]
) -> Float[Array, "T _ *group cache_H"]:
    """Zero-pad x to the cache's heads and head size: zeros change no score, and their outputs are cut off."""
    heads, width = cache.shape[kv_cache_axes().index("kv_heads")] - x.shape[1], cache.shape[3] - x.shape[-1]
    if heads == width == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, heads), *[(0, 0)] * (x.ndim - 3), (0, width)])
