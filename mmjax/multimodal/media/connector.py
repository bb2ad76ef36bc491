"""From URL to medium: `MediaConnector` knows where media may come from and how they are decoded."""

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
    """Fetches and decodes media.

    media_io_kwargs: options of the decoders by modality; they are checked here, so that a wrong one is told at once.
    connection: the rules for HTTP, where not those of the environment. allowed_local_media_path: the directory from
    which file: URLs may be read. allowed_media_domains: the hosts from which media may be fetched, None: all with a
    public address. Every method raises RequestError for a URL that may not be followed, a source that does not answer
    (`network.FetchTimeout` if it is slow) and data that cannot be decoded. Safe to use from several threads; the
    coroutines may be cancelled.
    """

    def __init__(
        self,
        media_io_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        connection: network.Policy | None = None,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: Sequence[str] | None = None,
        limits: MediaLimits | None = None,
    ):
        self.limits = limits or MediaLimits.from_env()
        self.allowed = url_sources.allowed_directory(allowed_local_media_path)
        self.policy = connection or network.Policy.from_env(allowed_media_domains, self.limits.source_bytes)
        self.timeouts = {
            "image": env_number("IMAGE_FETCH_TIMEOUT", 5),
            "video": env_number("VIDEO_FETCH_TIMEOUT", 30),
            "audio": env_number("AUDIO_FETCH_TIMEOUT", 10),
        }
        self.kept = MediaCache.from_env()
        self.media_io_kwargs = media_io_kwargs or {}
        self.images, self.videos, self.sounds = self._image_io("RGB"), self._video_io("RGB"), self._audio_io()

    def _options(self, kind: str, reader: type[MediaIO[Any]]) -> dict[str, Any]:
        asked = self.media_io_kwargs.get(kind, {})
        if not isinstance(asked, Mapping):
            raise RequestError(
                f"media_io_kwargs[{kind!r}] must be a dictionary, got {type(asked).__name__}.", "bad_media_kwargs"
            )
        for name in asked:
            if name not in reader.OPTIONS:
                log.warning("media_io_kwargs[%r]: %r is unknown and has no effect", kind, name)
        return {name: asked[name] for name in reader.OPTIONS if name in asked} | {"limits": self.limits}

    def _image_io(self, image_mode: str) -> ImageMediaIO:
        return ImageMediaIO(**{"image_mode": image_mode, **self._options("image", ImageMediaIO)})

    def _video_io(self, image_mode: str) -> VideoMediaIO:
        return VideoMediaIO(self._image_io(image_mode), **self._options("video", VideoMediaIO))

    def _audio_io(self) -> AudioMediaIO:
        return AudioMediaIO(**self._options("audio", AudioMediaIO))

    # --- from a URL to what a reader makes of it

    def load_from_url(self, url: str, media_io: MediaIO[T], *, fetch_timeout: float | None = None) -> T:
        """What `media_io` reads at the URL. `fetch_timeout` (s) is for the first attempt, and 10 s if it is missing."""
        if url_sources.scheme_of(url) in ("http", "https"):
            return network.wait_for(self._load_remote(url, media_io, self._patience(fetch_timeout)))
        return self._load_local(url, media_io)

    async def load_from_url_async(self, url: str, media_io: MediaIO[T], *, fetch_timeout: float | None = None) -> T:
        """As `load_from_url`; files are read and decoded in other threads."""
        if url_sources.scheme_of(url) in ("http", "https"):
            return await self._load_remote(url, media_io, self._patience(fetch_timeout))
        return await network.in_worker(self._load_local, url, media_io)

    async def _load_remote(self, url: str, media_io: MediaIO[T], patience: float) -> T:
        """Of the cache where there is one and it has the URL, else fetched; kept once it is known to be readable."""
        network.parse(url, self.policy)  # what is forbidden is not looked for
        found = None if self.kept is None else await network.in_worker(self.kept.get, url, self.policy)
        data = found or await network.fetch(url, self.policy, patience)
        made = await network.in_worker(media_io.load_bytes, data)
        if self.kept is not None and found is None:
            await network.in_worker(self.kept.put, url, self.policy, data)
        return made

    def _load_local(self, url: str, media_io: MediaIO[T]) -> T:
        if url_sources.scheme_of(url) == "data":
            return media_io.load_base64(*url_sources.split_data_url(url))
        return media_io.load_bytes(url_sources.read_file_url(url, self.allowed, self.limits))

    def _patience(self, fetch_timeout: float | None) -> float:
        return self.timeouts["audio"] if fetch_timeout is None else fetch_timeout

    # --- any modality, for callers that have its name

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

    # --- one modality each

    def fetch_image(self, image_url: str, *, image_mode: str = "RGB") -> Image.Image:
        """The image at a URL."""
        reader = self.images if image_mode == "RGB" else self._image_io(image_mode)
        return self.load_from_url(image_url, reader, fetch_timeout=self.timeouts["image"]).media

    async def fetch_image_async(self, image_url: str, *, image_mode: str = "RGB") -> Image.Image:
        """The image at a URL."""
        reader = self.images if image_mode == "RGB" else self._image_io(image_mode)
        return (await self.load_from_url_async(image_url, reader, fetch_timeout=self.timeouts["image"])).media

    def fetch_audio(self, audio_url: str) -> tuple[np.ndarray, float]:
        """(samples, sampling rate) of the sound file at a URL, or of the sound track of the video there."""
        return self.load_from_url(audio_url, self.sounds, fetch_timeout=self.timeouts["audio"])

    async def fetch_audio_async(self, audio_url: str) -> tuple[np.ndarray, float]:
        """(samples, sampling rate) of the sound file at a URL, or of the sound track of the video there."""
        return await self.load_from_url_async(audio_url, self.sounds, fetch_timeout=self.timeouts["audio"])

    def fetch_video(self, video_url: str, *, image_mode: str = "RGB") -> Frames:
        """(frames, metadata) of the video at a URL."""
        reader = self.videos if image_mode == "RGB" else self._video_io(image_mode)
        return self.load_from_url(video_url, reader, fetch_timeout=self.timeouts["video"])

    async def fetch_video_async(self, video_url: str, *, image_mode: str = "RGB") -> Frames:
        """(frames, metadata) of the video at a URL."""
        reader = self.videos if image_mode == "RGB" else self._video_io(image_mode)
        return await self.load_from_url_async(video_url, reader, fetch_timeout=self.timeouts["video"])

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
    """Connectors by name; MMJAX_MEDIA_CONNECTOR says which one serves."""

    def __init__(self) -> None:
        self._known: dict[str, Callable[..., MediaConnector]] = {}

    def register(self, name: str) -> Callable[[Callable[..., MediaConnector]], Callable[..., MediaConnector]]:
        """Decorator that makes a connector known by a name."""

        def keep(made: Callable[..., MediaConnector]) -> Callable[..., MediaConnector]:
            self._known[name] = made
            return made

        return keep

    def load(self, name: str | None = None, *args: Any, **kwargs: Any) -> MediaConnector:
        """A connector of that name, or of the one in the environment. ValueError for an unknown one."""
        name = name or env("MEDIA_CONNECTOR", "http")
        if name not in self._known:
            raise RequestError(f"Extension class {name} not found; known are {sorted(self._known)}.", "unknown_name")
        return self._known[name](*args, **kwargs)


MEDIA_CONNECTOR_REGISTRY = ConnectorRegistry()
MEDIA_CONNECTOR_REGISTRY.register("http")(MediaConnector)
