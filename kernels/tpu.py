"""Shared by the Pallas-Mosaic kernels: the online softmax with its state in VMEM, from one grid step to the next."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from . import online_softmax, tile
from .tile import Ref

LANES = 128


def softmax_scratch(rows: tuple[int, ...], head_dim: int) -> list[Any]:
    """Scratch for the (row_max, row_sum, acc) of `rows`. row_max is broadcast over the lanes of a register; row_sum is
    the sum of its lanes, which are added up at the end."""
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
    """Add a chunk of keys, whose number is a multiple of LANES, to the state at `index`, as `online_softmax.update`
    does."""
    old_max = row_max[(*index, slice(None), slice(0, 1))]
    new_max = jnp.maximum(old_max, scores.max(-1, keepdims=True))
    correction, weights = jnp.exp(old_max - new_max), jnp.exp(scores - new_max)
    lane_sums = functools.reduce(jnp.add, jnp.split(weights, weights.shape[1] // LANES, axis=1))
    row_max[index] = jnp.broadcast_to(new_max, row_max.shape[len(index) :])
    row_sum[index] = row_sum[index] * correction + lane_sums
    acc[index] = acc[index] * correction + tile.pv_dot(weights, value)


def finalize(row_sum: Ref, acc: Ref) -> Float32[Array, "*rows H"]:
    """The attention output, acc / row_sum; zero for a row without keys."""
    return acc[...] / jnp.maximum(row_sum[...].sum(-1, keepdims=True), 1e-30)


def round_up_to_tile(rows: int, dtype: jnp.dtype) -> int:
    """`rows` rounded up to whole tiles, which have 8 rows of 4-byte numbers or 16 of 2-byte ones."""
    tile_rows = 32 // jnp.dtype(dtype).itemsize
    return pl.cdiv(rows, tile_rows) * tile_rows
