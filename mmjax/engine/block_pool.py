"""Who owns which page of the pool, and which pages still hold a prefix worth finding again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockPool:
    """Allocator of page ids 1..count-1 (page 0 belongs to nobody), with a cache of full pages by content key.

    A page that nobody references stays findable by its key until it is needed for something else; the page that has
    been unreferenced longest goes first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.block_size = size
        self.num_blocks = count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count))
        self._refs = [0] * count
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody references."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, n: int) -> list[int]:
        """n pages nobody references, now with one reference each. The caller has checked `free`."""
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
        """Drop one reference of each page; the tail of a sequence is reused before its head."""
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._hash_of:  # nothing to find again in it, so it goes first
                    self._free.move_to_end(block_id, last=False)

    def find_cached(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest prefix of `keys` that is cached. Takes no reference."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def add_reference(self, block_ids: Sequence[int]) -> None:
        """Take one more reference of each page."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                del self._free[block_id]
            self._refs[block_id] += 1

    def num_unreferenced(self, block_ids: Sequence[int]) -> int:
        """How many of these pages are counted in `free`."""
        return sum(self._refs[block_id] == 0 for block_id in block_ids)

    def cache_block(self, block_id: int, block_hash: bytes) -> None:
        """Make a full page findable. The first page with a key keeps it."""
        if block_hash not in self._block_of and block_id not in self._hash_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def reset_prefix_cache(self) -> bool:
        """Empty the cache. False, and nothing done, while any page is referenced."""
        if self.num_free != self.num_blocks - 1:
            return False
        self._block_of.clear()
        self._hash_of.clear()
        return True


def block_hash(parent: bytes, tokens: np.ndarray, extra: bytes) -> bytes:
    """The content key of a full page: all that came before it, its tokens i32[size], and the media it overlaps."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(tokens.tobytes())
    digest.update(extra)
    return digest.digest()
