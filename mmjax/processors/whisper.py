"""Whisper: one clip of at most chunk_length seconds as a log-mel spectrogram; the prompt goes to the decoder."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors.base import Expanded, Item, Kwargs, Span, linear_positions
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError

log = logging.getLogger(__name__)

FLOOR = -10.0  # log10 of the smallest power kept
RANGE = 8.0  # powers further below the loudest are lifted to this many decades under it
TOP_HZ = 8000.0


class LogMel:
    """Log-mel features as Whisper was trained on: Hann windows, slaney filters, 8 decades scaled to about ±1."""

    def __init__(self, *, rate: int, window: int, hop: int, bins: int, samples: int):
        self.rate, self.window, self.hop, self.samples = rate, window, hop, samples
        self.frames = samples // hop
        self.taper = np.hanning(window + 1)[:-1].astype(np.float32)  # periodic
        self.filters = mel_filters(rate, window, bins)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """float32 [n] -> float32 [bins, frames]; longer audio is cut, shorter padded with silence.

        Only frames that touch sound are transformed: a short clip costs its length, not the full window.
        """
        from scipy import fft  # 4x numpy's speed in float32; not imported before the first clip

        half = self.window // 2
        audio = audio[: self.samples]
        live = min(self.frames, -(-(len(audio) + half) // self.hop))
        padded = np.zeros(self.samples + 2 * half, np.float32)
        padded[half : half + len(audio)] = audio
        padded[:half] = padded[half + 1 : 2 * half + 1][::-1]
        padded[-half:] = padded[-2 * half - 1 : -half - 1][::-1]
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:live]
        spectrum = fft.rfft(frames * self.taper, axis=-1, overwrite_x=True)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        mel = np.full((self.filters.shape[0], self.frames), FLOOR, np.float32)
        np.log10(np.maximum(self.filters @ power.T, 10.0**FLOOR), out=mel[:, :live])
        return (np.maximum(mel, mel.max() - RANGE) + 4.0) / 4.0


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


class Processor:
    """See `mmjax.processors.base.Processor`. An audio item has no rows: the decoder reads it by cross attention."""

    kinds: Mapping[str, int | None] = {"audio": 1}
    marker: Mapping[str, str] = {}
    placeholder: Mapping[str, str] = {}
    accepts: frozenset[str] = frozenset()

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        prepare = files["preprocessor_config.json"]
        self.sampling_rate: int | None = prepare["sampling_rate"]
        self.start: int = config["decoder_start_token_id"]
        self.encoder_length: int = config["max_source_positions"]
        self.mel = LogMel(
            rate=prepare["sampling_rate"],
            window=prepare["n_fft"],
            hop=prepare["hop_length"],
            bins=prepare["feature_size"],
            samples=prepare["chunk_length"] * prepare["sampling_rate"],
        )
        if self.mel.frames != 2 * self.encoder_length:
            raise ValueError(
                f"preprocessor_config.json yields {self.mel.frames} frames, but max_source_positions of config.json "
                f"({self.encoder_length}) needs twice as many: the two files belong to different checkpoints"
            )

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """No row of the decoder's prompt."""
        return 0

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item:
        """Mono float32 [n] at the model's rate -> mel f32[1, bins, frames]."""
        if len(media) > self.mel.samples:
            log.warning(
                "audio of %.1f s is cut to the model's window of %.1f s; split longer recordings first",
                len(media) / self.mel.rate,
                self.mel.samples / self.mel.rate,
            )
        return Item(kind, {"mel": self.mel(media)[None]}, units=1, rows=0)

    def expand(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> Expanded:
        """Start the decoder prompt with the start token, once; the encoder is shown as that many dummy tokens."""
        audio = items.get("audio", ())
        if len(audio) != 1:
            raise RequestError(
                f"Expected 1 audio item for the encoder, but found {len(audio)}. Pass it as "
                'multi_modal_data={"audio": (array, sampling_rate)}; its prompt needs no placeholder.',
                "placeholder_mismatch",
            )
        started = list(tokens) if tokens and tokens[0] == self.start else [self.start, *tokens]
        return Expanded(started, [], encoder_tokens=(0,) * self.encoder_length)

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions of the decoder."""
        return linear_positions(len(tokens))
