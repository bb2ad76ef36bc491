"""Attention of blocks of queries where keys and values share one array, and the write of the new ones."""

from jaxtyping import Array, Float, Int, Num

from ..choose import implementation


def paged_attention(
    q: Float[Array, "B Q K G H"],
    kv_cache: Num[Array, "num_blocks K block_size lanes"],
    new_kv: tuple[Float[Array, "B Q K H"], Float[Array, "B Q K H"]] | None,
    block_table: Int[Array, "S P"],
    seq_index: Int[Array, "B"],
    q_start: Int[Array, "B"],
    context_lens: Int[Array, "S"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B Q K G H"], Num[Array, "num_blocks K block_size lanes"]]:
    """(output, cache): `paged_prefill` over a cache as `kv_cache.pack_kv` lays it out; decode is Q = 1.

    new_kv: the keys and values of the queries, which are written first, to the slots that block_table gives their
    positions; those past the end of their sequence are dropped. None: the cache already holds every key. The query
    blocks of a sequence come in order of position. Raises ValueError for a window or new keys without `causal`, and
    NotImplementedError if `impl` does not support the shapes.
    """
    if not causal and (window is not None or new_kv is not None):
        raise ValueError("paged_attention: only causal attention has a window or new keys")
    run = implementation("paged_attention", impl)
    return run(
        q, kv_cache, new_kv, block_table, seq_index, q_start, context_lens, causal=causal, scale=scale, window=window
    )
