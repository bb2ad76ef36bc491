"""Sum and norm in jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def run(
    x: Float[Array, "M D"], y: Float[Array, "*parts M D"], weight: Float[Array, "D"], *, eps: float
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """See `add_rms_norm`."""
    parts = y if y.ndim == 3 else y[None]
    total = (x.astype(jnp.float32) + parts.astype(jnp.float32).sum(0)).astype(x.dtype)
    exact = total.astype(jnp.float32)
    normed = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
    return total, normed.astype(x.dtype) * weight
