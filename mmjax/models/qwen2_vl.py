"""Qwen2-VL: images of any size as packed patches, two-axis rope in the tower and three-axis rope in the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.hf_config import image_options
from mmjax.models import qwen_vl
from mmjax.nn.text_config import decoder_config
from mmjax.nn.vision.qwen_vl import QwenVisionConfig


class Config(qwen_vl.Config):
    """See `qwen_vl.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json (flat as published, or with a text_config) and preprocessor_config.json."""
        preprocessor = image_options(files)
        vision = QwenVisionConfig.qwen2(config["vision_config"], preprocessor)
        return cls(
            text=decoder_config(config.get("text_config", config), "qwen2_vl", tied=tied),
            vision=vision,
            max_item_embeds=qwen_vl.max_pixels(preprocessor) // (vision.patch_size * vision.merge_size) ** 2,
        )


class Model(qwen_vl.Model):
    """See `mmjax.models.base.Model`."""
