"""Questions outside of the training set, by skill: scenes from other seeds, recordings of other voices."""

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

FIRST = 4  # first word of every seed here; those of training are 1, 2 and 3
SPEECH = Path(__file__).resolve().parent / "speech"
FRAMES = 8  # of a video
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclasses.dataclass(frozen=True)
class MediaQuestion:
    """A question about media.

    media: images, one video uint8 [frames, height, width, 3], or one recording (samples, sampling rate).
    """

    qa: ask.QuestionAnswer
    modality: str
    media: list[Any]

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt as `LLM.generate` takes it, in the form that the chat template gives to a first message."""
        placeholders = f"<{self.modality}>" * len(self.media)
        text = PROMPT.format(placeholders + self.qa.question)
        return {"prompt": text, "multi_modal_data": {self.modality: self.media}}


@functools.cache
def recordings() -> tuple[tuple[str, Path], ...]:
    """(transcript, file) of every recording that ships, digits first, in a fixed random order."""
    found = [(file.name.split(".")[0].replace("-", " "), file) for file in sorted(SPEECH.glob("*.ogg"))]
    order = np.random.default_rng([FIRST, 61]).permutation(len(found))
    shuffled = [found[int(i)] for i in order]
    return tuple(sorted(shuffled, key=lambda pair: pair[0].split()[0] not in ask.DIGITS))


def read(file: Path) -> tuple[np.ndarray, int]:
    """(samples, sampling rate) of a sound file."""
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(file.read_bytes()), dtype="float32")
    return samples, rate


def edges(rng: np.random.Generator) -> tuple[float, float]:
    """A random width and height in units of the shorter side: from square to twice as long."""
    ratio = math.exp(rng.uniform(-0.7, 0.7))
    return max(1.0, ratio), max(1.0, 1 / ratio)


def about_pictures(rng: np.random.Generator, skill: str) -> MediaQuestion | None:
    """A question of one skill about one or two pictures. None where the scenes do not allow one."""
    size, side = edges(rng), int(rng.integers(140, 320))
    pair = skill == "compare"
    num_things = 1 if pair and rng.random() < 0.4 else None
    drawn = [scenes.draw_scene(rng, *size, things=num_things) for _ in range(1 + pair)]
    if pair and rng.random() < 0.3:  # two equal shapes are rare otherwise
        first, *rest = drawn[1].things
        equal = dataclasses.replace(first, shape=drawn[0].things[0].shape)
        drawn[1] = dataclasses.replace(drawn[1], things=(equal, *rest))
    qa = ask.about_picture(rng, drawn, skill)
    return MediaQuestion(qa, "image", list(paint.pictures(drawn, side, rng))) if qa else None


def about_clip(rng: np.random.Generator) -> MediaQuestion:
    """A question about what moves in a video."""
    clip = scenes.draw_clip(rng, FRAMES, *edges(rng))
    return MediaQuestion(ask.about_clip(rng, clip), "video", [frames(rng, clip, int(rng.integers(140, 240)))])


def frames(rng: np.random.Generator, clip: scenes.MovingScene, side: int) -> np.ndarray:
    """A video uint8 [frames, height, width, 3], `side` pixels on the shorter edge."""
    return np.stack([np.asarray(picture) for picture in paint.pictures(clip.frames(), side, rng)])


def about_recording(rng: np.random.Generator, transcript: str, file: Path) -> MediaQuestion:
    """A question about what is said in a recording."""
    return MediaQuestion(ask.about_speech(rng, transcript)[0], "audio", [read(file)])


def questions(skill: str, count: int) -> list[MediaQuestion]:
    """`count` questions of one skill, always the same ones. Of recordings there are at most as many as ship."""
    number = ask.SKILLS.index(skill)
    if skill in ("digits", "words"):
        fitting = [pair for pair in recordings() if (pair[0].split()[0] in ask.DIGITS) == (skill == "digits")]
        seeds = enumerate(fitting[:count])
        return [about_recording(np.random.default_rng([FIRST, number, i]), *pair) for i, pair in seeds]
    make: Callable[[np.random.Generator], MediaQuestion | None]
    make = about_clip if skill == "motion" else functools.partial(about_pictures, skill=skill)
    rngs = (np.random.default_rng([FIRST, number, seed]) for seed in itertools.count())
    return list(itertools.islice(filter(None, map(make, rngs)), count))
