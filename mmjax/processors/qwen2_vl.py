"""Qwen2-VL: images and videos of native size as merged patches; rotary positions on three axes."""

from collections.abc import Mapping

from mmjax.processors.qwen_vl import PixelBounds, QwenVLProcessor


class Processor(QwenVLProcessor):
    """See `mmjax.processors.base.Processor`."""

    default_bounds: Mapping[str, PixelBounds] = {
        "image": (56 * 56, 28 * 28 * 1280),
        "video": (128 * 28 * 28, 768 * 28 * 28),
    }
