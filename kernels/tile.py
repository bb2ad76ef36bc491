"""The two matrix products of attention, on the tiles of a Pallas kernel, accumulated in float32."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

Ref = Any
"""A reference that Pallas passes to a kernel: jax exports no type of it."""


def qk_dot(query: Float[Array, "rows H"], key: Float[Array, "keys H"]) -> Float32[Array, "rows keys"]:
    """query @ key.T: the scores, before they are scaled."""
    return _dot(query, key, 1)


def pv_dot(weights: Float32[Array, "rows keys"], value: Float[Array, "keys H"]) -> Float32[Array, "rows H"]:
    """weights @ value. The weights are rounded to the dtype of the values."""
    return _dot(weights.astype(value.dtype), value, 0)


def _dot(a: Float[Array, "rows inner"], b: Float[Array, "_ _"], axis: int) -> Float32[Array, "rows _"]:
    # The default precision rounds float32 to tf32 on a GPU and to bfloat16 on a TPU.
    exact = jnp.promote_types(a.dtype, b.dtype) == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
