"""Attention over the paged KV cache, and within the segments of an encoder sequence, with heads split over the mesh."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from mmjax.batch import Batch, KVCache
from mmjax.kernels import (
    kv_heads_first,
    kv_in_one_array,
    paged_attention,
    paged_decode,
    paged_prefill,
    segment_attention,
    write_kv_cache,
)
from mmjax.sharding import map_heads

Q_AXES = ("position", "kv_heads", "group", "head_dim")
KV_AXES = ("position", "kv_heads", "head_dim")
ENCODER_AXES = ("position", "heads", "head_dim")
KVArray = Num[Array, "_ _ _ cache_H"]  # the keys or the values of a KVCache


def kv_cache_axes(platform: str | None = None) -> tuple[str, str, str, str]:
    """Logical axes of the cache's arrays. platform: see `kv_heads_first`."""
    inner = ("kv_heads", "position") if kv_heads_first(platform) else ("position", "kv_heads")
    return ("depth", *inner, "head_dim")


def _block_size(cache: KVArray) -> int:
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
    window: int | None = None,
) -> tuple[Float[Array, "T K G H"], KVCache]:
    """(output, new cache): write k and v into the cache blocks of their sequences, then attend causally to those.

    first_block: id of the layer's first block. window: how many keys a token attends to, its own included; None: all.
    """
    block_size, cache_axes = _block_size(kv_cache.k), kv_cache_axes()

    def write_and_attend(
        q: Float[Array, "T K G H"],
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        k_cache: KVArray,
        v_cache: KVArray,
        batch: Batch,
        first_block: Int[Array, ""],
    ) -> tuple[Float[Array, "T K G H"], KVArray, KVArray]:
        keys = Keys(batch.block_table + first_block, batch.context_lens, causal=True, window=window)
        if kv_in_one_array():
            out, k_cache = _write_and_attend(q, (k, v), k_cache, keys, batch, scale=scale)
            return out, k_cache, v_cache
        slots = jnp.where(batch.slot_mapping >= 0, batch.slot_mapping + first_block * block_size, -1)
        with jax.named_scope("kv_cache/write"):
            k_cache, v_cache = write_kv_cache(k_cache, v_cache, _pad_heads(k, k_cache), _pad_heads(v, v_cache), slots)
        out = _paged_attention(q, k_cache, v_cache, keys, batch, scale=scale)
        return out, k_cache, v_cache

    out, k_cache, v_cache = map_heads(
        write_and_attend, (Q_AXES, KV_AXES, KV_AXES, cache_axes, cache_axes, (), ()), (Q_AXES, cache_axes, cache_axes)
    )(q, k, v, kv_cache.k, kv_cache.v, batch, first_block)
    return out, KVCache(k_cache, v_cache)


def cross_attend(
    q: Float[Array, "T K G H"], kv_cache: KVCache, batch: Batch, first_block: Int[Array, ""], *, scale: float
) -> Float[Array, "T K G H"]:
    """Each token attends to all encoder keys of its sequence. first_block: id of the layer's first block."""

    def attend_heads(
        q: Float[Array, "T K G H"],
        k_cache: KVArray,
        v_cache: KVArray,
        batch: Batch,
        first_block: Int[Array, ""],
    ) -> Float[Array, "T K G H"]:
        keys = Keys(batch.cross_block_table + first_block, batch.cross_context_lens, causal=False)
        if kv_in_one_array():
            return _write_and_attend(q, None, k_cache, keys, batch, scale=scale)[0]
        return _paged_attention(q, k_cache, v_cache, keys, batch, scale=scale)

    return map_heads(attend_heads, (Q_AXES, kv_cache_axes(), kv_cache_axes(), (), ()), Q_AXES)(
        q, kv_cache.k, kv_cache.v, batch, first_block
    )


