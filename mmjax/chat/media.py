"""Fetches the media of a conversation concurrently, on threads or on an event loop, until the first failure."""

import asyncio
import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from PIL import Image

from mmjax.chat.parts import MediaRef
from mmjax.multimodal.connector import Connector, Media

MediaData: TypeAlias = Media | Mapping[str, Any] | None
"""A media item, the named arrays of embeddings, or None for an item in the processor cache."""


def fetch_all(media: Sequence[MediaRef], connector: Connector, pool: concurrent.futures.Executor) -> list[MediaData]:
    """The data of each media item, in order."""
    if sum(map(needs_fetch, media)) < 2:
        return [_fetch(ref, connector) for ref in media]
    futures = [pool.submit(_fetch, ref, connector) for ref in media]
    try:
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()  # of several failures, raise the first in the conversation
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def fetch_all_async(media: Sequence[MediaRef], connector: Connector) -> list[MediaData]:
    """`fetch_all` without blocking the event loop. A failure cancels the other downloads before it is raised."""
    tasks = [asyncio.ensure_future(_fetch_async(ref, connector)) for ref in media]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def needs_fetch(ref: MediaRef) -> bool:
    """Whether there is something to fetch or to decode."""
    if ref.source == "embeds":
        return any(isinstance(value, str) for value in _fields(ref).values())
    return ref.source == "url" and ref.value is not None


def local_data(ref: MediaRef) -> MediaData:
    """The data of an item that needs no fetching."""
    if ref.source == "embeds":
        return _fields(ref) or None
    assert ref.value is None or isinstance(ref.value, Image.Image)
    return ref.value


def _fetch(ref: MediaRef, connector: Connector) -> MediaData:
    if not needs_fetch(ref):
        return local_data(ref)
    if ref.source == "embeds":
        return _decode_embeds(ref, connector)
    return connector.fetch(ref.modality, ref.value)


async def _fetch_async(ref: MediaRef, connector: Connector) -> MediaData:
    if not needs_fetch(ref):
        return local_data(ref)
    if ref.source == "embeds":
        return await asyncio.to_thread(_decode_embeds, ref, connector)
    return await connector.fetch_async(ref.modality, ref.value)


def _decode_embeds(ref: MediaRef, connector: Connector) -> dict[str, Any]:
    """The named arrays of embeddings, decoded where they are base64 text."""
    return {
        name: connector.decode_embeds(ref.modality, value) if isinstance(value, str) else value
        for name, value in _fields(ref).items()
    }


def _fields(ref: MediaRef) -> dict[str, Any]:
    """The arrays of embeddings by name; empty for embeddings that are in the processor cache."""
    if ref.value is None or isinstance(ref.value, dict):
        return ref.value or {}
    return {f"{ref.modality}_embeds": ref.value}
