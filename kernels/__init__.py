"""Attention over a paged KV cache and over packed encoder sequences: one public function per op, several
implementations each.

    paged_decode        one query per sequence, keys and values in the cache
    paged_prefill       blocks of queries, keys and values in the cache, causal or not
    segment_attention   packed encoder sequences, attention inside each segment
    write_kv_cache      new keys and values into the cache

Axis letters: S sequences, B query blocks, Q queries per block, T tokens, U positions of a packed encoder sequence, P
cache blocks per sequence, K kv heads, G query heads per kv head, N attention heads, H head dim. `choose.py` says which
implementation runs on which platform.

transformers imports `kernels` to see whether the distribution of that name is installed, and finds this folder if the
repository's root is on sys.path. Imported under that name, this module imports and defines nothing.
"""

if __name__ != "kernels":
    # An op and its folder have the same name. These imports run before any of the folder alone, so the name stays that
    # of the function.
    from .choose import (
        IMPLEMENTATIONS,
        kv_cache_dtype,
        kv_cache_head_dim,
        kv_cache_heads,
        kv_heads_first,
        multiplies_bfloat16,
        q_block_size,
        select,
    )
    from .kv_cache import write_kv_cache
    from .paged_decode import paged_decode
    from .paged_prefill import paged_prefill
    from .segment_attention import segment_attention

    __all__ = [
        "IMPLEMENTATIONS",
        "kv_cache_dtype",
        "kv_cache_head_dim",
        "kv_cache_heads",
        "kv_heads_first",
        "multiplies_bfloat16",
        "paged_decode",
        "paged_prefill",
        "q_block_size",
        "segment_attention",
        "select",
        "write_kv_cache",
    ]
