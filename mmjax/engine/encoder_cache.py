"""Allocates rows of the device's mm_embeds buffer to media items, and finds cached items by hash."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np


@dataclasses.dataclass
class CachedEmbeds:
    """The rows i32[n] of one item's embeddings, and the ids of the sequences that still need them."""

    rows: np.ndarray
    users: set[int]


class EncoderCache:
    """Rows of the buffer by item hash. Entries that no sequence uses stay until their rows are needed; the least
    recently used one is evicted first."""

    def __init__(self, num_rows: int) -> None:
        self.capacity = num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self._entries: OrderedDict[str, CachedEmbeds] = OrderedDict()
        self._num_unused = 0  # rows of entries without users

    def get(self, item_hash: str) -> np.ndarray | None:
        """The rows of a cached item."""
        entry = self._entries.get(item_hash)
        return None if entry is None else entry.rows

    def use(self, item_hash: str, seq_id: int) -> None:
        """Keep a cached item until this sequence releases it."""
        entry = self._entries[item_hash]
        if not entry.users:
            self._num_unused -= len(entry.rows)
        entry.users.add(seq_id)
        self._entries.move_to_end(item_hash)

    def fits(self, num_rows: int) -> bool:
        """Whether this many rows can be allocated, evicting unused entries if necessary."""
        return num_rows <= len(self._free) + self._num_unused

    def allocate(self, item_hash: str, num_rows: int, seq_id: int) -> np.ndarray:
        """Allocate rows for a new item, used by this sequence. The caller has checked `fits`."""
        unused = iter(self._unused() if num_rows > len(self._free) else ())
        while num_rows > len(self._free):
            self._evict(next(unused))
        rows = np.asarray([self._free.pop() for _ in range(num_rows)], np.int32)
        self._entries[item_hash] = CachedEmbeds(rows, {seq_id})
        return rows

    def release(self, item_hash: str, seq_id: int) -> None:
        """The sequence no longer needs the item. Idempotent: unknown hashes and sequences are ignored."""
        entry = self._entries.get(item_hash)
        if entry is None or seq_id not in entry.users:
            return
        entry.users.discard(seq_id)
        if not entry.users:
            self._num_unused += len(entry.rows)

    def clear(self) -> None:
        """Evict every item that no sequence uses."""
        for item_hash in self._unused():
            self._evict(item_hash)

    def _unused(self) -> list[str]:
        return [item_hash for item_hash, entry in self._entries.items() if not entry.users]

    def _evict(self, item_hash: str) -> None:
        rows = self._entries.pop(item_hash).rows
        self._free.extend(rows.tolist())
        self._num_unused -= len(rows)
