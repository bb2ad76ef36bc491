"""Media of a conversation -> their data: all at once, on threads or on an event loop; the first failure ends it."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mmjax.chat.parts import MediaRef

Fetched = Any


class Connector(Protocol):
    """Where media come from; see `mmjax.multimodal.media.MediaConnector`."""

    def fetch_image(self, image_url: str) -> Any: ...
    def fetch_audio(self, audio_url: str) -> Any: ...
    def fetch_video(self, video_url: str) -> Any: ...
    async def fetch_image_async(self, image_url: str) -> Any: ...
    async def fetch_audio_async(self, audio_url: str) -> Any: ...
    async def fetch_video_async(self, video_url: str) -> Any: ...
    def fetch_image_embedding(self, data: str) -> Any: ...
    def fetch_audio_embedding(self, data: str) -> Any: ...


def fetch_all(media: Sequence[MediaRef], connector: Connector, pool: concurrent.futures.Executor) -> list[Fetched]:
    """The data of each medium, in order; None for those to be found in the cache."""
    if sum(map(is_elsewhere, media)) < 2:
        return [_fetch(ref, connector) for ref in media]
    futures = [pool.submit(_fetch, ref, connector) for ref in media]
    try:
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()  # of several failures the first in the conversation is told
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def fetch_all_async(media: Sequence[MediaRef], connector: Connector) -> list[Fetched]:
    """The same without blocking the event loop. A failure cancels the other downloads before it is raised."""
    tasks = [asyncio.ensure_future(_fetch_async(ref, connector)) for ref in media]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_elsewhere(ref: MediaRef) -> bool:
    """Whether there is something to fetch or to decode."""
    if ref.form == "embeds":
        return any(isinstance(value, str) for value in _named(ref).values())
    return ref.value is not None and ref.form == "url"


def at_hand(ref: MediaRef) -> Fetched:
    """The data of a medium that is not elsewhere."""
    return _named(ref) or None if ref.form == "embeds" else ref.value


def _fetch(ref: MediaRef, connector: Connector) -> Fetched:
    if not is_elsewhere(ref):
        return at_hand(ref)
    if ref.form == "embeds":
        return _embeds(ref, connector)
    fetch: Mapping[str, Callable[[str], Any]] = {
        "image": connector.fetch_image,
        "audio": connector.fetch_audio,
        "video": connector.fetch_video,
    }
    return fetch[ref.modality](ref.value)


async def _fetch_async(ref: MediaRef, connector: Connector) -> Fetched:
    if not is_elsewhere(ref):
        return at_hand(ref)
    if ref.form == "embeds":
        return await asyncio.to_thread(_embeds, ref, connector)
    if ref.modality == "image":
        return await connector.fetch_image_async(ref.value)
    if ref.modality == "audio":
        return await connector.fetch_audio_async(ref.value)
    return await connector.fetch_video_async(ref.value)


def _embeds(ref: MediaRef, connector: Connector) -> dict[str, Any]:
    """Named arrays, decoded where they came as base64."""
    decode = connector.fetch_audio_embedding if ref.modality == "audio" else connector.fetch_image_embedding
    return {name: decode(value) if isinstance(value, str) else value for name, value in _named(ref).items()}


def _named(ref: MediaRef) -> dict[str, Any]:
    """The arrays of embeddings by name; none for those to be found in the cache."""
    if ref.value is None or isinstance(ref.value, dict):
        return ref.value or {}
    return {f"{ref.modality}_embeds": ref.value}
