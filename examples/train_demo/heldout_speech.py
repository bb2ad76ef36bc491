"""Writes the spoken digits and words that ship with mmjax: `python examples/train_demo/heldout_speech.py`.

Voices are those that training never hears, with echo, noise and silence as there. Needs espeak-ng (installed, or
--espeak; the committed files were made with 1.51); the files are named after what is said and by whom.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import speech  # noqa: E402
from espeak import Espeak  # noqa: E402

from mmjax.demo import ask, heldout  # noqa: E402

DIGITS = 80  # strings of one to six; and every word once
QUALITY = 0.6  # of Vorbis: 0 is the best


def sayings(rng: np.random.Generator) -> list[str]:
    """What is to be said."""
    strings: list[str] = []
    while len(strings) < DIGITS:
        count = 1 + len(strings) % 6
        said = " ".join(ask.DIGITS[int(i)] for i in rng.integers(10, size=count))
        strings += [said] if said not in strings or count == 1 else []
    return [*strings, *ask.WORDS]


def record(espeak: Espeak, rng: np.random.Generator, said: str, voice: str) -> np.ndarray:
    """float32 at speech.RATE, no longer than training's longest."""
    while True:
        sound = speech.spoil(rng, speech.say(espeak, rng, said, (voice,)))
        if 40 * speech.HOP < len(sound) < speech.LONGEST * speech.RATE:
            noisy: np.ndarray = speech.noisy(rng, sound[None])[0]
            return noisy.clip(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--espeak", type=Path, help="folder of the library, where it is not installed")
    parser.add_argument("--out", type=Path, default=heldout.SPEECH)
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    for old in arguments.out.glob("*.ogg"):
        old.unlink()
    espeak = Espeak(arguments.espeak)
    rng = np.random.default_rng([heldout.FIRST, 60])
    for index, said in enumerate(sayings(rng)):
        voice = speech.TEST_VOICES[index % len(speech.TEST_VOICES)]
        file = arguments.out / f"{said.replace(' ', '-')}.{voice}.ogg"
        sound = record(espeak, rng, said, voice)
        soundfile.write(file, sound, speech.RATE, format="OGG", subtype="VORBIS", compression_level=QUALITY)
    files = list(arguments.out.glob("*.ogg"))
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
