"""Segment attention on GPU by cuDNN's fused attention, for segments of one length: a batch without masks."""

import jax
import jax.numpy as jnp

from ..choose import refuse


def serves(q: jax.Array, segment_len: int | None) -> bool:
    """Segments of one length, half precision, head dim a multiple of 8 up to 128."""
    return (
        segment_len is not None and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 128
    )


def run(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, scale: float, segment_len: int | None = None
) -> jax.Array:
    """See `segment_attention`; only what it `serves`."""
    U, N, H = q.shape
    if segment_len is None or not serves(q, segment_len):
        refuse("segment_attention", "cudnn", "needs segments of one length, half precision, head dim 8, 16 .. 128", q=q)
    batch = (x.reshape(U // segment_len, segment_len, N, H) for x in (q, k, v))
    return jax.nn.dot_product_attention(*batch, scale=scale, implementation="cudnn").reshape(U, N, H)
