"""Attention of one query per sequence over its keys in the cache."""

from jaxtyping import Array, Float, Int, Num

from ..choose import implementation


def paged_decode(
    q: Float[Array, "S K G H"],
    k_cache: Num[Array, "num_blocks _ _ H"],
    v_cache: Num[Array, "num_blocks _ _ H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    *,
    scale: float,
    window: int | None = None,
    impl: str | None = None,
) -> Float[Array, "S K G H"]:
    """Sequence s attends to its keys 0..context_lens[s]-1, or to the last `window` of them. The output is in
    q's dtype, and finite for a length of 0.

    k_cache, v_cache: [num_blocks, block_size, K, H], or [num_blocks, K, block_size, H] where `kv_heads_first`.
    block_table: block ids in order of position, with the layer's offset added; key j of s is in block block_table[s, j
    // block_size]. Raises NotImplementedError if `impl` does not support the shapes.
    """
    return implementation("paged_decode", impl)(
        q, k_cache, v_cache, block_table, context_lens, scale=scale, window=window
    )
