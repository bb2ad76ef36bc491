"""What crosses the jit boundary: the batch of a step, the device state, and the one array the batch travels in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
LayoutFields = tuple[tuple[str, tuple[int, ...], str], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Every layer's keys and values, in pages: layer i owns page ids [i * n, (i + 1) * n) of L * n.

    k, v: [L * n, page, K, H], on the CPU [L * n, K, page, H]. Page 0 of each layer belongs to nobody: padding points
    there.
    """

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's tokens as a model sees them: B blocks of Q tokens, each block of one of S sequences (T = B * Q).

    tokens: i32[T]. positions: i32[R, T], rotary positions. media: i32[T], row of the media slab that replaces the
    token's embedding, or -1. slot: i32[T], page * page_size + offset where the token's key and value go within a
    layer, or -1 for padding. owner: i32[B], the sequence of each block. start: i32[B], place of a block's first
    token in its sequence, -Q for padding. pages: i32[S, P]. length: i32[S], keys that exist after this step.
    cross_pages: i32[S, X] and cross_length: i32[S], the encoder's keys (X = 0 for decoder-only models).
    """

    token_ids: Array
    rope_positions: Array
    mm_index: Array
    slot_mapping: Array
    seq_index: Array
    q_start: Array
    block_table: Array
    context_lens: Array
    cross_block_table: Array
    cross_context_lens: Array


class PackedLayout:
    """Names, shapes and dtypes of arrays that share one int32 vector, so that a step costs one host-to-device copy."""

    def __init__(self, fields: LayoutFields) -> None:
        self.fields = fields
        self.sizes = [int(np.prod(shape, dtype=np.int64)) for _, shape, _ in fields]
        self.size = sum(self.sizes)

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """NumPy views into i32[size], to be written in place; booleans are int32 here."""
        out, at = {}, 0
        for (name, shape, dtype), size in zip(self.fields, self.sizes, strict=True):
            kind = np.float32 if dtype == "f32" else np.int32
            out[name] = vector[at : at + size].view(kind).reshape(shape)
            at += size
        return out

    def unpack(self, vector: Array) -> dict[str, Array]:
        """The same arrays on the device, inside jit."""
        out, at = {}, 0
        for (name, shape, dtype), size in zip(self.fields, self.sizes, strict=True):
            piece = jax.lax.slice(vector, (at,), (at + size,)).reshape(shape)
            at += size
            if dtype == "f32":
                piece = jax.lax.bitcast_convert_type(piece, jnp.float32)
            out[name] = piece != 0 if dtype == "bool" else piece
        return out


def bucket(n: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds n. Raises ValueError when none does."""
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
