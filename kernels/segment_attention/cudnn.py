"""Segment attention on GPU by cuDNN's fused attention, for segments of one length: a batch without masks."""

import jax
import jax.numpy as jnp

from ..choose import refuse


def run(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, *, scale: float, uniform: int | None = None
) -> jax.Array:
    """See `segment_attention`. Half precision, `uniform` given, head dim a multiple of 8 up to 128."""
    U, N, H = q.shape
    if uniform is None or q.dtype not in (jnp.bfloat16, jnp.float16) or H % 8 or H > 128:
        refuse("segment_attention", "cudnn", "needs segments of one length, half precision, head dim 8, 16 .. 128", q=q)
    batch = (x.reshape(U // uniform, uniform, N, H) for x in (q, k, v))
    return jax.nn.dot_product_attention(*batch, scale=scale, implementation="cudnn").reshape(U, N, H)
