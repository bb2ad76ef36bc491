"""Qwen2.5-VL: patches window by window, and a first rotary axis that follows time."""

from collections.abc import Mapping

from mmjax.processors.qwen_vl import PixelBounds, WindowedQwenVLProcessor


class Processor(WindowedQwenVLProcessor):
    """See `mmjax.processors.base.Processor`."""

    default_bounds: Mapping[str, PixelBounds] = {
        "image": (56 * 56, 28 * 28 * 1280),
        "video": (128 * 28 * 28, 768 * 28 * 28),
    }
