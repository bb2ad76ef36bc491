"""What the trainer asks about pictures: several things about each, some of it more often than the rest.

Which side of one thing another is on was not learnt from questions about it alone: that takes finding both things and
comparing their places, and half of that earns nothing. So training also asks for the halves: where one thing is, which
thing is furthest to a side, and all of them in order from a side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mmjax.demo.ask import PICTURE, TRIES, QuestionAnswer, listing, one, only
from mmjax.demo.scenes import Scene, Thing

# how often single pictures are asked for what: few pictures allow the question for sides
LEARNT = (
    *("color", "color", "shape", "count", "count", "exists", "describe", "describe"),
    *("where",) * 4, *("place",) * 2, *("end",) * 2, "row",
)  # fmt: skip
CLEAR = 0.05  # shorter sides of the picture: what is nearer than that is neither left nor right, above nor below
SIDES = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis, sign


def about_picture(rng: np.random.Generator, scenes: Sequence[Scene], turns: int) -> list[QuestionAnswer]:
    """`turns` different questions about one picture, or about two. Fewer where the picture gives none."""
    out: list[QuestionAnswer] = []
    for _ in range(turns * TRIES):
        if len(out) == turns:
            break
        skill = "compare" if len(scenes) > 1 else LEARNT[int(rng.integers(len(LEARNT)))]
        made = STEPS[skill](rng, scenes[0]) if skill in STEPS else PICTURE[skill](rng, scenes)
        if made is not None and all(made[0] != asked.question for asked in out):
            out.append(QuestionAnswer(skill, *made))
    return out


def loosely(rng: np.random.Generator, question: str) -> str:
    """The question as somebody might type it in haste."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question


def _place(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Where is the star? The star is left and below: of the middle."""
    thing = one(rng, scene.things)
    across, down = thing.x - scene.width / 2, thing.y - scene.height / 2
    whole = rng.random() < 0.5 or not only(scene.things, shape=thing.shape)
    if not only(scene.things, name=thing.name) or min(abs(across), abs(down)) < CLEAR:
        return None
    name = thing.name if whole else thing.shape
    side = f"{'left' if across < 0 else 'right'} and {'above' if down < 0 else 'below'}"
    return f"Where is the {name}?", f"The {name} is {side}."


def _sorted(rng: np.random.Generator, scene: Scene) -> tuple[str, list[Thing]] | None:
    """A side, and the things in order from there; None when two are as near to it."""
    side = list(SIDES)[int(rng.integers(len(SIDES)))]
    axis, sign = SIDES[side]
    order = sorted(scene.things, key=lambda thing: sign * (thing.x, thing.y)[axis])
    at = [(thing.x, thing.y)[axis] for thing in order]
    if len(order) < 2 or any(abs(a - b) < CLEAR for a, b in itertools.pairwise(at)):
        return None
    return side, order


def _end(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Which shape is left? The red star is left: of all others."""
    found = _sorted(rng, scene)
    return found and (f"Which shape is {found[0]}?", f"The {found[1][0].name} is {found[0]}.")


def _row(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Describe the picture from below. A red star, a blue ring and a red cross."""
    found = _sorted(rng, scene)
    return found and (f"Describe the picture from {found[0]}.", listing(scene, found[1]))


STEPS = {"place": _place, "end": _end, "row": _row}
