"""Decoders of media files and the connector that fetches them, under the names that scripts for vLLM import."""

from mmjax.multimodal.media.audio import AudioEmbeddingMediaIO, AudioMediaIO
from mmjax.multimodal.media.base import MediaIO, MediaWithBytes
from mmjax.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from mmjax.multimodal.media.image import ImageEmbeddingMediaIO, ImageMediaIO
from mmjax.multimodal.media.video import VideoMediaIO

__all__ = [
    "MEDIA_CONNECTOR_REGISTRY",
    "AudioEmbeddingMediaIO",
    "AudioMediaIO",
    "ImageEmbeddingMediaIO",
    "ImageMediaIO",
    "MediaConnector",
    "MediaIO",
    "MediaWithBytes",
    "VideoMediaIO",
]
