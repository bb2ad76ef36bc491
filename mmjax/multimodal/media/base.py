"""The base class of all decoders of media files."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from mmjax.multimodal import url_sources
from mmjax.multimodal.image import MediaWithBytes
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError

__all__ = ["MediaIO", "MediaWithBytes"]

T = TypeVar("T")


class MediaIO(abc.ABC, Generic[T]):
    """Decodes one modality from bytes, base64 text and files. RequestError for data that cannot be decoded."""

    OPTIONS: ClassVar[tuple[str, ...]] = ()  # keys that media_io_kwargs may have for the modality
    limits: MediaLimits

    @classmethod
    def merge_kwargs(
        cls, default_kwargs: Mapping[str, Any] | None, runtime_kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The operator's options, overridden by those of a request."""
        return {**(default_kwargs or {}), **(runtime_kwargs or {})}

    @abc.abstractmethod
    def load_bytes(self, data: bytes) -> T:
        """Decode a whole file."""

    def load_base64(self, media_type: str, data: str) -> T:
        """Decode a file in base64. media_type: of the data: URL that held it."""
        return self.load_bytes(url_sources.from_base64(data, self.limits))

    def load_file(self, filepath: str | Path) -> T:
        """Decode a local file. Paths from requests must go through `MediaConnector`, which restricts them."""
        limit = self.limits.source_bytes
        try:
            with open(filepath, "rb") as file:
                data = file.read(limit + 1 if limit else -1)
        except (OSError, ValueError) as error:
            raise RequestError(f"The file {filepath} cannot be read.", "bad_path") from error
        if limit and len(data) > limit:
            raise RequestError(
                f"The file {filepath} is larger than the {limit} bytes that are read. Use a smaller one, or raise "
                "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB.",
                "media_too_large",
            )
        return self.load_bytes(data)
