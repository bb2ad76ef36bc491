"""Every family's items hold the arrays that its encoders declare, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import random_pixels
from input_processors import load_processor
from mmjax.loader.checkpoint import Checkpoint
from mmjax.multimodal.video import Video
from mmjax.processors.base import MediaItem
from prompts import random_chord

TINY = (
    "whisper",
    "llava",
    "llava_onevision",
    "minicpmv",
    "phi3_v",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen2_5_omni",
    "qwen3_omni_moe",
    "qwen2_audio",
    "ultravox",
)
MEDIA: dict[str, list[Any]] = {
    "image": [random_pixels(1, 90, 201), random_pixels(2, 64, 28)],
    "video": [Video(np.stack([random_pixels(s, 70, 64) for s in range(5)]), {"fps": 2.0})],
    "audio": [random_chord(1, 0.4), random_chord(2, 3.3)],
}


def wrong(item: MediaItem, declared: dict[str, Any]) -> list[str]:
    """How an item differs from the declaration."""
    faults = [f"{name} is not declared" for name in item.features.keys() - declared.keys()]
    for name, field in declared.items():
        array, count = item.features[name], item.num_inputs if field.axis == "inputs" else item.num_embeds
        if (array.shape, array.dtype) != ((count, *field.shape), np.dtype(field.dtype)):
            faults.append(f"{name} is {array.dtype}{array.shape}, not {field.dtype}{(count, *field.shape)}")
        if field.is_segment_id and set(np.unique(array)) != set(range(array.max() + 1)):
            faults.append(f"{name} does not count from 0 without gaps")
    return faults


@pytest.mark.parametrize("family", TINY)
def test_items_hold_the_declared_fields(family: str, tiny_dir: Callable[[str], Path]) -> None:
    processor, _ = load_processor(family, tiny_dir(family))
    spec = Checkpoint.open(str(tiny_dir(family))).model_config().spec
    assert {modality for encoder in spec.encoders.values() for modality in encoder.modalities} == set(
        processor.mm_limits
    )
    for modality in processor.mm_limits:
        encoder = spec.encoders[spec.encoder_of(modality)]
        for media in MEDIA[modality]:
            item = processor.process_item(modality, media, {})
            assert wrong(item, {field.name: field for field in encoder.fields}) == []
            assert item.num_inputs > 0 and item.num_embeds <= encoder.num_embeds(item.num_inputs)
