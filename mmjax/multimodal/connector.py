"""The protocol of connectors, which fetch media. `mmjax.multimodal.media.MediaConnector` implements it; it imports an
HTTP client, so it is imported only when the first connector is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

IoKwargs: TypeAlias = Mapping[str, Mapping[str, Any]]
"""`media_io_kwargs`: modality -> options of its decoder."""

Media: TypeAlias = Image.Image | tuple[np.ndarray, float] | tuple[np.ndarray, dict[str, Any]]
"""An image, audio (samples, sampling rate), or a video (frames, metadata)."""


class Connector(Protocol):
    """Fetches and decodes media. May be used from several threads; the coroutine may be cancelled. RequestError for
    URLs that may not be fetched, and for data that cannot be decoded."""

    def fetch(self, modality: str, url: str) -> Media:
        """The media item at a URL."""
        ...

    async def fetch_async(self, modality: str, url: str) -> Media:
        """`fetch` without blocking the event loop."""
        ...

    def decode_embeds(self, modality: str, text: str) -> np.ndarray:
        """The tensor in base64 text."""
        ...


Connect: TypeAlias = Callable[[IoKwargs], Connector]
"""Makes the connector of a request from its media_io_kwargs."""
