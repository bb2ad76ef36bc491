"""Attention of blocks of queries over the keys of their sequences in the cache: chunked prefill, cross attention."""

from jaxtyping import Array, Float, Int, Num

from ..choose import implementation


def paged_prefill(
    q: Float[Array, "B Q K G H"],
    k_cache: Num[Array, "num_blocks _ _ H"],
    v_cache: Num[Array, "num_blocks _ _ H"],
    block_table: Int[Array, "S P"],
    seq_index: Int[Array, "B"],
    q_start: Int[Array, "B"],
    context_lens: Int[Array, "S"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    impl: str | None = None,
) -> Float[Array, "B Q K G H"]:
    """Block b holds Q consecutive queries of sequence seq_index[b]; its query j has position q_start[b] + j.

    k_cache, v_cache, block_table: as for `paged_decode`. The output is in q's dtype. A causal query attends to keys
    0..min(position, context_len - 1), given a window only to keys after position - window; a query of cross attention
    to keys 0..context_len - 1. The output is finite for a query past the end of its sequence, and for a padding block
    (seq_index 0, q_start -Q), which attends to nothing. Raises ValueError for a window without `causal`, and
    NotImplementedError if `impl` does not support the shapes.
    """
    if window is not None and not causal:
        raise ValueError("paged_prefill: only causal attention has a window")
    return implementation("paged_prefill", impl)(
        q, k_cache, v_cache, block_table, seq_index, q_start, context_lens, causal=causal, scale=scale, window=window
    )
