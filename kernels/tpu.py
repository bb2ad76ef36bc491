"""What the Pallas-Mosaic kernels share: the online softmax with its state in VMEM, carried from one grid step to the
next."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from . import online_softmax, tile

LANES = 128


def state(rows: tuple[int, ...], head_dim: int) -> list[Any]:
    """Scratch for (maximum, sum, weighted values) of `rows`; the first two are spread over a vector register's
    lanes."""
    return [
        pltpu.VMEM((*rows, LANES), jnp.float32),
        pltpu.VMEM((*rows, LANES), jnp.float32),
        pltpu.VMEM((*rows, head_dim), jnp.float32),
    ]


def start(top: Any, total: Any, values: Any) -> None:
    """Write the state before any key."""
    top[...] = jnp.full(top.shape, online_softmax.MASKED, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    values[...] = jnp.zeros(values.shape, jnp.float32)


def fold(
    at: tuple[int, ...],
    top: Any,
    total: Any,
    values: Any,
    scores: Float32[Array, "rows keys"],
    value: Float[Array, "keys H"],
) -> None:
    """Add a chunk of keys to the state at index `at`, as `online_softmax.fold` does."""
    before = top[(*at, slice(None), slice(0, 1))]
    new = jnp.maximum(before, scores.max(-1, keepdims=True))
    keep, weights = jnp.exp(before - new), jnp.exp(scores - new)
    sums = total[(*at, slice(None), slice(0, 1))] * keep + weights.sum(-1, keepdims=True)
    top[at] = jnp.broadcast_to(new, top.shape[len(at) :])
    total[at] = jnp.broadcast_to(sums, total.shape[len(at) :])
    values[at] = values[at] * keep + tile.weigh(weights, value)


def finish(total: Any, values: Any) -> Float32[Array, "*rows H"]:
    """The weighted mean of the values; zero where no key was folded."""
    return values[...] / jnp.maximum(total[..., :1], 1e-30)


def sublanes(rows: int, dtype: jnp.dtype) -> int:
    """`rows` rounded up to whole tiles: 8 rows of 4 bytes, 16 of 2."""
    whole = 32 // jnp.dtype(dtype).itemsize
    return pl.cdiv(rows, whole) * whole
