"""The two matrix products of attention on a tile held by a Pallas kernel, accumulated in float32."""

import jax
import jax.numpy as jnp
from jax import lax


def scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """[rows, H] x [keys, H] -> [rows, keys] float32."""
    return _dot(query, key, 1)


def weigh(weights: jax.Array, value: jax.Array) -> jax.Array:
    """[rows, keys] float32 x [keys, H] -> [rows, H] float32. The weights are rounded to the values' dtype."""
    return _dot(weights.astype(value.dtype), value, 0)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    # Left to the default, float32 would be rounded to tf32 on GPU and to bfloat16 on TPU.
    exact = jnp.promote_types(a.dtype, b.dtype) == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
