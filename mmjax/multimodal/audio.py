"""Converts audio to mono float32 at a model's sampling rate: arrays of any layout, audio files, audio tracks."""

import dataclasses
import enum
import io
import math
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.multimodal import ffmpeg
from mmjax.multimodal.arrays import is_array, to_numpy
from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.types import RequestError

RATES = (100, 10_000_000)  # Hz; with rates outside, resampling could allocate without bound
SAME_RATE = 1e-6
LARGEST_TERM = 1 << 16
BLOCK = 1 << 18  # frames per read


def decode(media: Any, rate: int | None, *, limits: MediaLimits = DEFAULT) -> np.ndarray:
    """One audio item, in any form that callers may pass, as mono float32 [n] at `rate` Hz.

    `media` is an array or list of samples, already at `rate`, or a tuple (samples, sampling rate or None). Integers are
    divided by their full scale. RequestError for empty, NaN or infinite samples, more than two axes, or no target rate.
    """
    samples, source = media if isinstance(media, tuple) and len(media) == 2 else (media, None)
    mono = to_mono(_to_float(samples))
    if not mono.size:
        raise RequestError("The audio is empty: it has 0 samples.", "bad_media")
    if not np.isfinite(mono).all():
        raise RequestError("The audio contains NaN or infinite samples.", "bad_media")
    if source is None:
        return mono
    if rate is None:
        raise NoTargetRate("Audio resampling is not supported when `target_sr` is not provided.", "bad_media")
    _check_rates(source, rate)
    if limits.audio_bytes and 4 * len(mono) * rate > limits.audio_bytes * float(source):
        raise RequestError(
            f"The audio has more than {limits.audio_bytes // 4} samples at {rate} Hz, the most that is processed. "
            "Split it first, and check its sampling rate.",
            "media_too_large",
        )
    return resample(mono, source, rate)


def _to_float(samples: Any) -> np.ndarray:
    """Samples of any number type as float32 (float64 is rounded), full scale ±1 for integers."""
    if not is_array(samples):
        if not isinstance(samples, (list, tuple)):
            raise RequestError(
                f"An audio item must be samples or a tuple (samples, sampling_rate), got {type(samples).__name__}. "
                "Read files first, for example with soundfile.",
                "bad_media",
            )
        try:
            return np.asarray(samples, np.float32)
        except (TypeError, ValueError) as error:
            raise RequestError("An audio list must hold numbers only.", "bad_media") from error
    array = to_numpy(samples)
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype.kind not in "iu" or array.dtype.itemsize == 8:
        raise RequestError(
            f"Audio samples cannot be {array.dtype}: its full scale is not defined. Use float32 in ±1 or int16.",
            "bad_media",
        )
    scale = np.float32(2 ** (8 * array.dtype.itemsize - 1))
    return array.astype(np.float32) / scale - np.float32(array.dtype.kind == "u")  # unsigned: silence is half scale


def to_mono(audio: np.ndarray) -> np.ndarray:
    """[n], [channels, n] or [n, channels] -> the mean over channels, [n].

    Of two axes, the shorter one holds the channels; of two equal ones, the first.
    """
    if audio.ndim == 1:
        return audio
    if audio.ndim != 2:
        raise RequestError(f"Unsupported audio shape {audio.shape}: at most (channels, time).", "bad_media")
    if audio.shape[0] > audio.shape[1] > 0:
        audio = audio.T
    return audio[0] if audio.shape[0] == 1 else audio.mean(axis=0)


def resample(audio: np.ndarray, source: float, target: float) -> np.ndarray:
    """Band-limited change of rate (Hz) along the last axis: float32, ceil(n * target / source) samples.

    A polyphase filter over the ratio in lowest terms: 44.1 kHz to 16 kHz is 160/441, never an integer step. This is
    librosa's "polyphase", without its import, for which numba compiles for 30 s on a new machine. librosa's other
    methods filter more sharply, but with each of them whisper-tiny.en transcribes an 8 kHz recording differently.
    RequestError for an invalid sampling rate.
    """
    from scipy import signal  # not imported before the first clip of another rate

    _check_rates(source, target)
    if abs(float(source) - float(target)) <= SAME_RATE:
        return audio
    ratio = Fraction(float(target)) / Fraction(float(source))
    # the filter is as long as the larger term, so odd rates are approximated, to a millionth of a Hz or better
    ratio = 1 / (1 / ratio).limit_denominator(LARGEST_TERM) if ratio > 1 else ratio.limit_denominator(LARGEST_TERM)
    made: np.ndarray = signal.resample_poly(np.asarray(audio, np.float32), ratio.numerator, ratio.denominator, axis=-1)
    return made


