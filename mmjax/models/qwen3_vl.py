"""Qwen3-VL, dense or with experts: the first decoder layers add embeddings of inner vision layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.hf_config import image_options, video_options
from mmjax.models import qwen_vl
from mmjax.nn.text_config import decoder_config
from mmjax.nn.vision.qwen_vl import QwenVisionConfig

MAX_PIXELS = 4096 * 4096  # of an image, where the options do not say


class Config(qwen_vl.Config):
    """See `qwen_vl.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and the preprocessor files; the maximum area of a video is that of all its frames."""
        preprocessor, video = image_options(files), video_options(files)
        vision = QwenVisionConfig.qwen3(config["vision_config"], preprocessor)
        embed_area = (vision.patch_size * vision.merge_size) ** 2
        image_area, video_area = (qwen_vl.max_pixels(each, MAX_PIXELS) for each in (preprocessor, video))
        max_area = max(image_area, video_area // vision.temporal_patch_size)
        return cls(
            text=decoder_config(config["text_config"], "qwen3_vl", tied=tied),
            vision=vision,
            max_item_embeds=max_area // embed_area,
        )


class Model(qwen_vl.Model):
    """See `mmjax.models.base.Model`."""
