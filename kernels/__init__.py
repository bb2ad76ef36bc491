"""Attention over a paged KV cache and over packed encoder sequences, and the other parts of a decode step: one public
function per op, several implementations each.

    paged_decode        one query per sequence, keys and values in the cache
    paged_prefill       blocks of queries, keys and values in the cache, causal or not
    paged_attention     both of them where keys and values share one array, with the write of the new ones
    segment_attention   packed encoder sequences, attention inside each segment
    write_kv_cache      new keys and values into the cache
    fused_decode        a decode step's attention, with the norms, rotation and cache write before it
    merge_attn_states   attention over splits of the keys, merged
    skinny_matmul       a few rows times a weight
    add_rms_norm        a residual sum and the norm after it

Axis letters: S sequences, B query blocks, Q queries per block, T tokens, U positions of a packed encoder sequence, P
cache blocks per sequence, K kv heads, G query heads per kv head, N attention heads, H head dim. `choose.py` says which
implementation runs on which platform.

transformers imports `kernels` to see whether the distribution of that name is installed, and finds this folder if the
repository's root is on sys.path. Imported under that name, this module imports and defines nothing.
"""

if __name__ != "kernels":
    # An op and its folder have the same name. These imports run before any of the folder alone, so the name stays that
    # of the function.
    from .add_rms_norm import add_rms_norm
    from .attn_states import AttnStates
    from .choose import (
        IMPLEMENTATIONS,
        current_platform,
        kv_block_size,
        kv_cache_dtype,
        kv_cache_head_dim,
        kv_heads_first,
        kv_in_one_array,
        multiplies_bfloat16,
        q_block_size,
        select,
    )
    from .fused_decode import QKVEpilogue, fused_decode
    from .kv_cache import write_kv_cache
    from .merge_attn_states import merge_attn_states
    from .paged_attention import paged_attention
    from .paged_decode import paged_decode
    from .paged_prefill import paged_prefill
    from .segment_attention import segment_attention
    from .skinny_matmul import Product, ResidualParts, Tile, skinny_matmul, tile_for

    __all__ = [
        "IMPLEMENTATIONS",
        "AttnStates",
        "Product",
        "QKVEpilogue",
        "ResidualParts",
        "Tile",
        "add_rms_norm",
        "current_platform",
        "fused_decode",
        "kv_block_size",
        "kv_cache_dtype",
        "kv_cache_head_dim",
        "kv_heads_first",
        "kv_in_one_array",
        "merge_attn_states",
        "multiplies_bfloat16",
        "paged_attention",
        "paged_decode",
        "paged_prefill",
        "q_block_size",
        "segment_attention",
        "select",
        "skinny_matmul",
        "tile_for",
        "write_kv_cache",
    ]
