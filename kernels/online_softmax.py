"""Softmax over keys that arrive in chunks: the running (maximum, sum, weighted values) of Milakov and Gimelshein,
arXiv:1805.02867.

The functions are plain jnp, so that they serve inside Pallas kernels as well.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

State = tuple[Float32[Array, "*rows"], Float32[Array, "*rows"], Float32[Array, "*rows H"]]

MASKED = -1e30
"""Score of a masked key: finite, so that a row whose keys are all masked stays finite too."""


def start(rows: tuple[int, ...], head_dim: int) -> State:
    """The state before any key: maximum [*rows], sum [*rows], values [*rows, head_dim], float32."""
    return (
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, head_dim), jnp.float32),
    )


def fold(
    state: State,
    scores: Float32[Array, "*rows keys"],
    weigh: Callable[[Array], Array],
    exp: Callable[[Array], Array] = jnp.exp,
) -> State:
    """Add a chunk of keys. `weigh` maps weights [*rows, keys] to weighted values [*rows, H]. `exp` is jnp.exp2 where
    the scores are in units of log 2."""
    top, total, values = state
    new_top = jnp.maximum(top, scores.max(-1))
    keep = exp(top - new_top)
    weights = exp(scores - new_top[..., None])
    return new_top, total * keep + weights.sum(-1), values * keep[..., None] + weigh(weights)


def finish(state: State) -> Float[Array, "*rows H"]:
    """The weighted mean of the values; zero where no key was folded."""
    _, total, values = state
    return values / jnp.maximum(total, 1e-30)[..., None]
