"""A decode step's attention from the qkv product on: the end of the norm before it, bias, norms and rotation of queries
and keys, the write of the new key and value, and attention over the blocks of the KV cache."""

import dataclasses
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Float32, Int, Num

from ..attn_states import AttnStates
from ..choose import implementation

__all__ = ["QKVEpilogue", "fused_decode"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@no_type_check  # jax also builds it with shapes in place of arrays
class QKVEpilogue:
    """What is still to be done to a product of queries, keys and values; None: nothing.

    cos, sin: the rotation of queries and keys. sum_squares: to be summed over P, the squares of the `hidden_size`
    numbers that each row was multiplied from; the row is divided by the root of their mean. bias: of the heads of qkv.
    q_norm, k_norm: the weights of each head's RMS norm.
    """

    cos: Float32[Array, "S half_H"]
    sin: Float32[Array, "S half_H"]
    sum_squares: Float32[Array, "P S"] | None = None
    bias: Float[Array, "K heads H"] | None = None
    q_norm: Float[Array, "H"] | None = None
    k_norm: Float[Array, "H"] | None = None
    hidden_size: int = dataclasses.field(default=0, metadata={"static": True})
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})


def fused_decode(
    qkv: Float[Array, "*parts S K heads H"],
    epilogue: QKVEpilogue,
    k_cache: Num[Array, "num_blocks _ _ H"],
    v_cache: Num[Array, "num_blocks _ _ H"],
    block_table: Int[Array, "S P"],
    context_lens: Int[Array, "S"],
    slot_mapping: Int[Array, "S"],
    first_block: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "S KGH"] | AttnStates, Num[Array, "num_blocks _ _ H"], Num[Array, "num_blocks _ _ H"]]:
    """Sequence s writes its new key and value and attends its keys 0..context_lens[s]-1, the last being the new one,
    or the last `window` of them.

    qkv: [S, K, G + 2, H], or float32 with a leading axis to be summed over; G queries, a key and a value of each kv
    head. k_cache, v_cache: as for `paged_decode`, donated. block_table, slot_mapping: as for `paged_decode` and
    `write_kv_cache`, but counted from the layer's first block id `first_block`. Returns attention [S, K * G * H] in the
    dtype of the queries, or `AttnStates` to be merged where the keys were split, and the cache. A sequence of length 0
    gives a finite output. Raises NotImplementedError where `impl` does not serve the shapes.
    """
    run = implementation("fused_decode", impl)
    arrays = (k_cache, v_cache, block_table, context_lens, slot_mapping, first_block)
    return run(qkv, epilogue, *arrays, scale=scale, window=window)
