"""Online softmax: attention over keys that arrive in chunks, after Milakov and Gimelshein, arXiv:1805.02867.

The state is (row_max, row_sum, acc): for each query row, the largest score so far, the sum of exp(score - row_max), and
the sum of exp(score - row_max) * value. The functions are plain jnp, so Pallas kernels call them too.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float32

State = tuple[Float32[Array, "*rows"], Float32[Array, "*rows"], Float32[Array, "*rows H"]]

MASKED = -1e30
"""The score of a masked key. It is finite, so that a row whose keys are all masked stays finite."""


def init(rows: tuple[int, ...], head_dim: int) -> State:
    """The state before any key: float32 [*rows], [*rows] and [*rows, head_dim]."""
    return (
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, head_dim), jnp.float32),
    )


def update(
    state: State,
    scores: Float32[Array, "*rows keys"],
    weighted_sum: Callable[[Float32[Array, "*rows keys"]], Float32[Array, "*rows H"]],
    exp: Callable[[Float32[Array, "..."]], Float32[Array, "..."]] = jnp.exp,
) -> State:
    """The state after a chunk of keys.

    weighted_sum: maps the weights of the chunk's keys to the weighted sum of their values. exp: jnp.exp2 for scores
    that are scaled by log2(e).
    """
    row_max, row_sum, acc = state
    new_max = jnp.maximum(row_max, scores.max(-1))
    correction = exp(row_max - new_max)
    weights = exp(scores - new_max[..., None])
    return new_max, row_sum * correction + weights.sum(-1), acc * correction[..., None] + weighted_sum(weights)


def finalize(state: State) -> Float32[Array, "*rows H"]:
    """The attention output, acc / row_sum; zero for a row without keys."""
    _, row_sum, acc = state
    return acc / jnp.maximum(row_sum, 1e-30)[..., None]
