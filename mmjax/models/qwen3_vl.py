"""Qwen3-VL, dense or with experts: the first decoder layers add embeddings of inner vision layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models import qwen_vl
from mmjax.nn.text_config import decoder_config
from mmjax.nn.vision.qwen_vl import QwenVisionConfig


class Config(qwen_vl.Config):
    """See `qwen_vl.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json and the preprocessor files; the maximum area of a video is that of all its frames."""
        preprocessor = files["preprocessor_config.json"]
        video = files.get("video_preprocessor_config.json", preprocessor)
        vision = QwenVisionConfig.qwen3(config["vision_config"], preprocessor)
        embed_area = (vision.patch_size * vision.merge_size) ** 2
        max_area = max(qwen_vl.max_pixels(preprocessor), qwen_vl.max_pixels(video) // vision.temporal_patch_size)
        return cls(
            text=decoder_config(config["text_config"], "qwen3_vl", tied=tied),
            vision=vision,
            max_item_embeds=max_area // embed_area,
        )


class Model(qwen_vl.Model):
    """See `mmjax.models.base.Model`."""
