"""Attention of blocks of queries over the pages of their sequences: prefill in chunks, and cross attention."""

import jax

from ..choose import implementation


def paged_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_table: jax.Array,
    seq_index: jax.Array,
    q_start: jax.Array,
    context_lens: jax.Array,
    *,
    causal: bool,
    scale: float,
    impl: str | None = None,
) -> jax.Array:
    """Block b holds Q consecutive queries of sequence owner[b]; query j of it has position start[b] + j.

    q [B, Q, K, G, H]; k, v [num_blocks, block_size, K, H] (the reference: [num_blocks, K, block_size, H], see
    `kv_heads_first`); block_table [S, P]
    int32; owner, start [B] int32; length [S] int32 -> [B, Q, K, G, H] in q's dtype. Causal: a query sees keys
    0..min(position, length - 1); otherwise (cross attention) keys 0..length - 1. A query past its sequence's length
    gives a finite output, and so does a padding block (owner 0, start -Q), which sees nothing. Raises
    NotImplementedError where `impl` does not serve the shape.
    """
    return implementation("paged_prefill", impl)(
        q, k, v, block_table, seq_index, q_start, context_lens, causal=causal, scale=scale
    )
