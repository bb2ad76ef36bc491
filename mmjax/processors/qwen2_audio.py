"""Qwen2-Audio: clips of at most the encoder's window, two of its steps to a token."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.hf_config import audio_options
from mmjax.mel import LogMel
from mmjax.processors.base import MediaItem, ProcessorKwargs
from mmjax.processors.whisper_chunks import CHUNK_STEPS, WhisperClipProcessor, chunk_fields, split_window
from mmjax.spec import FeatureField, conv_length
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

log = logging.getLogger(__name__)


def audio_fields(num_mel_bins: int) -> tuple[FeatureField, ...]:
    """Chunks of a window. step_index: the first of the two steps whose mean an embedding is."""
    return (*chunk_fields(num_mel_bins), FeatureField("step_index", axis="embeds", index_stride=CHUNK_STEPS))


class Processor(WhisperClipProcessor):
    """See `mmjax.processors.base.Processor`."""

    placeholder_token: Mapping[str, str] = {"audio": "<|AUDIO|>"}
    placeholder_text: Mapping[str, str] = {"audio": "Audio {i}: <|audio_bos|><|AUDIO|><|audio_eos|>"}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.mel = LogMel.of_window(config["audio_config"], audio_options(files))

    def _steps(self, samples: int) -> int:
        """Encoder steps of so many samples."""
        return conv_length(min(-(-samples // self.mel.hop), self.window_frames))

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Tokens of audio (samples,); 0 when it is too short."""
        return self._steps(size[0]) // 2

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """A clip, as `audio_fields`; longer audio than the window is cut."""
        steps = self._steps(len(media))
        num_embeds = steps // 2
        if not num_embeds:
            raise RequestError(
                f"The audio (len={len(media)}) is too short to be represented inside the model.", "audio_too_short"
            )
        if len(media) > self.mel.samples:
            log.warning(
                "audio of %.1f s is cut to the model's window of %.1f s; split longer recordings first",
                len(media) / self.mel.rate,
                self.mel.samples / self.mel.rate,
            )
        features = split_window(self.mel(media), steps, steps, 0)
        del features["output_steps"]  # the same as audio_steps
        features["step_index"] = np.arange(0, 2 * num_embeds, 2, dtype=np.int32)
        return MediaItem(modality, features, num_inputs=len(features["first_step"]), num_embeds=num_embeds)