@jax.named_scope("kv_cache/write")
def write_kv(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: KVCache,
    slot_mapping: Int[Array, "T"],
    first_block: Int[Array, ""],
) -> KVCache:
    """Write k and v at the layer's slots; negative slots are dropped. first_block: id of the layer's first block."""
    block_size, cache_axes = _block_size(kv_cache.k), kv_cache_axes()
    slot_mapping = jnp.where(slot_mapping >= 0, slot_mapping + first_block * block_size, -1)

    def write_heads(
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        k_cache: KVArray,
        v_cache: KVArray,
        slot_mapping: Int[Array, "T"],
    ) -> tuple[KVArray, KVArray]:
        if not kv_in_one_array():
            k, v = _pad_heads(k, k_cache), _pad_heads(v, v_cache)
        return write_kv_cache(k_cache, v_cache, k, v, slot_mapping)

    return KVCache(
        *map_heads(write_heads, (KV_AXES, KV_AXES, cache_axes, cache_axes, ()), (cache_axes, cache_axes))(
            k, v, kv_cache.k, kv_cache.v, slot_mapping
        )
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
    """Each position attends to the positions with its segment id.

    segment_len: the length of every segment, if all have the same. key_mask: False for positions that attend but are
    not attended to.
    """

    def attend_segments(
        q: Float[Array, "U N H"],
        k: Float[Array, "U N H"],
        v: Float[Array, "U N H"],
        segment_ids: Int[Array, "U"],
        key_mask: Bool[Array, "U"] | None,
    ) -> Float[Array, "U N H"]:
        return segment_attention(q, k, v, segment_ids, scale=scale, segment_len=segment_len, key_mask=key_mask)

    return map_heads(attend_segments, (ENCODER_AXES, ENCODER_AXES, ENCODER_AXES, (), ()), ENCODER_AXES)(
        q, k, v, segment_ids, key_mask
    )


class Keys(NamedTuple):
    """Which keys of the cache a query attends to. causal, window: of its sequence, see `paged_prefill`."""

    block_table: Int[Array, "S P"]
    context_lens: Int[Array, "S"]
    causal: bool
    window: int | None = None


@jax.named_scope("paged_attention")
def _write_and_attend(
    q: Float[Array, "T K G H"],
    new_kv: tuple[Float[Array, "T K H"], Float[Array, "T K H"]] | None,
    kv_cache: KVArray,
    keys: Keys,
    batch: Batch,
    *,
    scale: float,
) -> tuple[Float[Array, "T K G H"], KVArray]:
    """(output, cache) where keys and values share one array. new_kv: see `paged_attention`."""
    num_blocks = batch.seq_index.shape[0]
    queries, *new = (x.reshape(num_blocks, -1, *x.shape[1:]) for x in (q, *(new_kv or ())))
    out, kv_cache = paged_attention(
        queries,
        kv_cache,
        (new[0], new[1]) if new else None,
        keys.block_table,
        batch.seq_index,
        batch.q_start,
        keys.context_lens,
        causal=keys.causal,
        scale=scale,
        window=keys.window,
    )
    return out.reshape(q.shape), kv_cache


def _paged_attention(
    q: Float[Array, "T K G H"], k_cache: KVArray, v_cache: KVArray, keys: Keys, batch: Batch, *, scale: float
) -> Float[Array, "T K G H"]:
    """A decode step has query blocks of one token, and token s is of sequence s; a prefill step has longer ones."""
    tokens, head_dim = q.shape[0], q.shape[-1]
    q = _pad_heads(q, k_cache)
    num_blocks = batch.seq_index.shape[0]
    if num_blocks == tokens:
        with jax.named_scope("paged_decode"):
            out = paged_decode(
                q, k_cache, v_cache, keys.block_table, keys.context_lens, scale=scale, window=keys.window
            )
    else:
        query_blocks = q.reshape(num_blocks, tokens // num_blocks, *q.shape[1:])
        seq_index, q_start = batch.seq_index, batch.q_start
        with jax.named_scope("paged_prefill"):
            out = paged_prefill(
                query_blocks,
                k_cache,
                v_cache,
                keys.block_table,
                seq_index,
                q_start,
                keys.context_lens,
                causal=keys.causal,
                scale=scale,
                window=keys.window,
            )
        out = out.reshape(q.shape)
    return out[..., :head_dim]


def _pad_heads(x: Float[Array, "T K *group H"], cache: KVArray) -> Float[Array, "T K *group cache_H"]:
    """Zero-pad x to the head size of the cache. Zeros change no score; the caller drops their outputs."""
    extra_dim = cache.shape[3] - x.shape[-1]
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, extra_dim)]) if extra_dim else x
