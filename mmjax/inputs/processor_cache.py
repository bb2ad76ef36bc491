"""Processed media items that several requests may share."""

from __future__ import annotations

import collections
import threading

from mmjax.processors.base import MediaItem


class ProcessorCache:
    """Processed items by key, least recently used out first, within a budget of bytes. Items above it are not kept."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.queries = self.hits = self.used_bytes = 0
        self._items: collections.OrderedDict[str, MediaItem] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> MediaItem | None:
        with self._lock:
            self.queries += 1
            item = self._items.get(key)
            if item is not None:
                self.hits += 1
                self._items.move_to_end(key)
            return item

    def put(self, key: str, item: MediaItem) -> None:
        with self._lock:
            if item.nbytes > self.budget_bytes or key in self._items:
                return
            self._items[key] = item
            self.used_bytes += item.nbytes
            while self.used_bytes > self.budget_bytes:
                self.used_bytes -= self._items.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget every item; the statistics go on."""
        with self._lock:
            self._items.clear()
            self.used_bytes = 0
