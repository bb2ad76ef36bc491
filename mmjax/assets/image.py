"""Sample images."""

import dataclasses
import functools
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmjax.types import RequestError


@dataclasses.dataclass(frozen=True)
class ImageAsset:
    """An image by name: `stop_sign` or `cherry_blossom`. ValueError for other names."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in PICTURES:
            raise RequestError(f"Unknown image asset {self.name!r}; there are {sorted(PICTURES)}.", "unknown_name")

    @property
    def pil_image(self) -> Image.Image:
        """The image, in RGB."""
        return _draw(self.name).copy()

    def read_bytes(self, ext: str = "jpg") -> bytes:
        """The image as a file."""
        buffer = io.BytesIO()
        self.pil_image.save(buffer, {"jpg": "JPEG"}.get(ext, ext.upper()))
        return buffer.getvalue()


def _stop_sign() -> Image.Image:
    """A red octagon with a white rim and white letters, in front of grass and sky."""
    picture = Image.new("RGB", (1300, 876), (150, 190, 230))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 620, 1300, 876), fill=(90, 140, 70))
    draw.rectangle((640, 560, 664, 876), fill=(120, 120, 125))
    for radius, color in ((280, (250, 250, 250)), (262, (190, 20, 30))):
        corners = [(k + 0.5) * math.pi / 4 for k in range(8)]
        draw.polygon([(652 + radius * math.cos(a), 330 + radius * math.sin(a)) for a in corners], fill=color)
    draw.text((652, 330), "STOP", fill=(250, 250, 250), font=ImageFont.load_default(190), anchor="mm")
    return picture


def _cherry_blossom() -> Image.Image:
    """Dark branches with pink blossoms in front of a tower and a blue sky."""
    picture = Image.new("RGB", (1200, 800), (110, 170, 235))
    draw = ImageDraw.Draw(picture)
    draw.polygon([(560, 800), (590, 200), (600, 60), (610, 200), (640, 800)], fill=(225, 230, 235))
    draw.ellipse((570, 260, 630, 320), fill=(200, 205, 215))
    rng = np.random.default_rng(0)
    for start in ((0, 120), (0, 640), (1200, 240), (1200, 720)):
        x, y = map(float, start)
        away = 1 if start[0] == 0 else -1
        for width in range(24, 4, -2):
            nx, ny = x + away * rng.uniform(35, 70), y + rng.uniform(-45, 45)
            draw.line((x, y, nx, ny), fill=(70, 45, 40), width=width)
            for dx, dy, size in zip(*rng.normal(0, 40, (2, 18)), rng.uniform(8, 20, 18), strict=True):
                pink = (245, int(rng.integers(160, 215)), int(rng.integers(190, 225)))
                draw.ellipse((nx + dx - size, ny + dy - size, nx + dx + size, ny + dy + size), fill=pink)
            x, y = nx, ny
    return picture


PICTURES: dict[str, Callable[[], Image.Image]] = {"stop_sign": _stop_sign, "cherry_blossom": _cherry_blossom}


@functools.cache
def _draw(name: str) -> Image.Image:
    return PICTURES[name]()
