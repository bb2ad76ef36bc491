"""`MediaConnector` fetches media from URLs and decodes them, within the operator's rules."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mmjax.config import env, env_number
from mmjax.multimodal import network, url_sources
from mmjax.multimodal.cache import MediaCache
from mmjax.multimodal.connector import Media
from mmjax.multimodal.media.audio import AudioEmbeddingMediaIO, AudioMediaIO
from mmjax.multimodal.media.base import MediaIO
from mmjax.multimodal.media.image import ImageEmbeddingMediaIO, ImageMediaIO
from mmjax.multimodal.media.video import Frames, VideoMediaIO
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import MODALITIES, RequestError

log = logging.getLogger(__name__)

T = TypeVar("T")


class MediaConnector:
    """Fetches and decodes media. May be used from several threads; the coroutines may be cancelled.

    media_io_kwargs: options of the decoders, by modality; checked here. connection: the policy for HTTP; None reads it
    from the environment. allowed_local_media_path: the directory from which file: URLs may be read.
    allowed_media_domains: the hosts from which media may be fetched; None allows all with a public address. Every
    method raises RequestError for a URL that may not be fetched, a host that does not answer (`network.FetchTimeout` if
    it is slow) and data that cannot be decoded.
    """

    def __init__(
        self,
        media_io_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        connection: network.FetchPolicy | None = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: Sequence[str] | None = None,
        limits: MediaLimits | None = None,
    ):
        self.limits = limits or MediaLimits.from_env()
        self.allowed = url_sources.allowed_directory(allowed_local_media_path)
        self.policy = connection or network.FetchPolicy.from_env(allowed_media_domains, self.limits.source_bytes)
        self.timeouts = {
            "image": env_number("IMAGE_FETCH_TIMEOUT", 5),
            "video": env_number("VIDEO_FETCH_TIMEOUT", 30),
            "audio": env_number("AUDIO_FETCH_TIMEOUT", 10),
        }
        self.cache = MediaCache.from_env()
        self.media_io_kwargs = media_io_kwargs or {}
        self.image_io, self.video_io, self.audio_io = self._image_io("RGB"), self._video_io("RGB"), self._audio_io()

    def _options(self, modality: str, media_io: type[MediaIO[Any]]) -> dict[str, Any]:
        given = self.media_io_kwargs.get(modality, {})
        if not isinstance(given, Mapping):
            raise RequestError(
                f"media_io_kwargs[{modality!r}] must be a dictionary, got {type(given).__name__}.", "bad_media_kwargs"
            )
        for name in given:
            if name not in media_io.OPTIONS:
                log.warning("media_io_kwargs[%r]: %r is unknown and has no effect", modality, name)
        return {name: given[name] for name in media_io.OPTIONS if name in given} | {"limits": self.limits}

    def _image_io(self, image_mode: str) -> ImageMediaIO:
        return ImageMediaIO(**{"image_mode": image_mode, **self._options("image", ImageMediaIO)})

    def _video_io(self, image_mode: str) -> VideoMediaIO:
        return VideoMediaIO(self._image_io(image_mode), **self._options("video", VideoMediaIO))

    def _audio_io(self) -> AudioMediaIO:
        return AudioMediaIO(**self._options("audio", AudioMediaIO))

    # --- with a decoder of the caller's choice

    def load_from_url(self, url: str, media_io: MediaIO[T], *, fetch_timeout: float | None = None) -> T:
        """Fetch a URL and decode it with `media_io`. fetch_timeout: seconds for the first attempt; None uses
        audio's."""
        if url_sources.scheme_of(url) in ("http", "https"):
            return network.wait_for(self._load_remote(url, media_io, self._timeout(fetch_timeout)))
        return self._load_local(url, media_io)

    async def load_from_url_async(self, url: str, media_io: MediaIO[T], *, fetch_timeout: float | None = None) -> T:
        """`load_from_url` without blocking the event loop: files are read and decoded on other threads."""
        if url_sources.scheme_of(url) in ("http", "https"):
            return await self._load_remote(url, media_io, self._timeout(fetch_timeout))
        return await network.in_worker(self._load_local, url, media_io)

    async def _load_remote(self, url: str, media_io: MediaIO[T], timeout_s: float) -> T:
        """Take the data from the cache, or fetch them, and cache them if they can be decoded."""
        network.parse(url, self.policy)  # before the cache, so that forbidden URLs are refused
        cached = None if self.cache is None else await network.in_worker(self.cache.get, url, self.policy)
        data = cached or await network.fetch(url, self.policy, timeout_s)
        media = await network.in_worker(media_io.load_bytes, data)
        if self.cache is not None and cached is None:
            await network.in_worker(self.cache.put, url, self.policy, data)
        return media

    def _load_local(self, url: str, media_io: MediaIO[T]) -> T:
        if url_sources.scheme_of(url) == "data":
            return media_io.load_base64(*url_sources.split_data_url(url))
        return media_io.load_bytes(url_sources.read_file_url(url, self.allowed, self.limits))

    def _timeout(self, fetch_timeout: float | None) -> float:
        return self.timeouts["audio"] if fetch_timeout is None else fetch_timeout

    # --- by the name of the modality

    def fetch(self, modality: str, url: str) -> Media:
        """The media item at a URL."""
        fetch: Mapping[str, Callable[[str], Media]] = {
            "image": self.fetch_image,
            "audio": self.fetch_audio,
            "video": self.fetch_video,
        }
        return fetch[_known(modality)](url)

    async def fetch_async(self, modality: str, url: str) -> Media:
        """The media item at a URL."""
        fetch: Mapping[str, Callable[[str], Awaitable[Media]]] = {
            "image": self.fetch_image_async,
            "audio": self.fetch_audio_async,
            "video": self.fetch_video_async,
        }
        return await fetch[_known(modality)](url)

    def decode_embeds(self, modality: str, text: str) -> np.ndarray:
        """The tensor in base64 text."""
        return self.fetch_audio_embedding(text) if modality == "audio" else self.fetch_image_embedding(text)

    # --- one method per modality

    def fetch_image(self, image_url: str, *, image_mode: str = "RGB") -> Image.Image:
        """The image at a URL."""
        media_io = self.image_io if image_mode == "RGB" else self._image_io(image_mode)
        return self.load_from_url(image_url, media_io, fetch_timeout=self.timeouts["image"]).media

    async def fetch_image_async(self, image_url: str, *, image_mode: str = "RGB") -> Image.Image:
        """The image at a URL."""
        media_io = self.image_io if image_mode == "RGB" else self._image_io(image_mode)
        return (await self.load_from_url_async(image_url, media_io, fetch_timeout=self.timeouts["image"])).media

    def fetch_audio(self, audio_url: str) -> tuple[np.ndarray, float]:
        """(samples, sampling rate) of the audio file, or of the video's audio track, at a URL."""
        return self.load_from_url(audio_url, self.audio_io, fetch_timeout=self.timeouts["audio"])

    async def fetch_audio_async(self, audio_url: str) -> tuple[np.ndarray, float]:
        """(samples, sampling rate) of the audio file, or of the video's audio track, at a URL."""
        return await self.load_from_url_async(audio_url, self.audio_io, fetch_timeout=self.timeouts["audio"])

    def fetch_video(self, video_url: str, *, image_mode: str = "RGB") -> Frames:
        """(frames, metadata) of the video at a URL."""
        media_io = self.video_io if image_mode == "RGB" else self._video_io(image_mode)
        return self.load_from_url(video_url, media_io, fetch_timeout=self.timeouts["video"])

    async def fetch_video_async(self, video_url: str, *, image_mode: str = "RGB") -> Frames:
        """(frames, metadata) of the video at a URL."""
        media_io = self.video_io if image_mode == "RGB" else self._video_io(image_mode)
        return await self.load_from_url_async(video_url, media_io, fetch_timeout=self.timeouts["video"])

    def fetch_image_embedding(self, data: str) -> np.ndarray:
        """The tensor in base64 text."""
        return ImageEmbeddingMediaIO(limits=self.limits).load_base64("", data)

    def fetch_audio_embedding(self, data: str) -> np.ndarray:
        """The tensor in base64 text."""
        return AudioEmbeddingMediaIO(limits=self.limits).load_base64("", data)


