"""The two matrix products of attention on a tile held by a Pallas kernel, accumulated in float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def scores(query: Float[Array, "rows H"], key: Float[Array, "keys H"]) -> Float32[Array, "rows keys"]:
    """query @ key.T"""
    return _dot(query, key, 1)


def weigh(weights: Float32[Array, "rows keys"], value: Float[Array, "keys H"]) -> Float32[Array, "rows H"]:
    """weights @ value, with the weights rounded to the values' dtype."""
    return _dot(weights.astype(value.dtype), value, 0)


def _dot(a: Float[Array, "rows inner"], b: Float[Array, "_ _"], axis: int) -> Float32[Array, "rows _"]:
    # Left to the default, float32 would be rounded to tf32 on GPU and to bfloat16 on TPU.
    exact = jnp.promote_types(a.dtype, b.dtype) == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
