"""Who owns which page of the pool, and which pages still hold a prefix worth finding again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class Pages:
    """Allocator of page ids 1..count-1 (page 0 belongs to nobody), with a cache of full pages by content key.

    A page that nobody references stays findable by its key until it is needed for something else; the page that has
    been unreferenced longest goes first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.count = count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count))
        self._refs = [0] * count
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that nobody references."""
        return len(self._free)

    def need(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.size)

    def take(self, n: int) -> list[int]:
        """n pages nobody references, now with one reference each. The caller has checked `free`."""
        pages = []
        for _ in range(n):
            page, _ = self._free.popitem(last=False)
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
            self._refs[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; the tail of a sequence is reused before its head."""
        for page in reversed(pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free[page] = None
                if page not in self._key_of:  # nothing to find again in it, so it goes first
                    self._free.move_to_end(page, last=False)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest prefix of `keys` that is cached. Takes no reference."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Take one more reference of each page."""
        for page in pages:
            if self._refs[page] == 0:
                del self._free[page]
            self._refs[page] += 1

    def unreferenced(self, pages: Sequence[int]) -> int:
        """How many of these pages are counted in `free`."""
        return sum(self._refs[page] == 0 for page in pages)

    def register(self, page: int, key: bytes) -> None:
        """Make a full page findable. The first page with a key keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self) -> bool:
        """Empty the cache. False, and nothing done, while any page is referenced."""
        if self.free != self.count - 1:
            return False
        self._page_of.clear()
        self._key_of.clear()
        return True


def page_key(parent: bytes, tokens: np.ndarray, extra: bytes) -> bytes:
    """The content key of a full page: all that came before it, its tokens i32[size], and the media it overlaps."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(tokens.tobytes())
    digest.update(extra)
    return digest.digest()
