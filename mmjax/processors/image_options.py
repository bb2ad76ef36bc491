"""What the options of a published image processor do: resize, pad, crop. What a family cannot do is refused."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.hf_config import HfConfig
from mmjax.processors.resize import BICUBIC, image_size, resize
from mmjax.types import RequestError

MAX_ASPECT = 1000  # the resized long edge is aspect * shortest_edge: bounds what one odd image can allocate
# Options about pixel values, which are computed on the device with one set of values for images and videos.
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
Grid = tuple[int, int]


def refused(options: HfConfig, name: str, rule: str) -> ValueError:
    """The error of an option that a family cannot honor."""
    return ValueError(f"{options.origin()}: {name} {options.get(name)!r} is not supported here: {rule}")


def allow_only(options: HfConfig, rule: str, **allowed: Any) -> None:
    """ValueError for an option with another value than the one allowed. Null and missing ones are allowed."""
    for name, value in allowed.items():
        if options.get(name) is not None and options[name] != value:
            raise refused(options, name, rule)


def flag(options: HfConfig, name: str, default: bool) -> bool:
    """A boolean option; null is the default."""
    value = options.get(name)
    return default if value is None else bool(value)


def resampling(options: HfConfig, default: Image.Resampling = BICUBIC) -> Image.Resampling:
    """The filter of `resample`: a number of PIL's, or a name. ValueError for any other."""
    value = options.get("resample")
    if value is None:
        return default
    try:
        return Image.Resampling[value.upper()] if isinstance(value, str) else Image.Resampling(value)
    except (KeyError, ValueError):
        known = ", ".join(f"{each.value} ({each.name.lower()})" for each in Image.Resampling)
        raise refused(options, "resample", f"it is one of {known}") from None


def same_normalization(images: HfConfig, videos: HfConfig) -> None:
    """ValueError where videos are to be normalized otherwise than images."""
    for name in NORMALIZATION:
        image, video = images.get(name), videos.get(name)
        if image is not None and video is not None and not np.allclose(image, video):  # a number is one per channel
            raise refused(videos, name, f"videos are normalized as images are, whose {name} is {image!r}")


def tower_sizes(options: HfConfig, **sizes: int) -> None:
    """ValueError where sizes of the options are not those of the vision tower in config.json."""
    for name, size in sizes.items():
        if options.get(name) is not None and options[name] != size:
            raise refused(options, name, f"the vision tower of config.json has {size}")


def edges(options: HfConfig, name: str, *, square: bool) -> dict[str, int]:
    """A size in any spelling as {"height", "width"}, {"shortest_edge"}, with a "longest_edge" or not, or {"max_height",
    "max_width"}. square: whether a number is both edges. Empty where there is none; ValueError for any other."""
    value = options.get(name)
    if value is None:
        return {}
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    found = {key: edge for key, edge in value.items() if edge is not None} if isinstance(value, Mapping) else {}
    known = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})
    if set(found) not in known or not all(type(edge) is int and edge > 0 for edge in found.values()):
        raise refused(options, name, "it is a number, height and width, shortest_edge, or max_height and max_width")
    return found


def resized(size: Mapping[str, int], height: int, width: int) -> Grid:
    """(height, width) of an image of this size after it is resized."""
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    edge, (short, long) = size["shortest_edge"], sorted((height, width))
    exact: float = edge
    if long / short * edge > size.get("longest_edge", np.inf):
        exact = size["longest_edge"] * short / long
        edge = max(1, round(exact))
    elif long > MAX_ASPECT * short:
        raise RequestError(
            f"absolute aspect ratio must be at most {MAX_ASPECT}, got {long / short:g} ({width}x{height}). Crop or "
            "pad the image.",
            "aspect_ratio",
        )
    other = long if short == edge else int(exact * long / short)
    return (other, edge) if width <= height else (edge, other)


@dataclasses.dataclass(frozen=True)
class SquareImage:
    """Makes square images for a tower of one size. size: see `edges`; empty for images that are not resized. pad_color:
    of the square that an image is padded to first, or None. crop: whether the center is cropped."""

    edge: int
    size: Mapping[str, int]
    resample: Image.Resampling
    pad_color: tuple[int, ...] | None
    crop: bool

    @classmethod
    def from_options(cls, options: HfConfig, edge: int) -> "SquareImage":
        """By CLIP's, LLaVA's or SigLIP's image processor. ValueError for options that never yield the tower's size."""
        of = str(options.get("image_processor_type") or "CLIP")
        square = flag(options, "default_to_square", False)
        size = edges(options, "size", square=square) or {"shortest_edge": edge}
        crop = flag(options, "do_center_crop", not of.startswith("Siglip"))
        crop_size = edges(options, "crop_size", square=True) or {"height": edge, "width": edge}
        if crop and (crop_size.get("height"), crop_size.get("width")) != (edge, edge):
            raise ValueError(
                f"preprocessor_config.json crops to {crop_size.get('width')}x{crop_size.get('height')}, but the vision "
                f"tower of config.json takes {edge}x{edge}: the two files belong to different checkpoints"
            )
        do_resize, pads = flag(options, "do_resize", True), flag(options, "do_pad", False)
        if do_resize and not crop and "height" in size and set(size.values()) != {edge}:
            raise refused(options, "size", f"the vision tower of config.json takes {edge}x{edge}")
        if pads and options.get("pad_size"):
            raise refused(options, "pad_size", "an image is padded to a square, or not at all")
        color = tuple(int(mean * 255) for mean in options["image_mean"]) if pads and of.startswith("Llava") else None
        return cls(edge, size if do_resize else {}, resampling(options), color, crop)

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """uint8 [edge, edge, 3] of an RGB image or an array [height, width, 3]. RequestError for one of another size,
        where images are neither resized nor cropped to it."""
        if self.pad_color is not None:
            image = padded_to_square(image, self.pad_color)
        if self.size:
            image = resize(image, *resized(self.size, *image_size(image)), self.resample)
        if self.crop:
            return cropped(np.asarray(image), self.edge)
        height, width = image_size(image)
        if (height, width) != (self.edge, self.edge):
            raise RequestError(
                f"an image of {width}x{height} does not fit: the model's image processor does not resize or crop it, "
                f"and its vision tower takes {self.edge}x{self.edge}.",
                "bad_image_size",
            )
        return np.asarray(image)


def padded_to_square(image: Image.Image | np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    """The image in the middle of a square of its longer edge."""
    height, width = image_size(image)
    edge = max(height, width)
    out = np.empty((edge, edge, 3), np.uint8)
    out[:] = color
    top, left = (edge - height) // 2, (edge - width) // 2
    out[top : top + height, left : left + width] = np.asarray(image)
    return out


def cropped(image: np.ndarray, size: int) -> np.ndarray:
    """The center of uint8 [height, width, 3]; an edge that is too short is padded with black."""
    missing = [max(0, size - edge) for edge in image.shape[:2]]
    if any(missing):
        image = np.pad(image, [*((-(-gap // 2), gap // 2) for gap in missing), (0, 0)])
    top, left = ((edge - size) // 2 for edge in image.shape[:2])
    return image[top : top + size, left : left + size]
