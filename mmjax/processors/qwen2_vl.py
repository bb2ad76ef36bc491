"""Qwen2-VL: images and videos of native size as rows of merged patches; three rows of rotary positions."""

from collections.abc import Mapping

from mmjax.processors.patches import Bounds, PatchProcessor


class Processor(PatchProcessor):
    """See `mmjax.processors.base.Processor`."""

    areas: Mapping[str, Bounds] = {"image": (56 * 56, 28 * 28 * 1280), "video": (128 * 28 * 28, 768 * 28 * 28)}
