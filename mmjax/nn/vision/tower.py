"""The image tower of LLaVA and LLaVA-OneVision: CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.nn.vision.clip import ClipConfig, ClipVisionEncoder
from mmjax.nn.vision.siglip import SiglipConfig, SiglipVisionEncoder

TowerConfig = ClipConfig | SiglipConfig
Tower = ClipVisionEncoder | SiglipVisionEncoder

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"


def tower_config(config: Mapping[str, Any], model_type: str, layer: Any) -> TowerConfig:
    """From config.json: its vision_config, and the hidden states that vision_feature_layer names.

    model_type: of a vision_config that names none. layer: vision_feature_layer where config.json has none. Raises
    ValueError for what is not supported.
    """
    vision, layer = config["vision_config"], config.get("vision_feature_layer", layer)
    name = vision.get("model_type", model_type)
    if name == CLIP:
        return ClipConfig.from_hf(vision, layer)
    if name == SIGLIP:
        return SiglipConfig.from_hf(vision, layer, last_norm=False)
    raise ValueError(f"vision_config: model_type {name!r} is not supported; known: {CLIP}, {SIGLIP}")


def drops_first(config: Mapping[str, Any], strategy: str) -> bool:
    """Whether vision_feature_select_strategy leaves out the first position of an image: CLIP's class token. strategy:
    the default. Raises ValueError for an unknown one."""
    strategy = config.get("vision_feature_select_strategy") or strategy
    if strategy not in ("default", "full"):
        raise ValueError(
            f"config.json: vision_feature_select_strategy {strategy!r} is not supported; known: default, full"
        )
    return strategy == "default"


def make_tower(c: TowerConfig) -> Tower:
    """The tower of a configuration."""
    return ClipVisionEncoder(c) if isinstance(c, ClipConfig) else SiglipVisionEncoder(c)
