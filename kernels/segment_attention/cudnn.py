"""Segment attention on GPU by cuDNN's fused attention, for segments of one length: they are a batch without a mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..choose import raise_unsupported


def supports(q: Float[Array, "U N H"], segment_len: int | None) -> bool:
    """Whether segments have one length, in half precision, with a head dim that is a multiple of 8 up to 128."""
    return (
        segment_len is not None and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 128
    )


def run(
    q: Float[Array, "U N H"],
    k: Float[Array, "U N H"],
    v: Float[Array, "U N H"],
    segment_ids: Int[Array, "U"],
    *,
    scale: float,
    segment_len: int | None = None,
) -> Float[Array, "U N H"]:
    """See `segment_attention`. Raises NotImplementedError for what it does not support."""
    U, N, H = q.shape
    if segment_len is None or not supports(q, segment_len):
        raise_unsupported(
            "segment_attention", "cudnn", "needs segments of one length, half precision, head dim 8, 16 .. 128", q=q
        )
    batch = (x.reshape(U // segment_len, segment_len, N, H) for x in (q, k, v))
    return jax.nn.dot_product_attention(*batch, scale=scale, implementation="cudnn").reshape(U, N, H)
