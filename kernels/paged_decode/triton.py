"""Decode on GPU: split-KV (flash decoding) in Pallas-Triton.

A program serves one kv head of one sequence, all its query heads at once, so that a key is read once, and one of
`splits` equal shares of the sequence's keys. XLA combines the shares.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from .. import gpu, online_softmax, tile
from ..choose import refuse

PROGRAMS = 512
"""Programs to aim for: about four for each of 132 multiprocessors."""
MAX_SPLITS = 64


def run(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks block_size K H"],
    v_cache: Num[Array, "num_blocks block_size K H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "S K G H"]:
    """See `paged_decode`. block_size and H must be powers of two, from 16 up."""
    S, K, G, H = q.shape
    block_size = k_cache.shape[1]
    if not (gpu.power_of_2(block_size) and gpu.power_of_2(H)) or min(block_size, H) < gpu.TENSOR_CORE_ROWS:
        refuse("paged_decode", "triton", "page and head dim must be powers of two >= 16", q=q, k=k_cache)
    block = gpu.key_block(block_size, k_cache.dtype)
    rows = max(gpu.TENSOR_CORE_ROWS, pl.next_power_of_2(G))
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (S * K), block_table.shape[1] * block_size // block))
    query = jnp.pad(q, ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    top, total, values = pl.pallas_call(
        functools.partial(_kernel, block=block, splits=splits, scale=scale * gpu.LOG2E),
        grid=(S, K, splits),
        in_specs=[pl.BlockSpec((None, None, rows, H), lambda s, h, i: (s, h, 0, 0)), *[pl.no_block_spec] * 4],
        out_specs=[
            pl.BlockSpec((None, None, None, rows), lambda s, h, i: (s, h, i, 0)),
            pl.BlockSpec((None, None, None, rows), lambda s, h, i: (s, h, i, 0)),
            pl.BlockSpec((None, None, None, rows, H), lambda s, h, i: (s, h, i, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((S, K, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((S, K, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((S, K, splits, rows, H), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3 if H * k_cache.dtype.itemsize <= 256 else 2),
        interpret=interpret,
        name="paged_decode",
    )(query, k_cache, v_cache, block_table, context_lens)
    weight = jnp.exp2(top - top.max(2, keepdims=True))[:, :, :, :G]
    values = (values[:, :, :, :G] * weight[..., None]).sum(2)
    total = (total[:, :, :, :G] * weight).sum(2)
    return (values / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    block_table_ref: Any,
    context_lens_ref: Any,
    top_ref: Any,
    total_ref: Any,
    values_ref: Any,
    *,
    block: int,
    splits: int,
    scale: float,
) -> None:
    s, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block_size = k_ref.shape[1]
    context_len = context_lens_ref[s]
    blocks = lax.div(context_len + (block - 1), block)
    share = lax.div(blocks + (splits - 1), splits)
    query = q_ref[...]

    def chunk(c: Int[Array, ""], state: online_softmax.State) -> online_softmax.State:
        at = c * block
        block_id, rows = block_table_ref[s, lax.div(at, block_size)], pl.ds(lax.rem(at, block_size), block)
        live = at + jnp.arange(block, dtype=jnp.int32) < context_len
        x = tile.scores(query, k_ref[block_id, rows, h, :]) * scale
        value = plgpu.load(v_ref.at[block_id, rows, h, :], mask=live[:, None], other=0.0)
        x = jnp.where(live[None], x, online_softmax.MASKED)
        return online_softmax.fold(state, x, lambda weights: tile.weigh(weights, value), exp=jnp.exp2)

    state = online_softmax.start(q_ref.shape[:1], q_ref.shape[1])
    first = i * share
    top_ref[...], total_ref[...], values_ref[...] = lax.fori_loop(
        first, jnp.minimum(first + share, blocks), chunk, state
    )
