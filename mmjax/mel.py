"""Log-mel features as Whisper was trained on, which most audio families share: their sizes, and how the host computes
them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.config import cache_root

FLOOR = -10.0  # log10 of the smallest power kept
RANGE = 8.0  # powers further below the loudest are lifted to this many decades under it
TOP_HZ = 8000.0
BLOCK = 256  # frames transformed at a time, so that what lies between the steps stays in the processor's cache


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel features: Hann windows, slaney filters, 8 decades scaled to about ±1.

    rate: of the samples, in Hz. window, hop: samples of a frame, and between the starts of two. samples: the most that
    a clip has. `mmjax.nn.audio.mel` computes the same on the device.
    """

    rate: int
    window: int
    hop: int
    bins: int
    samples: int

    @classmethod
    def from_hf(cls, prepare: Mapping[str, Any]) -> LogMel:
        """From the configuration of a Whisper feature extractor."""
        return cls(
            rate=prepare["sampling_rate"],
            window=prepare["n_fft"],
            hop=prepare["hop_length"],
            bins=prepare["feature_size"],
            samples=prepare["chunk_length"] * prepare["sampling_rate"],
        )

    @classmethod
    def of_window(cls, audio: Mapping[str, Any], prepare: Mapping[str, Any]) -> LogMel:
        """`from_hf`, for an encoder of whole windows with the configuration `audio`. Raises ValueError where the two
        disagree on the number of frames or bins."""
        mel = cls.from_hf(prepare)
        for name, found, key, needed in (
            ("frames", mel.frames, "max_source_positions", 2 * audio["max_source_positions"]),
            ("mel bins", mel.bins, "num_mel_bins", audio["num_mel_bins"]),
        ):
            if found != needed:
                raise ValueError(
                    f"preprocessor_config.json yields {found} {name}, but {key} of config.json needs {needed}: the two "
                    "files belong to different checkpoints"
                )
        return mel

    @property
    def frames(self) -> int:
        """Frames of the longest clip."""
        return self.samples // self.hop

    @property
    def taper(self) -> np.ndarray:
        """The Hann window, periodic: float32 [window]."""
        taper: np.ndarray = np.hanning(self.window + 1)[:-1].astype(np.float32)
        return taper

    @property
    def filters(self) -> np.ndarray:
        """float32 [bins, window // 2 + 1]; see `mel_filters`."""
        return mel_filters(self.rate, self.window, self.bins)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """float32 [n] -> float32 [bins, frames]; longer audio is cut, shorter padded with silence.

        Only frames that touch sound are transformed: a short clip costs its length, not the full window.
        """
        half = self.window // 2
        audio = audio[: self.samples]
        live = min(self.frames, -(-(len(audio) + half) // self.hop))
        padded = np.zeros(self.samples + 2 * half, np.float32)
        padded[half : half + len(audio)] = audio
        padded[:half] = padded[half + 1 : 2 * half + 1][::-1]
        padded[-half:] = padded[-2 * half - 1 : -half - 1][::-1]
        mel = np.full((self.bins, self.frames), FLOOR, np.float32)
        mel[:, :live] = self._logarithm(padded, live)
        return self._scale(mel)

    def zero_padded(self, audio: np.ndarray) -> np.ndarray:
        """float32 [n] -> float32 [bins, ceil(n / hop)]: as in the full window, but only frames that begin within the
        clip, at the cost of its length."""
        audio = audio[: self.samples]
        half, frames = self.window // 2, -(-len(audio) // self.hop)
        if len(audio) + half > self.samples:  # the window's end is mirrored
            return self(audio)[:, :frames]
        live = -(-(len(audio) + half) // self.hop)  # the last may be louder than any before
        padded = np.zeros(max(live * self.hop, self.window) + 2 * half, np.float32)
        padded[half : half + len(audio)] = audio
        padded[:half] = padded[half + 1 : 2 * half + 1][::-1]
        return self._scale(self._logarithm(padded, live))[:, :frames]

    def reflect_padded(self, audio: np.ndarray) -> np.ndarray:
        """float32 [n] -> float32 [bins, n // hop]: no padding, the clip is mirrored at both ends (n > window / 2)."""
        padded = np.pad(audio, self.window // 2, mode="reflect")
        return self._scale(self._logarithm(padded, len(audio) // self.hop))

    def _logarithm(self, padded: np.ndarray, count: int) -> np.ndarray:
        """The first `count` frames of a signal that is longer by half a window at either end: float32 [bins, count]."""
        from scipy import fft  # 4x numpy's speed in float32; not imported before the first clip

        frames = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:count]
        taper, filters = self.taper, _sparse_filters(self.rate, self.window, self.bins)
        mel = np.empty((self.bins, count), np.float32)
        for start in range(0, count, BLOCK):
            block = slice(start, start + BLOCK)
            spectrum = fft.rfft(frames[block] * taper, axis=-1, overwrite_x=True)
            power = np.square(spectrum.real) + np.square(spectrum.imag)
            mel[:, block] = np.log10(np.maximum(filters @ power.T, 10.0**FLOOR))
        return mel

    @staticmethod
    def _scale(mel: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = (np.maximum(mel, mel.max() - RANGE) + 4.0) / 4.0
        return scaled


@functools.lru_cache
def mel_filters(rate: int, window: int, bins: int) -> np.ndarray:
    """Slaney's triangular filters up to 8 kHz, each of unit area: float32 [bins, window // 2 + 1]. `rate` is in Hz.

    librosa takes half a second to import. numba compiles those parts of it that are called for the first time on a
    machine, and fails if it cannot cache the result. Its default folders, beside librosa and in the home directory, may
    be read-only; the one set here is writable.
    """
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_root() / "numba"))
    import librosa

    filters: np.ndarray = librosa.filters.mel(sr=rate, n_fft=window, n_mels=bins, fmax=TOP_HZ)
    return filters


@functools.lru_cache
def _sparse_filters(rate: int, window: int, bins: int) -> Any:
    """`mel_filters` as a sparse matrix: a frequency is part of two filters at most. Threads of the dense product's BLAS
    got in each other's way: 64 clips took as long in eight threads as in one."""
    from scipy import sparse

    return sparse.csr_array(mel_filters(rate, window, bins))
