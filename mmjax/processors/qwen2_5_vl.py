"""Qwen2.5-VL: patches window by window, and a first rotary axis that counts time."""

from collections.abc import Mapping

from mmjax.processors.patches import Bounds
from mmjax.processors.windows import WindowProcessor


class Processor(WindowProcessor):
    """See `mmjax.processors.base.Processor`."""

    areas: Mapping[str, Bounds] = {"image": (56 * 56, 28 * 28 * 1280), "video": (128 * 28 * 28, 768 * 28 * 28)}
