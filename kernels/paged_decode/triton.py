"""Decode on GPU: split-KV (flash decoding) in Pallas-Triton.

A program computes all query heads of one kv head, so that a key is read once, over one of `num_splits` equal splits of
a sequence's keys. XLA combines the splits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from .. import gpu, online_softmax, tile
from ..choose import raise_unsupported
from ..tile import Ref

TARGET_PROGRAMS = 512
"""The number of programs to aim for: about four for each of the 132 multiprocessors of an H100."""
MAX_SPLITS = 64


def run(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks block_size K H"],
    v_cache: Num[Array, "num_blocks block_size K H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "S K G H"]:
    """See `paged_decode`. block_size and H must be powers of two, from 16 up."""
    S, K, G, H = q.shape
    block_size = k_cache.shape[1]
    if not (gpu.is_power_of_2(block_size) and gpu.is_power_of_2(H)) or min(block_size, H) < gpu.TENSOR_CORE_ROWS:
        raise_unsupported(
            "paged_decode", "triton", "block_size and head dim must be powers of two >= 16", q=q, k=k_cache
        )
    key_block = gpu.key_block_size(block_size, k_cache.dtype)
    rows = max(gpu.TENSOR_CORE_ROWS, pl.next_power_of_2(G))
    max_keys = block_table.shape[1] * block_size
    if window is not None:
        max_keys = min(max_keys, window + key_block)
    num_splits = max(1, min(MAX_SPLITS, TARGET_PROGRAMS // (S * K), max_keys // key_block))
    query = jnp.pad(q, ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    row_max, row_sum, acc = pl.pallas_call(
        functools.partial(_kernel, key_block=key_block, num_splits=num_splits, scale=scale * gpu.LOG2E, window=window),
        grid=(S, K, num_splits),
        in_specs=[pl.BlockSpec((None, None, rows, H), lambda s, h, i: (s, h, 0, 0)), *[pl.no_block_spec] * 4],
        out_specs=[
            pl.BlockSpec((None, None, None, rows), lambda s, h, i: (s, h, i, 0)),
            pl.BlockSpec((None, None, None, rows), lambda s, h, i: (s, h, i, 0)),
            pl.BlockSpec((None, None, None, rows, H), lambda s, h, i: (s, h, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((S, K, num_splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((S, K, num_splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((S, K, num_splits, rows, H), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3 if H * k_cache.dtype.itemsize <= 256 else 2),
        interpret=interpret,
        name="paged_decode",
    )(query, k_cache, v_cache, block_table, context_lens)
    correction = jnp.exp2(row_max - row_max.max(2, keepdims=True))[:, :, :, :G]
    acc = (acc[:, :, :, :G] * correction[..., None]).sum(2)
    row_sum = (row_sum[:, :, :, :G] * correction).sum(2)
    return (acc / jnp.maximum(row_sum, 1e-30)[..., None]).astype(q.dtype)


def _kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    block_table_ref: Ref,
    context_lens_ref: Ref,
    row_max_ref: Ref,
    row_sum_ref: Ref,
    acc_ref: Ref,
    *,
    key_block: int,
    num_splits: int,
    scale: float,
    window: int | None,
) -> None:
    s, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block_size = k_ref.shape[1]
    context_len = context_lens_ref[s]
    low = 0 if window is None else jnp.maximum(context_len - window, 0)
    first_block = 0 if window is None else lax.div(low, key_block)
    end_block = lax.div(context_len + (key_block - 1), key_block)
    blocks_per_split = lax.div(end_block - first_block + (num_splits - 1), num_splits)
    query = q_ref[...]

    def chunk(c: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        first_key = c * key_block
        block_id, rows = (
            block_table_ref[s, lax.div(first_key, block_size)],
            pl.ds(lax.rem(first_key, block_size), key_block),
        )
        key_pos = first_key + jnp.arange(key_block, dtype=jnp.int32)
        in_context = key_pos < context_len
        visible = in_context if window is None else in_context & (key_pos >= low)
        scores = tile.qk_dot(query, k_ref[block_id, rows, h, :]) * scale
        value = plgpu.load(v_ref.at[block_id, rows, h, :], mask=in_context[:, None], other=0.0)
        scores = jnp.where(visible[None], scores, online_softmax.MASKED)
        return online_softmax.update(state, scores, lambda weights: tile.pv_dot(weights, value), exp=jnp.exp2)

    state = online_softmax.init(q_ref.shape[:1], q_ref.shape[1])
    first = first_block + i * blocks_per_split
    row_max_ref[...], row_sum_ref[...], acc_ref[...] = lax.fori_loop(
        first, jnp.minimum(first + blocks_per_split, end_block), chunk, state
    )
