"""Attention inside the segments of a packed encoder sequence (patches of an image, steps of sound)."""

import jax
from jaxtyping import Array, Bool, Float, Int

from ..choose import implementation
from .cudnn import serves


def segment_attention(
    q: Float[Array, "U N H"],
    k: Float[Array, "U N H"],
    v: Float[Array, "U N H"],
    segment_ids: Int[Array, "U"],
    *,
    scale: float,
    segment_len: int | None = None,
    key_mask: Bool[Array, "U"] | None = None,
    impl: str | None = None,
) -> Float[Array, "U N H"]:
    """Each position attends every position of its own segment. The output is in q's dtype.

    segment_ids: equal values are contiguous; -1 is padding at the end, whose output is finite. segment_len: promises
    that every segment, padding included, has this length, which divides U; segment_ids is then not read. key_mask,
    without segment_len only: False for positions that attend but are not attended to (a segment of only such positions
    gives any finite output). Raises NotImplementedError where `impl` does not serve the shapes.
    """
    if segment_len is not None and key_mask is not None:
        raise ValueError("segment_attention: in segments of one length all units are seen")
    if segment_len is not None and q.shape[0] % segment_len:
        raise ValueError(f"segment_attention: {q.shape[0]} units are not whole segments of {segment_len}")
    if impl is None and jax.default_backend() == "gpu" and serves(q, segment_len):
        impl = "cudnn"  # 1.6 to 2.2 times the Triton kernel's speed on an H100, where it applies
    masked = {} if key_mask is None else {"key_mask": key_mask}
    return implementation("segment_attention", impl)(
        q, k, v, segment_ids, scale=scale, segment_len=segment_len, **masked
    )
