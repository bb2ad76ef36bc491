"""Random text, images and audio. Equal generators give equal inputs; nothing repeats, so no cache can help."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

AUDIO_RATE = 16_000
# Each is one token in the vocabularies of all published models, with the space before it.
COMMON_WORDS = (
    "the of and to in is was for on that with as it by at from his an were are which this be had not or have one but "
    "their been has they who also its first new after two more time most other when only over some world city state "
    "year people years many up between under during before through where while three such then them both part made "
    "used later use no war house about can out against school being town him since until area including group well "
    "water did film game team line work company music book name family home number high life small large long"
)
WORDS = COMMON_WORDS.split()


def random_text(tokens: int, rng: np.random.Generator, encode: Callable[[str], Sequence[int]] | None = None) -> str:
    """Random words that make about this many tokens. encode: of the model's tokenizer; without it, a word counts as
    one."""
    if encode is None:
        return " ".join(rng.choice(WORDS, tokens))
    letters = np.array(list(string.ascii_lowercase))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(tokens)]
    while words and len(encode(" ".join(words))) > tokens:
        words = words[: max(1, int(len(words) * tokens / len(encode(" ".join(words)))))] if len(words) > 1 else []
    return " ".join(words)


def random_image(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Noise of this (width, height)."""
    width, height = size
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_audio(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Noise at AUDIO_RATE."""
    return rng.standard_normal(int(seconds * AUDIO_RATE)).astype(np.float32) * 0.1
