"""Allocates the blocks of the KV cache, and finds cached blocks by the hash of the prefix that they end."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockPool:
    """Allocator of block ids 1..num_blocks-1 (padding uses block 0), with a cache of full blocks by their hashes.

    A block without references stays in the cache until it is allocated again; the block that has been free longest is
    allocated first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._refs = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks without references."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """n free blocks, now with one reference each. The caller has checked `num_free`."""
        block_ids = []
        for _ in range(n):
            block_id, _ = self._free.popitem(last=False)
            block_hash = self._hash_of.pop(block_id, None)
            if block_hash is not None:
                del self._block_of[block_hash]
            self._refs[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each block; the last blocks of a sequence are reused before its first."""
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._hash_of:  # not in the cache, so nothing is lost when it is reused first
                    self._free.move_to_end(block_id, last=False)

    def find_cached(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of `hashes` that is cached. Takes no reference."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def add_reference(self, block_ids: Sequence[int]) -> None:
        """Take one more reference of each block."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                del self._free[block_id]
            self._refs[block_id] += 1

    def num_unreferenced(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks are free."""
        return sum(self._refs[block_id] == 0 for block_id in block_ids)

    def cache_block(self, block_id: int, block_hash: bytes) -> None:
        """Put a full block into the cache, unless a block with the same hash is there already."""
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def reset_prefix_cache(self) -> bool:
        """Empty the cache. Returns False, and does nothing, while any block has a reference."""
        if self.num_free != self.num_blocks - 1:
            return False
        self._block_of.clear()
        self._hash_of.clear()
        return True


def block_hash(parent: bytes, token_ids: np.ndarray, media: bytes) -> bytes:
    """The hash of a full block, from the hash of the block before it, its tokens i32[block_size] and its media."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(token_ids.tobytes())
    digest.update(media)
    return digest.digest()
