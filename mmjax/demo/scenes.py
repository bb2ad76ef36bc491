"""Random scenes of pictures and videos: colored shapes in front of a ground."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# hue in degrees, saturation, value: lowest and highest
COLORS = {
    "red": ((-8, 8), (0.78, 1), (0.72, 1)),
    "orange": ((24, 39), (0.9, 1), (0.93, 1)),
    "yellow": ((52, 61), (0.8, 1), (0.92, 1)),
    "green": ((95, 150), (0.65, 1), (0.42, 1)),
    "blue": ((208, 244), (0.72, 1), (0.65, 1)),
    "purple": ((272, 302), (0.6, 1), (0.45, 0.85)),
    "black": ((0, 360), (0, 0.3), (0, 0.1)),
    "white": ((0, 360), (0, 0.05), (0.95, 1)),
}
GROUNDS = (  # hue, saturation, value
    ((0, 360), (0, 0.04), (0.93, 1)),
    ((0, 360), (0, 0.05), (0.7, 0.93)),
    ((0, 360), (0.05, 0.25), (0.8, 1)),
    ((0, 360), (0, 0.1), (0.35, 0.6)),
    ((0, 360), (0, 0.4), (0.1, 0.3)),
    ((0, 360), (0, 0.1), (0, 0.08)),
)
MAX_THINGS = 4
CONTRAST = 0.42  # least distance between the color of a thing and those of the ground, in the unit cube
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Rgb = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Thing:
    """A colored shape. x, y: its center, and size: its radius, in units of the picture's shorter side.

    turn: radians. stretch: width divided by height.
    """

    shape: str
    color: str
    rgb: Rgb
    x: float
    y: float
    size: float
    turn: float
    stretch: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things in front of a ground that fades from one color to another along `slope` (radians).

    width, height: in units of the shorter side. soft: width of the things' edges, in the same unit. noise: standard
    deviation.
    """

    things: tuple[Thing, ...]
    width: float
    height: float
    ground: tuple[Rgb, Rgb]
    slope: float
    soft: float
    noise: float


@dataclasses.dataclass(frozen=True)
class MovingScene:
    """A scene whose first thing moves. direction: a key of DIRECTIONS, or "" when it stays. paths: its displacement in
    each frame."""

    scene: Scene
    direction: str
    paths: tuple[tuple[float, float], ...]

    def frames(self) -> list[Scene]:
        first, *rest = self.scene.things
        moved = [dataclasses.replace(first, x=first.x + dx, y=first.y + dy) for dx, dy in self.paths]
        return [dataclasses.replace(self.scene, things=(thing, *rest)) for thing in moved]


def _hsv(hue: float, saturation: float, value: float) -> Rgb:
    def channel(n: int) -> float:
        k = (n + hue / 60) % 6
        return value - value * saturation * max(0.0, min(k, 4 - k, 1.0))

    return channel(5), channel(3), channel(1)


def _pick(rng: np.random.Generator, bounds: Sequence[tuple[float, float]]) -> Rgb:
    h, s, v = (low + (high - low) * rng.random() for low, high in bounds)
    return _hsv(h, s, v)


def _distance(a: Rgb, b: Rgb) -> float:
    return math.dist(a, b)


def draw_scene(
    rng: np.random.Generator, width: float = 1.0, height: float = 1.0, things: int | None = None, largest: float = 0.36
) -> Scene:
    """A scene of one to four things that do not touch, each in a color that stands out from the ground."""
    count = int(rng.integers(1, MAX_THINGS + 1)) if things is None else things
    ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
    start = _pick(rng, ground)
    end = start
    if rng.random() < 0.4:
        other = _pick(rng, ground)
        share = rng.random() * 0.7
        end = tuple(a + (b - a) * share for a, b in zip(start, other, strict=True))  # type: ignore[assignment]
    placed: list[Thing] = []
    while len(placed) < count:
        placed = _place(rng, count, width, height, (start, end), largest)
    return Scene(
        tuple(placed),
        width,
        height,
        (start, end),
        slope=rng.random() * 2 * math.pi,
        soft=0.006 + 0.02 * rng.random() ** 2,
        noise=0.0 if rng.random() < 0.4 else 0.06 * rng.random(),
    )