def _check_rates(*rates: Any) -> None:
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not RATES[0] <= rate <= RATES[1]:
            raise RequestError(
                f"The sampling rate must be a number of Hz in {RATES[0]}..{RATES[1]}, got {rate!r}.", "bad_media"
            )


def load(source: bytes | Path, *, limits: MediaLimits = DEFAULT) -> tuple[np.ndarray, int]:
    """Decode an audio file or the audio track of a video: (mono float32 [n], its sampling rate)."""
    from soundfile import LibsndfileError

    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return _read_sound(opened, limits)
    except LibsndfileError:
        pass  # not supported by libsndfile: mp4, m4a, webm and the like
    except OSError as error:
        raise _unreadable() from error
    with tempfile.TemporaryDirectory(prefix="mmjax-") as folder, ffmpeg.as_file(source, Path(folder)) as file:
        out = Path(folder) / "sound.wav"
        longest = ["-t", str(limits.audio_seconds + 1)] if limits.audio_seconds else []
        largest = ["-fs", str(limits.audio_bytes + 4096)] if limits.audio_bytes else []
        try:
            ffmpeg.run(file, ["-map", "0:a:0", *longest, *largest, "-c:a", "pcm_f32le", str(out)])
            return _read_sound(out, limits)
        except (subprocess.SubprocessError, LibsndfileError, OSError) as error:
            raise _unreadable() from error


