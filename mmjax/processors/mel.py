"""Log-mel features as Whisper was trained on, which most audio families share. NumPy and SciPy only."""

import functools

import numpy as np

FLOOR = -10.0  # log10 of the smallest power kept
RANGE = 8.0  # powers further below the loudest are lifted to this many decades under it
TOP_HZ = 8000.0


class LogMel:
    """Log-mel features: Hann windows, slaney filters, 8 decades scaled to about ±1."""

    def __init__(self, *, rate: int, window: int, hop: int, bins: int, samples: int):
        self.rate, self.window, self.hop, self.samples = rate, window, hop, samples
        self.frames = samples // hop
        self.taper = np.hanning(window + 1)[:-1].astype(np.float32)  # periodic
        self.filters = mel_filters(rate, window, bins)

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
        mel = np.full((self.filters.shape[0], self.frames), FLOOR, np.float32)
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
    """Slaney's triangular filters up to 8 kHz, each of unit area: float32 [bins, window // 2 + 1].

    The scale is linear (200/3 Hz per mel) up to 1 kHz and logarithmic (27 mels per factor 6.4) above.
    """
    step, knee = 200.0 / 3, 1000.0
    per_mel = np.log(6.4) / 27.0
    top = knee / step + np.log(TOP_HZ / knee) / per_mel
    mels = np.linspace(0.0, top, bins + 2)
    edges = np.where(mels < knee / step, mels * step, knee * np.exp(per_mel * (mels - knee / step)))
    freqs = np.linspace(0.0, rate / 2, window // 2 + 1)
    rise = (freqs - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - freqs) / (edges[2:] - edges[1:-1])[:, None]
    area = 2.0 / (edges[2:] - edges[:-2])
    return (np.maximum(0.0, np.minimum(rise, fall)) * area[:, None]).astype(np.float32)
