"""Attention inside the segments of a packed sequence of encoder units (patches of an image, frames of a clip)."""

import jax

from ..choose import implementation
from .cudnn import serves


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    segment_len: int | None = None,
    key_mask: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Unit u attends every unit of its own segment.

    q, k, v [U, N, H]; segment [U] int32: equal values are contiguous runs, -1 is padding at the tail (finite output) ->
    [U, N, H] in q's dtype. `uniform=n` promises that every segment, padding included, is n long and n divides U;
    `segment` is then not read. `seen` bool[U], without `uniform` only: units that attend but are not attended to are
    False (a segment of none but such units gives any finite output). Raises NotImplementedError where `impl` does not
    serve the shape.
    """
    if segment_len is not None and key_mask is not None:
        raise ValueError("segment_attention: in segments of one length all units are seen")
    if segment_len is not None and q.shape[0] % segment_len:
        raise ValueError(f"segment_attention: {q.shape[0]} units are not whole segments of {segment_len}")
    if impl is None and jax.default_backend() == "gpu" and serves(q, segment_len):
        impl = "cudnn"  # 1.6 to 2.2 times the Triton kernel's speed on an H100, where it applies
    hidden = {} if key_mask is None else {"key_mask": key_mask}
    return implementation("segment_attention", impl)(
        q, k, v, segment_ids, scale=scale, segment_len=segment_len, **hidden
    )
