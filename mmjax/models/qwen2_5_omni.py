"""Qwen2.5-Omni's thinker: Qwen2.5-VL with ears. It answers in text; the talker's weights are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models import omni, vision_language
from mmjax.nn.audio_chunks import OmniAudioConfig
from mmjax.nn.decoder import DecoderConfig
from mmjax.nn.patches import QwenVisionConfig


class Config(omni.Config):
    """See `omni.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json (the whole model's, or the thinker's alone) and preprocessor_config.json."""
        thinker, prepare = config.get("thinker_config", config), files["preprocessor_config.json"]
        vision = QwenVisionConfig.qwen2_5(thinker["vision_config"], prepare)
        return cls(
            text=DecoderConfig.from_hf(thinker["text_config"], bias=True, tie_embeddings=tied),
            vision=vision,
            max_item_embeds=vision_language.max_pixels(prepare) // (vision.patch_size * vision.merge_size) ** 2,
            audio=OmniAudioConfig.from_hf(thinker["audio_config"]),
            max_mel_frames=omni.max_mel_frames(files),
        )


class Model(omni.Model):
    """See `mmjax.models.family.Model`."""
