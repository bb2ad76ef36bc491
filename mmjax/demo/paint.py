"""Paints scenes. The same code runs with NumPy and with torch: `xp` is the array module.

A shape is a signed distance function, negative inside, in units of its radius. The scene says how soft edges are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmjax.demo.scenes import MAX_THINGS, SHAPES, Scene

# per thing: x, y, 1/size, cos, sin, stretch, red, green, blue, size, then one-hot shape; absent things have size 0
FIELDS = 10 + len(SHAPES)
GROUND_FIELDS = 9  # two colors, cos and sin of the slope, softness
STAR_INNER_RADIUS = 0.42


def table(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """A scene as arrays: things float32 [MAX_THINGS, FIELDS] and ground float32 [GROUND_FIELDS]."""
    things = np.zeros((MAX_THINGS, FIELDS), np.float32)
    for row, thing in zip(things, scene.things, strict=False):
        stretch = math.sqrt(thing.stretch)
        row[:10] = (
            *(thing.x, thing.y, 1 / thing.size, math.cos(thing.turn), math.sin(thing.turn), stretch),
            *thing.rgb,
            thing.size,
        )
        row[10 + SHAPES.index(thing.shape)] = 1
    ground = np.array(
        [*scene.ground[0], *scene.ground[1], math.cos(scene.slope), math.sin(scene.slope), scene.soft], np.float32
    )
    return things, ground


def _distances(xp: Any, u: Any, v: Any) -> list[Any]:
    """The signed distance of (u, v) to each of SHAPES; v points down."""
    r = xp.sqrt(u * u + v * v + 1e-9)
    a, b = abs(u), abs(v)
    angle = xp.arctan2(u, -v)
    fold = abs(xp.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5)
    edge = (STAR_INNER_RADIUS * math.cos(math.pi / 5) - 1, STAR_INNER_RADIUS * math.sin(math.pi / 5))
    length = math.hypot(*edge)
    star = ((r * xp.cos(fold) - 1) * edge[1] - r * xp.sin(fold) * edge[0]) / length
    return [
        r - 0.95,
        xp.maximum(a, b) - 0.82,
        xp.maximum(v * 1.0 - 0.5, a * 0.8660254 - v * 0.5 - 0.5),
        star,
        xp.minimum(xp.maximum(a - 0.92, b - 0.3), xp.maximum(a - 0.3, b - 0.92)),
        abs(r - 0.72) - 0.2,
    ]


def paint(xp: Any, things: Any, ground: Any, x: Any, y: Any) -> Any:
    """Colors [N, H, W, 3] in 0..1, without noise.

    things: [N, MAX_THINGS, FIELDS]. ground: [N, GROUND_FIELDS]. x [W], y [H]: pixel centers in units of the shorter
    side.
    """
    across = x[None, None, :]
    down = y[None, :, None]
    cos, sin, soft = (ground[:, i, None, None] for i in (6, 7, 8))
    far = abs(cos) * (x[-1] + x[0]) + abs(sin) * (y[-1] + y[0])
    share = ((across - x[-1] / 2) * cos + (down - y[-1] / 2) * sin) / far + 0.5
    share = xp.clip(share, 0, 1)[..., None]
    out = ground[:, None, None, 0:3] * (1 - share) + ground[:, None, None, 3:6] * share
    for index in range(MAX_THINGS):
        thing = things[:, index, :, None, None]
        dx, dy = across - thing[:, 0], down - thing[:, 1]
        u = (dx * thing[:, 3] + dy * thing[:, 4]) * thing[:, 2] / (thing[:, 5] + 1e-6)
        v = (dy * thing[:, 3] - dx * thing[:, 4]) * thing[:, 2] * thing[:, 5]
        distance = 0.0
        for shape, value in enumerate(_distances(xp, u, v)):
            distance = distance + value * thing[:, 10 + shape]
        inside = xp.clip(0.5 - distance * thing[:, 9] / soft, 0, 1) * (thing[:, 9] > 0)
        cover = inside[..., None]
        out = out * (1 - cover) + things[:, index, None, None, 6:9] * cover
    return out


def pictures(scenes: Sequence[Scene], side: int, rng: np.random.Generator) -> list[Image.Image]:
    """RGB pictures of scenes of equal width and height, `side` pixels on the shorter edge."""
    width, height = (round(side * edge) for edge in (scenes[0].width, scenes[0].height))
    things, grounds = (np.stack(rows) for rows in zip(*map(table, scenes), strict=True))
    x, y = ((np.arange(n, dtype=np.float32) + 0.5) / side for n in (width, height))
    colors = paint(np, things, grounds, x, y)
    colors += rng.standard_normal(colors.shape, np.float32) * np.float32(scenes[0].noise)
    pixels = (np.clip(colors, 0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(frame) for frame in pixels]
