"""Qwen3-Omni's thinker: Qwen3-VL with experts and an audio tower. Text only: the talker is not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.hf_config import image_options
from mmjax.models import qwen_omni, qwen_vl
from mmjax.nn.audio.qwen_omni import OmniAudioConfig
from mmjax.nn.text_config import decoder_config
from mmjax.nn.vision.qwen_vl import QwenVisionConfig


class Config(qwen_omni.Config):
    """See `qwen_omni.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json (the whole model's, or the thinker's alone) and preprocessor_config.json."""
        thinker, preprocessor = config.get("thinker_config", config), image_options(files)
        vision = QwenVisionConfig.qwen3(thinker["vision_config"], preprocessor)
        return cls(
            text=decoder_config(thinker["text_config"], "qwen3_omni_moe", tied=tied),
            vision=vision,
            max_item_embeds=qwen_vl.max_pixels(preprocessor) // (vision.patch_size * vision.merge_size) ** 2,
            audio=OmniAudioConfig.from_hf(thinker["audio_config"]),
            max_mel_frames=qwen_omni.max_mel_frames(files),
        )


class Model(qwen_omni.Model):
    """See `mmjax.models.base.Model`."""