def _read_sound(file: Any, limits: MediaLimits) -> tuple[np.ndarray, int]:
    """Read block by block, so that a wrong header or a decompression bomb is stopped at the limit, not by the
    allocator."""
    import soundfile

    with soundfile.SoundFile(file) as sound:
        rate, channels = int(sound.samplerate), int(sound.channels)
        most = math.inf
        if limits.audio_seconds:
            most = limits.audio_seconds * rate
        if limits.audio_bytes:
            most = min(most, limits.audio_bytes // (4 * channels))
        blocks, total = [np.zeros(0, np.float32)], 0
        for block in sound.blocks(BLOCK, dtype="float32", always_2d=True):
            total += len(block)
            if total > most:
                raise RequestError(
                    f"The audio is longer than {most / rate:g} s, the most that is decoded. Split it first.",
                    "media_too_large",
                )
            blocks.append(block[:, 0] if channels == 1 else block.mean(axis=1))
    return np.concatenate(blocks), rate


def _unreadable() -> RequestError:
    return RequestError("Invalid or unsupported audio file.", "bad_media")


def split_audio(
    audio_data: np.ndarray,
    sample_rate: int,
    max_clip_duration_s: float,
    overlap_duration_s: float,
    min_energy_window_size: int,
) -> list[np.ndarray]:
    """Cut mono audio [n] into clips of at most `max_clip_duration_s`, at the quietest places.

    Each cut lies in the last `overlap_duration_s` of a full clip, where a window of `min_energy_window_size` samples
    has the least energy; without overlap, all clips but the last are full. No sample is lost or repeated: the clips
    concatenate to the input. Empty input gives no clips.
    """
    audio = np.asarray(audio_data)
    clip, overlap = int(sample_rate * max_clip_duration_s), int(sample_rate * overlap_duration_s)
    if audio.ndim != 1:
        raise RequestError(f"split_audio needs mono audio of shape (time,), got shape {audio.shape}.", "bad_media")
    if clip <= 0 or overlap_duration_s < 0 or min_energy_window_size <= 0:
        words = "split_audio needs a positive clip duration, rate and window size, and an overlap of 0 or more."
        raise RequestError(words, "bad_media")
    if overlap >= clip:
        raise RequestError("split_audio needs an overlap_duration_s below max_clip_duration_s.", "bad_media")
    if not np.isfinite(audio).all():
        raise RequestError("The audio contains NaN or infinite samples.", "bad_media")
    clips, start = [], 0
    while start + clip < len(audio):
        end = find_split_point(audio, start + clip - overlap, start + clip, min_energy_window_size)
        clips.append(audio[start:end])
        start = end
    return [*clips, audio[start:]] if len(audio) else []


def find_split_point(wav: np.ndarray, start_idx: int, end_idx: int, min_energy_window: int) -> int:
    """Start of the quietest window (least RMS, the first of equals) on a grid from start_idx; end_idx if none fits."""
    segment = wav[start_idx:end_idx]
    count = max(0, -(-(len(segment) - min_energy_window) // min_energy_window))
    if not count:
        return end_idx
    frames = segment[: count * min_energy_window].reshape(count, min_energy_window)
    energy = np.sqrt(np.square(frames, dtype=np.float64).mean(axis=1))
    return start_idx + int(np.argmin(energy)) * min_energy_window


# --- names that scripts for vLLM import


class ChannelReduction(enum.Enum):
    """How several channels become one."""

    MEAN = "mean"
    FIRST = "first"
    MAX = "max"
    SUM = "sum"


@dataclasses.dataclass(frozen=True)
class AudioSpec:
    """How many channels a model takes; None for any number."""

    target_channels: int | None = 1
    channel_reduction: ChannelReduction = ChannelReduction.MEAN

    @property
    def needs_normalization(self) -> bool:
        """Whether channels are changed at all."""
        return self.target_channels is not None


MONO_AUDIO_SPEC = AudioSpec()
PASSTHROUGH_AUDIO_SPEC = AudioSpec(target_channels=None)


def normalize_audio(audio: Any, spec: AudioSpec) -> Any:
    """Audio with the channels of `spec`, in the array library and dtype it came in: [n] for one, else [channels, n].

    The longer of two axes is time, unless the other is as long: then rows are channels. Surplus
    channels are dropped, except that a single channel is made by `channel_reduction`.
    """
    if not spec.needs_normalization:
        return audio
    if audio.ndim > 2 or not audio.ndim:
        raise RequestError(f"Unsupported audio shape {tuple(audio.shape)}: at most (channels, time).", "bad_media")
    wanted, channels = spec.target_channels or 1, audio
    if audio.ndim == 1:
        if wanted == 1:
            return audio
        channels = audio[None]
    elif audio.shape[0] > audio.shape[1] > 0:
        channels = audio.T
    if wanted > channels.shape[0]:
        raise RequestError(f"Cannot expand {channels.shape[0]} audio channel(s) to {wanted}.", "bad_media")
    if wanted > 1:
        return channels[:wanted]
    if channels.shape[0] == 1 or spec.channel_reduction is ChannelReduction.FIRST:
        return channels[0]
    if spec.channel_reduction is ChannelReduction.MAX:
        return getattr(channels, "amax", channels.max)(0)  # torch's `max` also returns indices
    return channels.mean(0) if spec.channel_reduction is ChannelReduction.MEAN else channels.sum(0)


class NoTargetRate(RequestError, RuntimeError):
    """Resampling without a target rate. Also a RuntimeError, which some callers expect."""


class AudioResampler:
    """Resamples to one rate. vLLM's methods are accepted, but all use the same filter here."""

    METHODS = ("pyav", "resampy", "scipy", "torchaudio", "soxr")

    def __init__(self, target_sr: float | None = None, method: str = "scipy"):
        if method not in self.METHODS:
            raise RequestError(f"Invalid resampling method: {method}. Known are {self.METHODS}.", "unknown_name")
        self.target_sr = target_sr

    def resample(self, audio: np.ndarray, *, orig_sr: float) -> np.ndarray:
        """Samples along the last axis at the target rate; see `resample`."""
        if self.target_sr is None:
            raise NoTargetRate("Audio resampling is not supported when `target_sr` is not provided.", "bad_media")
        return resample(audio, orig_sr, self.target_sr)


def get_audio_duration(*, y: Any, sr: float = 22050) -> float:
    """Seconds of audio whose last axis is time."""
    return float(y.shape[-1] / sr)
