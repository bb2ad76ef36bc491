"""Which rows of the device's media slab hold which item's embeddings."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np


@dataclasses.dataclass
class CachedEmbeds:
    """One item's rows i32[n] of the slab and the sequences that still need them."""

    rows: np.ndarray
    users: set[int]


class EncoderCache:
    """Rows of the slab by content key. Entries without users stay until their rows are needed, oldest first."""

    def __init__(self, rows: int) -> None:
        self.capacity = rows
        self._free = list(range(rows - 1, -1, -1))
        self._entries: OrderedDict[str, CachedEmbeds] = OrderedDict()
        self._idle = 0  # rows of entries without users

    def get(self, key: str) -> np.ndarray | None:
        """The rows of a cached item."""
        entry = self._entries.get(key)
        return None if entry is None else entry.rows

    def use(self, key: str, user: int) -> None:
        """Keep a cached item until this user lets it go."""
        entry = self._entries[key]
        if not entry.users:
            self._idle -= len(entry.rows)
        entry.users.add(user)
        self._entries.move_to_end(key)

    def fits(self, rows: int) -> bool:
        """Whether that many rows can be had, by evicting idle entries if need be."""
        return rows <= len(self._free) + self._idle

    def allocate(self, key: str, rows: int, user: int) -> np.ndarray:
        """Rows for a new item, used by `user`. The caller has checked `fits`."""
        idle = (
            iter([k for k, entry in self._entries.items() if not entry.users]) if rows > len(self._free) else iter(())
        )
        while rows > len(self._free):
            gone = self._entries.pop(next(idle))
            self._free.extend(gone.rows.tolist())
            self._idle -= len(gone.rows)
        taken = np.asarray([self._free.pop() for _ in range(rows)], np.int32)
        self._entries[key] = CachedEmbeds(taken, {user})
        return taken

    def release(self, key: str, user: int) -> None:
        """`user` no longer needs the item. Unknown keys and users are ignored: release is idempotent."""
        entry = self._entries.get(key)
        if entry is None or user not in entry.users:
            return
        entry.users.discard(user)
        if not entry.users:
            self._idle += len(entry.rows)

    def clear(self) -> None:
        """Forget every item that nobody uses."""
        for key in [k for k, entry in self._entries.items() if not entry.users]:
            entry = self._entries.pop(key)
            self._free.extend(entry.rows.tolist())
            self._idle -= len(entry.rows)
