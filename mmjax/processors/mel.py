"""Log-mel features as Whisper was trained on, which most audio families share."""

import functools

import numpy as np

from mmjax.multimodal.audio import librosa

FLOOR = -10.0  # log10 of the smallest power kept
RANGE = 8.0  # powers further below the loudest are lifted to this many decades under it
TOP_HZ = 8000.0


class LogMel:
    """Log-mel features: Hann windows, slaney filters, 8 decades scaled to about ±1."""

    def __init__(self, *, rate: int, window: int, hop: int, bins: int, samples: int):
        self.rate, self.window, self.hop, self.bins, self.samples = rate, window, hop, bins, samples
        self.frames = samples // hop
        self.taper = np.hanning(window + 1)[:-1].astype(np.float32)  # periodic

    @property
    def filters(self) -> np.ndarray:
        """float32 [bins, window // 2 + 1], made when the first sound comes."""
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
        spectrum = fft.rfft(frames * self.taper, axis=-1, overwrite_x=True)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        mel: np.ndarray = np.log10(np.maximum(self.filters @ power.T, 10.0**FLOOR))
        return mel

    @staticmethod
    def _scale(mel: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = (np.maximum(mel, mel.max() - RANGE) + 4.0) / 4.0
        return scaled


@functools.lru_cache
def mel_filters(rate: int, window: int, bins: int) -> np.ndarray:
    """Slaney's triangular filters up to 8 kHz, each of unit area: float32 [bins, window // 2 + 1]. `rate` is in Hz."""
    filters: np.ndarray = librosa().filters.mel(sr=rate, n_fft=window, n_mels=bins, fmax=TOP_HZ)
    return filters
