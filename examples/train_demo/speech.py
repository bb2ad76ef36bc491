"""Spoken digits and words: synthetic voices, and what happens to sound on its way to a model."""

from __future__ import annotations

import numpy as np
from espeak import Espeak

from mmjax.demo import ask

RATE = 16000
HOP = 160
ACCENTS = ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
# variants of the voices; those held out are never heard in training
TEST_VOICES = (
    *("f2", "m4", "linda", "Michael", "steph2", "Alicia", "boris", "klatt3"),
    *("Gene", "max", "belinda", "m8", "victor", "ed"),
)
VOICES = (
    *("f1", "f3", "f4", "f5", "m1", "m2", "m3", "m5", "m6", "m7", "Alex", "Andrea", "Andy", "Annie", "AnxiousAndy"),
    *("Denis", "Diogo", "Gene2", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Mike", "Nguyen", "Reed"),
    *("RicishayMax", "RicishayMax2", "RicishayMax3", "Storm", "Tweaky", "UniRobot", "adam", "anika", "anikaRobot"),
    *("announcer", "antonio", "aunty", "benjamin", "caleb", "croak", "david", "edward", "edward2", "grandma"),
    *("grandpa", "gustave", "ian", "iven", "iven2", "iven3", "iven4", "john", "kaukovalta", "klatt", "klatt2"),
    *("klatt4", "klatt5", "klatt6", "marcelo", "michel", "miguel", "mike2", "norbert", "pablo", "paul", "pedro"),
    *("quincy", "rob", "robert", "robosoft", "robosoft2", "robosoft3", "robosoft5", "robosoft7", "sandro", "shelby"),
    *("steph", "steph3", "travis", "whisper", "whisperf", "zac"),
)
LONGEST = 6.4  # seconds


def say(espeak: Espeak, rng: np.random.Generator, text: str, voices: tuple[str, ...]) -> np.ndarray:
    """float32 at RATE: the text in some voice, accent, speed and pitch, now and then dull."""
    voice = f"{ACCENTS[int(rng.integers(len(ACCENTS)))]}+{voices[int(rng.integers(len(voices)))]}"
    rate, pitch, spread = (int(low + (high - low) * rng.random()) for low, high in ((115, 250), (20, 80), (20, 80)))
    if len(text.split()) > 1 and rng.random() < 0.3:
        text = text.replace(" ", ", ")
    sound = espeak.say(text, voice, rate, pitch, spread)
    faster = float(np.exp(rng.uniform(-0.13, 0.13))) if rng.random() < 0.7 else 1.0
    cut = 1.0 if rng.random() < 0.8 else 0.45 + 0.5 * rng.random()
    return trim(resample(sound, RATE / espeak.rate * faster, cut))


def trim(sound: np.ndarray) -> np.ndarray:
    """Without the silence at both ends."""
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    return sound[loud[0] : loud[-1] + 1] if len(loud) else sound


def resample(sound: np.ndarray, factor: float, cut: float = 1.0) -> np.ndarray:
    """`factor` times as many samples, band-limited; nothing above `cut` of what the result could hold."""
    block = 4096  # lengths that transforms like, and the least change of the factor
    padded = np.pad(sound, (256, -(len(sound) + 256) % block + 256))
    padded = np.pad(padded, (0, -len(padded) % block))
    size = round(block * factor / 32) * 32 * (len(padded) // block)
    spectrum = np.fft.rfft(padded)
    kept = np.zeros(size // 2 + 1, np.complex128)
    count = min(len(spectrum), int(len(kept) * cut))
    kept[:count] = spectrum[:count]
    out = np.fft.irfft(kept, size) * (size / len(padded))
    start = round(256 * size / len(padded))
    return out[start : start + round(len(sound) * size / len(padded))].astype(np.float32)


def varied(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """As another throat might say it, faster or slower, and another room or microphone pass it on: every frequency
    moved by the same factor, then highs stronger or weaker than lows by up to 3 dB an octave."""
    if rng.random() < 0.6:
        sound = resample(sound, float(np.exp(rng.uniform(-0.2, 0.2))))
    if rng.random() < 0.6:
        spectrum = np.fft.rfft(sound)
        hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
        sound = np.fft.irfft(spectrum * (np.maximum(hertz, 100) / 1000) ** rng.uniform(-0.5, 0.5), len(sound))
    return sound.astype(np.float32)


def utterance(rng: np.random.Generator) -> str:
    """A word, or one to eight digits."""
    if rng.random() < 0.3:
        return ask.WORDS[int(rng.integers(len(ask.WORDS)))]
    most = 6 if rng.random() < 0.9 else 8
    return " ".join(ask.DIGITS[int(i)] for i in rng.integers(10, size=int(rng.integers(1, most + 1))))


def spoil(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Echoing, louder or softer, with silence around: everything but noise."""
    if rng.random() < 0.15:
        delay = int(rng.integers(160, 1600))
        sound = np.pad(sound, (0, delay))
        sound[delay:] += sound[:-delay] * np.float32(rng.uniform(0.1, 0.35))
    sound = sound * np.float32(10 ** rng.uniform(-1.3, 0) / (np.abs(sound).max() + 1e-6))
    before, after = (int(RATE * 0.5 * rng.random() ** 1.5) for _ in range(2))
    return np.pad(sound, (before, after + 160))


def noisy(rng: np.random.Generator, sounds: np.ndarray) -> np.ndarray:
    """float32 [B, N] with noise of its own in most rows."""
    out = sounds.copy()
    for row in out:
        if rng.random() < 0.35:
            continue
        noise = rng.standard_normal(len(row), np.float32)
        if rng.random() < 0.5:  # most of the noise around us is low
            tilt = np.fft.rfft(noise)
            noise = np.fft.irfft(tilt / np.sqrt(np.arange(len(tilt)) + 20), len(row)).astype(np.float32)
        level = np.sqrt(np.mean(row**2)) * 10 ** (-rng.uniform(8, 40) / 20) / (noise.std() + 1e-9)
        row += noise * np.float32(level)
    return out
