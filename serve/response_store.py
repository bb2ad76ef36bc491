"""The responses that POST /v1/responses keeps for later requests, in a bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import cachetools
from fastapi import Request

Json = dict[str, Any]
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredResponse:
    """A response, and the items of its conversation up to its output. size: bytes of both as JSON."""

    response: Json
    items: list[Json]
    size: int


class ResponseStore:
    """Responses by (owner, id). max_bytes: of all of them; the least recently used make room. Conversations share their
    items, but count them once each, so the memory in use is smaller. For the event loop only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._stored: cachetools.LRUCache[Key, StoredResponse] = cachetools.LRUCache(
            max_bytes, getsizeof=lambda stored: stored.size
        )

    def get(self, key: Key) -> StoredResponse | None:
        return self._stored.get(key)

    def put(self, key: Key, stored: StoredResponse) -> bool:
        """Whether the response was stored: it is not if it is larger than the whole store."""
        if stored.size > self.max_bytes:
            return False
        self._stored[key] = stored
        return True

    def delete(self, key: Key) -> bool:
        """Whether there was such a response."""
        return self._stored.pop(key, None) is not None


def owner_of(request: Request) -> str:
    """Whose responses a request may see: those of requests with the same key."""
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
