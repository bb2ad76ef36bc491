"""Inputs of jitted programs: the KV cache, the batch of a step, and the layout of the packed batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

LayoutFields = tuple[tuple[str, tuple[int, ...], str], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Every layer's keys and values, in blocks: layer i has block ids [i * n, (i + 1) * n) of num_blocks = L * n.

    k, v: [num_blocks, block_size, K, H], on the CPU [num_blocks, K, block_size, H]; on a TPU k holds both, as
    `kernels.kv_cache.pack_kv` lays them out in [num_blocks, K, block_size, lanes], and v is empty. Block 0 of a layer
    belongs to no sequence: block tables are padded with it.
    """

    k: Num[Array, "num_blocks _ _ H"]
    v: Num[Array, "v_blocks _ _ H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The tokens of a step: B query blocks of Q tokens (T = B * Q), each of one of S sequences.

    mm_index: the row of mm_embeds that replaces the token's embedding, or -1. slot_mapping: the slot of the token's key
    and value in a layer, block id * block_size + offset, or -1 for padding. seq_index: the sequence of each query
    block. q_start: position of the block's first token in its sequence, -Q for padding. block_table: block ids of each
    sequence in order of position. context_lens: keys of each sequence after this step. cross_block_table,
    cross_context_lens: the same for the encoder's keys (X = 0 for decoder-only models).
    """

    token_ids: Int[Array, "T"]
    rope_positions: Int[Array, "R T"]
    mm_index: Int[Array, "T"]
    slot_mapping: Int[Array, "T"]
    seq_index: Int[Array, "B"]
    q_start: Int[Array, "B"]
    block_table: Int[Array, "S P"]
    context_lens: Int[Array, "S"]
    cross_block_table: Int[Array, "S X"]
    cross_context_lens: Int[Array, "S"]


class PackedLayout:
    """Names, shapes and dtypes of arrays that share one int32 vector, so that a step costs one copy to the device."""

    def __init__(self, fields: LayoutFields) -> None:
        self.fields = fields
        self.sizes = [int(np.prod(shape, dtype=np.int64)) for _, shape, _ in fields]
        self.size = sum(self.sizes)

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """NumPy views of the fields in int32 [size], to be filled in place; booleans are int32 here."""
        out, offset = {}, 0
        for (name, shape, dtype), size in zip(self.fields, self.sizes, strict=True):
            view = vector[offset : offset + size].view(np.float32 if dtype == "f32" else np.int32)
            out[name] = view.reshape(shape)
            offset += size
        return out

    def unpack(self, vector: Int[Array, "size"]) -> dict[str, Array]:
        """The fields as arrays, inside jit."""
        out, offset = {}, 0
        for (name, shape, dtype), size in zip(self.fields, self.sizes, strict=True):
            array = jax.lax.slice(vector, (offset,), (offset + size,)).reshape(shape)
            offset += size
            if dtype == "f32":
                array = jax.lax.bitcast_convert_type(array, jnp.float32)
            out[name] = array != 0 if dtype == "bool" else array
        return out


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that is at least n. Raises ValueError if none is."""
    for size in sizes:
        if n <= size:
            return size
    raise ValueError(f"{n} exceeds the largest bucket, {sizes[-1]}")


def nest(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """Turn {"a.0.b": x} into {"a": {0: {"b": x}}}, the form in which nnx takes a module's arrays."""
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
