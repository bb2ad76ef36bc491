"""Questions that training never saw, by skill: scenes from seeds of their own, sounds of voices it never heard."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.demo import ask, paint, scenes

FIRST = 4  # first word of every seed here; training's are 1, 2 and 3
SPEECH = Path(__file__).resolve().parent / "speech"
FRAMES = 8  # of a clip
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """Something shown, a question about it, and the right answer.

    kind: image, video or audio; media: pictures, or one clip [frames, height, width, 3], or one (samples, rate).
    """

    asked: ask.Asked
    kind: str
    media: list[Any]

    @property
    def prompt(self) -> dict[str, Any]:
        """As `LLM.generate` takes it: what the chat template makes of a conversation that begins with it."""
        marks = f"<{self.kind}>" * len(self.media)
        return {"prompt": PROMPT.format(marks + self.asked.question), "multi_modal_data": {self.kind: self.media}}


@functools.cache
def recordings() -> tuple[tuple[str, Path], ...]:
    """(what is said, file) of every sound that ships, digits first, in an order that does not change."""
    found = [(file.name.split(".")[0].replace("-", " "), file) for file in sorted(SPEECH.glob("*.ogg"))]
    order = np.random.default_rng([FIRST, 61]).permutation(len(found))
    mixed = [found[int(i)] for i in order]
    return tuple(sorted(mixed, key=lambda pair: pair[0].split()[0] not in ask.DIGITS))


def read(file: Path) -> tuple[np.ndarray, int]:
    """(samples, rate) of a sound file."""
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(file.read_bytes()), dtype="float32")
    return samples, rate


def edges(rng: np.random.Generator) -> tuple[float, float]:
    """Width and height of something to draw, in units of the shorter side: square to twice as long."""
    ratio = math.exp(rng.uniform(-0.7, 0.7))
    return max(1.0, ratio), max(1.0, 1 / ratio)


def about_pictures(rng: np.random.Generator, skill: str) -> Question | None:
    """A question of one skill about a picture, or about two. None where what was drawn gives none."""
    size, side = edges(rng), int(rng.integers(140, 320))
    pair = skill == "compare"
    most = 1 if pair and rng.random() < 0.4 else None
    shown = [scenes.draw_scene(rng, *size, things=most) for _ in range(1 + pair)]
    if pair and rng.random() < 0.3:  # chance alone seldom makes two alike
        first, *rest = shown[1].things
        alike = dataclasses.replace(first, shape=shown[0].things[0].shape)
        shown[1] = dataclasses.replace(shown[1], things=(alike, *rest))
    asked = ask.about_picture(rng, shown, skill)
    return Question(asked, "image", list(paint.pictures(shown, side, rng))) if asked else None


def about_clip(rng: np.random.Generator) -> Question:
    """A question about what moves."""
    clip = scenes.draw_clip(rng, FRAMES, *edges(rng))
    return Question(ask.about_clip(rng, clip), "video", [frames(rng, clip, int(rng.integers(140, 240)))])


def frames(rng: np.random.Generator, clip: scenes.Clip, side: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: a clip, `side` pixels on the shorter edge."""
    return np.stack([np.asarray(picture) for picture in paint.pictures(clip.frames(), side, rng)])


def about_sound(rng: np.random.Generator, said: str, file: Path) -> Question:
    """What is said in a file that ships."""
    return Question(ask.about_speech(rng, said)[0], "audio", [read(file)])


def questions(skill: str, count: int) -> list[Question]:
    """`count` questions of one skill, the same ones every time; of sounds at most as many as ship."""
    number = ask.SKILLS.index(skill)
    if skill in ("digits", "words"):
        fitting = [pair for pair in recordings() if (pair[0].split()[0] in ask.DIGITS) == (skill == "digits")]
        seeds = enumerate(fitting[:count])
        return [about_sound(np.random.default_rng([FIRST, number, i]), *pair) for i, pair in seeds]
    make: Callable[[np.random.Generator], Question | None]
    make = about_clip if skill == "motion" else functools.partial(about_pictures, skill=skill)
    rngs = (np.random.default_rng([FIRST, number, seed]) for seed in itertools.count())
    return list(itertools.islice(filter(None, map(make, rngs)), count))