def _place(
    rng: np.random.Generator, count: int, width: float, height: float, ground: tuple[Rgb, Rgb], largest: float
) -> list[Thing]:
    """Up to `count` things that do not touch; fewer when there was no room left."""
    highest = min(largest, (0.36, 0.26, 0.22, 0.2)[count - 1])
    out: list[Thing] = []
    for _ in range(60):
        if len(out) == count:
            break
        size = 0.1 + (highest - 0.1) * rng.random()
        reach = size * 1.1
        x, y = (reach + (side - 2 * reach) * rng.random() for side in (width, height))
        if any(math.hypot(x - o.x, y - o.y) < (size + o.size) * 1.12 + 0.02 for o in out):
            continue
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        color, rgb = _color(rng, ground)
        if out and rng.random() < 0.35:
            shape = out[-1].shape
        if out and rng.random() < 0.2:
            color, rgb = out[-1].color, out[-1].rgb
        spread = {"square": 0.25, "cross": 0.3, "triangle": 0.35, "star": math.pi}.get(shape, 0.0)
        turn = (rng.random() * 2 - 1) * spread * (rng.random() < 0.6)
        stretch = math.exp((rng.random() * 2 - 1) * 0.16)
        out.append(Thing(shape, color, rgb, x, y, size, turn, stretch))
    return out


def _color(rng: np.random.Generator, ground: tuple[Rgb, Rgb]) -> tuple[str, Rgb]:
    names = list(COLORS)
    while True:
        name = names[int(rng.integers(len(names)))]
        rgb = _pick(rng, COLORS[name])
        if min(_distance(rgb, side) for side in ground) > CONTRAST:
            return name, rgb


def draw_clip(rng: np.random.Generator, frames: int, width: float = 1.0, height: float = 1.0) -> MovingScene:
    """`frames` frames of a thing that moves in a line, or stays; sometimes with a second thing that stays."""
    scene = draw_scene(rng, width, height, things=1 + int(rng.random() < 0.35), largest=0.2)
    first = scene.things[0]
    direction = ("", *DIRECTIONS)[int(rng.integers(5))] if rng.random() < 0.8 else ""
    if len(scene.things) > 1 and not direction:
        direction = list(DIRECTIONS)[int(rng.integers(4))]
    if not direction:
        return MovingScene(scene, "", ((0.0, 0.0),) * frames)
    dx, dy = DIRECTIONS[direction]
    side = width if dx else height
    reach = first.size * 1.1
    travel = (side - 2 * reach) * (0.35 + 0.65 * rng.random())
    start = reach + (side - 2 * reach - travel) * rng.random()
    if dx + dy < 0:
        start = side - start
    moving = dataclasses.replace(first, x=start if dx else first.x, y=start if dy else first.y)
    if len(scene.things) > 1:  # the second thing must not be in the way
        scene = dataclasses.replace(scene, things=(moving, *_aside(rng, scene, moving, bool(dx))))
    else:
        scene = dataclasses.replace(scene, things=(moving,))
    drift = (rng.random() * 2 - 1) * 0.04
    steps = [i / max(1, frames - 1) for i in range(frames)]
    path = tuple((dx * travel * s + dy * dy * drift * s, dy * travel * s + dx * dx * drift * s) for s in steps)
    return MovingScene(scene, direction, path)


def _aside(rng: np.random.Generator, scene: Scene, moving: Thing, sideways: bool) -> list[Thing]:
    """The second thing, off the path of the first; empty when there is no room."""
    second = scene.things[1]
    path = moving.y if sideways else moving.x
    room = scene.height if sideways else scene.width
    gap = moving.size * 1.15 + second.size * 1.15 + 0.05
    reach = second.size * 1.1
    candidates = [reach + (room - 2 * reach) * rng.random() for _ in range(8)]
    position = next((each for each in candidates if abs(each - path) > gap), None)
    if position is None:
        return []
    return [dataclasses.replace(second, y=position) if sideways else dataclasses.replace(second, x=position)]
