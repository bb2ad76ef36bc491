"""Sample audio."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mmjax.config import env
from mmjax.multimodal.utils import encode_audio_url
from mmjax.types import RequestError


@dataclasses.dataclass(frozen=True)
class AudioAsset:
    """Audio by name: `mary_had_lamb` (the tune) or `winning_call` (a crowd). ValueError for other names."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in SOUNDS:
            raise RequestError(f"Unknown audio asset {self.name!r}; there are {sorted(SOUNDS)}.", "unknown_name")

    @property
    def audio_and_sample_rate(self) -> tuple[np.ndarray, int]:
        """(mono float32 samples in ±1, sampling rate)."""
        samples, rate = _generate(self.name)
        return samples.copy(), rate

    @property
    def url(self) -> str:
        """The audio as a data URL."""
        return encode_audio_url(*_generate(self.name))

    def get_local_path(self) -> Path:
        """The audio as a file in the directory that MMJAX_ASSETS_CACHE names."""
        import soundfile

        folder = Path(env("ASSETS_CACHE", "~/.cache/mmjax/assets")).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}.wav"
        samples, rate = _generate(self.name)
        soundfile.write(file, samples, rate)
        return file


def _tune(notes: str, rate: int = 16_000, beat: float = 0.4) -> np.ndarray:
    """Notes a to g of the octave from middle C, with overtones, one beat each; `-` prolongs a note by a beat."""
    semitones = {"c": -9, "d": -7, "e": -5, "f": -4, "g": -2, "a": 0, "b": 2}  # from a' at 440 Hz
    parts = []
    for note, beats in _lengths(notes):
        seconds = np.arange(round(rate * beat * beats)) / rate
        hertz = 440 * 2 ** (semitones[note] / 12)
        tone = sum(np.sin(2 * np.pi * hertz * k * seconds) / k**2 for k in (1, 2, 3))
        parts.append(0.3 * tone * np.exp(-3 * seconds) * np.minimum(1, seconds / 0.01))
    return np.concatenate(parts).astype(np.float32)


def _lengths(notes: str) -> list[tuple[str, int]]:
    """(note, beats) of each note."""
    lengths: list[tuple[str, int]] = []
    for char in notes.replace(" ", ""):
        lengths = [*lengths[:-1], (lengths[-1][0], lengths[-1][1] + 1)] if char == "-" else [*lengths, (char, 1)]
    return lengths


def _crowd(rate: int = 22_050, seconds: float = 8.0) -> np.ndarray:
    """A crowd that grows louder, with a rising voice above it."""
    time = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    murmur = np.convolve(noise, np.hanning(64) / 32, "same") * (0.05 + 0.4 / (1 + np.exp(-3 * (time - 5))))
    pitch = 180 + 25 * time + 6 * np.sin(2 * np.pi * 5 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    syllables = np.maximum(0, np.sin(2 * np.pi * 3 * time)) ** 0.5
    voice = sum(np.sin(k * phase) / k for k in range(1, 8)) * syllables * 0.15
    return np.clip(murmur + voice, -1, 1).astype(np.float32)


SOUNDS: dict[str, Callable[[], tuple[np.ndarray, int]]] = {
    "mary_had_lamb": lambda: (_tune("edcd eee- ddd- egg- edcd eeee dded c---"), 16_000),
    "winning_call": lambda: (_crowd(), 22_050),
}


@functools.cache
def _generate(name: str) -> tuple[np.ndarray, int]:
    return SOUNDS[name]()