def _known(modality: str) -> str:
    if modality not in MODALITIES:
        raise RequestError(f"Unsupported modality: {modality}.", "bad_modality")
    return modality


class ConnectorRegistry:
    """Connectors by name; MMJAX_MEDIA_CONNECTOR names the one to use."""

    def __init__(self) -> None:
        self._connectors: dict[str, Callable[..., MediaConnector]] = {}

    def register(self, name: str) -> Callable[[Callable[..., MediaConnector]], Callable[..., MediaConnector]]:
        """A decorator that registers a connector under a name."""

        def decorate(connector: Callable[..., MediaConnector]) -> Callable[..., MediaConnector]:
            self._connectors[name] = connector
            return connector

        return decorate

    def load(self, name: str | None = None, *args: Any, **kwargs: Any) -> MediaConnector:
        """A new connector of the class with this name, by default the one named in the environment. ValueError for an
        unknown name."""
        name = name or env("MEDIA_CONNECTOR", "http")
        if name not in self._connectors:
            known = sorted(self._connectors)
            raise RequestError(f"Extension class {name} not found; known are {known}.", "unknown_name")
        return self._connectors[name](*args, **kwargs)


MEDIA_CONNECTOR_REGISTRY = ConnectorRegistry()
MEDIA_CONNECTOR_REGISTRY.register("http")(MediaConnector)
