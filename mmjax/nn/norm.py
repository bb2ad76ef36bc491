"""Normalization over the last axis, computed in float32 whatever the weights' dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*shape n"], scale: Float[Array, "... n"], eps: float) -> Float[Array, "*shape n"]:
    """x / rms(x) * scale, rounded to x's dtype before the scale is applied (as transformers does)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


def layer_norm(
    x: Float[Array, "*shape n"], scale: Float[Array, "n"], bias: Float[Array, "n"], eps: float
) -> Float[Array, "*shape n"]:
    """(x - mean) / std * scale + bias, in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
