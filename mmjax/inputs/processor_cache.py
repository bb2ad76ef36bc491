"""Processed media items that several requests may share."""

from __future__ import annotations

import threading

from cachetools import LRUCache

from mmjax.processors.base import MediaItem


class ProcessorCache:
    """An LRU cache of processed items within a budget of bytes. An item above the budget is not stored. Counts lookups
    and hits. May be used from several threads."""

    def __init__(self, budget_bytes: int):
        self.queries = self.hits = 0
        self._items: LRUCache[str, MediaItem] = LRUCache(budget_bytes, getsizeof=lambda item: item.nbytes)
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return int(self._items.currsize)

    def get(self, key: str) -> MediaItem | None:
        with self._lock:
            item = self._items.get(key)
            self.queries += 1
            self.hits += item is not None
            return item

    def put(self, key: str, item: MediaItem) -> None:
        with self._lock:
            if item.nbytes <= self._items.maxsize and key not in self._items:
                self._items[key] = item

    def clear(self) -> None:
        """Remove every item. The statistics are not reset."""
        with self._lock:
            self._items.clear()
