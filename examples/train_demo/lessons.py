"""What the trainer asks about pictures: several things about each, and some of it more often than the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.demo.ask import PICTURE, TRIES, Asked
from mmjax.demo.scenes import Scene

# how often single pictures are asked for what: sides are learnt last, and few pictures allow the question
LEARNT = ("color", "color", "shape", "count", "count", "exists", *("where",) * 5, "describe", "describe")


def about_picture(rng: np.random.Generator, scenes: Sequence[Scene], turns: int) -> list[Asked]:
    """`turns` different questions about one picture, or about two. Fewer where the picture gives none."""
    out: list[Asked] = []
    for _ in range(turns * TRIES):
        if len(out) == turns:
            break
        skill = "compare" if len(scenes) > 1 else LEARNT[int(rng.integers(len(LEARNT)))]
        made = PICTURE[skill](rng, scenes)
        if made is not None and all(made[0] != asked.question for asked in out):
            out.append(Asked(skill, *made))
    return out


def loosely(rng: np.random.Generator, question: str) -> str:
    """The question as somebody might type it in haste."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question
