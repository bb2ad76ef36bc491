"""Shared by the Pallas-Mosaic kernels: the online softmax with its state in VMEM, from one grid step to the next."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from . import online_softmax, tile
from .tile import Ref

LANES = 128


def softmax_scratch(rows: tuple[int, ...], head_dim: int) -> list[Any]:
    """Scratch for the (row_max, row_sum, acc) of `rows`. The first two are broadcast over the lanes of a register."""
    return [
        pltpu.VMEM((*rows, LANES), jnp.float32),
        pltpu.VMEM((*rows, LANES), jnp.float32),
        pltpu.VMEM((*rows, head_dim), jnp.float32),
    ]


def init(row_max: Ref, row_sum: Ref, acc: Ref) -> None:
    """Write the state before any key."""
    row_max[...] = jnp.full(row_max.shape, online_softmax.MASKED, jnp.float32)
    row_sum[...] = jnp.zeros(row_sum.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)


def update(
    index: tuple[int | Int[Array, ""], ...],
    row_max: Ref,
    row_sum: Ref,
    acc: Ref,
    scores: Float32[Array, "rows keys"],
    value: Float[Array, "keys H"],
) -> None:
    """Add a chunk of keys to the state at `index`, as `online_softmax.update` does."""
    first_lane = (*index, slice(None), slice(0, 1))
    old_max = row_max[first_lane]
    new_max = jnp.maximum(old_max, scores.max(-1, keepdims=True))
    correction, weights = jnp.exp(old_max - new_max), jnp.exp(scores - new_max)
    new_sum = row_sum[first_lane] * correction + weights.sum(-1, keepdims=True)
    row_max[index] = jnp.broadcast_to(new_max, row_max.shape[len(index) :])
    row_sum[index] = jnp.broadcast_to(new_sum, row_sum.shape[len(index) :])
    acc[index] = acc[index] * correction + tile.pv_dot(weights, value)


def finalize(row_sum: Ref, acc: Ref) -> Float32[Array, "*rows H"]:
    """The attention output, acc / row_sum; zero for a row without keys."""
    return acc[...] / jnp.maximum(row_sum[..., :1], 1e-30)


def round_up_to_tile(rows: int, dtype: jnp.dtype) -> int:
    """`rows` rounded up to whole tiles, which have 8 rows of 4-byte numbers or 16 of 2-byte ones."""
    tile_rows = 32 // jnp.dtype(dtype).itemsize
    return pl.cdiv(rows, tile_rows) * tile_rows
