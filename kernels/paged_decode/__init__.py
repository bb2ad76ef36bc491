"""Attention of one query per sequence over its pages."""

import jax

from ..choose import implementation


def paged_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_table: jax.Array,
    context_lens: jax.Array,
    *,
    scale: float,
    impl: str | None = None,
) -> jax.Array:
    """Sequence s attends its keys 0..length[s]-1.

    q [S, K, G, H]; k, v [pages, page, K, H] (for the reference [pages, K, page, H], see `kv_heads_first`); pages [S, P]
    int32, page ids in order of position (layer included); length [S] int32 -> [S, K, G, H] in q's dtype. Length 0 gives
    a finite output. Key j of s lies in page pages[s, j // page]. Raises NotImplementedError where `impl` does not serve
    the shape.
    """
    return implementation("paged_decode", impl)(q, k, v, block_table, context_lens, scale=scale)
