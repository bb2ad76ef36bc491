"""Whisper: one clip of at most chunk_length seconds as log-mel features; the prompt goes to the decoder."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.hf_config import audio_options
from mmjax.mel import LogMel
from mmjax.processors import base
from mmjax.processors.base import (
    ExpandedPrompt,
    MediaItem,
    PlaceholderSpan,
    ProcessorKwargs,
    TimestampTokens,
    linear_positions,
)
from mmjax.spec import FeatureField
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

log = logging.getLogger(__name__)

# Of the published English-only models, whose text tokens are GPT-2's; the others have one or two tokens more.
ENGLISH_VOCAB_SIZE, ENGLISH_START_ID = 51_864, 50_257


def window_fields(num_samples: int) -> tuple[FeatureField, ...]:
    """One window of sound per input, silence after its end. The encoder's program computes its log-mel features."""
    return (FeatureField("samples", (num_samples,), "float32"),)


class Processor(base.Processor):
    """See `mmjax.processors.base.Processor`. Audio has no embeddings: the decoder reads it by cross attention."""

    mm_limits: Mapping[str, int | None] = {"audio": 1}
    placeholder_token: Mapping[str, str] = {}
    placeholder_text: Mapping[str, str] = {}
    accepted_kwargs: frozenset[str] = frozenset()
    embed_fields: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        self.decoder_start_id: int = config["decoder_start_token_id"]
        self.encoder_length: int = config["max_source_positions"]
        self.mel = LogMel.of_window(config, audio_options(files))
        self.sampling_rate: int | None = self.mel.rate
        known = files.get("generation_config.json", {})
        find = tokenizer.id_of if tokenizer else lambda token: None
        self.no_timestamps_id: int | None = known.get("no_timestamps_token_id", find("<|notimestamps|>"))
        tasks = known.get("task_to_id") or {task: find(f"<|{task}|>") for task in ("transcribe", "translate")}
        self.task_ids = frozenset(tasks.values()) - {None}
        self.eos_id: int = config["eos_token_id"]
        initial = known.get("max_initial_timestamp_index")
        self.max_initial_index: int = self.encoder_length if initial is None else initial
        stated = known.get("is_multilingual")
        is_english = config["vocab_size"] == ENGLISH_VOCAB_SIZE or self.decoder_start_id == ENGLISH_START_ID
        self._is_multilingual: bool = not is_english if stated is None else bool(stated)

    @property
    def audio_window_s(self) -> float:
        """Seconds of the encoder's window."""
        return self.mel.samples / self.mel.rate

    @property
    def is_multilingual(self) -> bool:
        """As generation_config.json says, else by the vocabulary; the tokenizers of all have tokens of languages."""
        return self._is_multilingual

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """0: an audio item takes no token of the decoder's prompt."""
        return 0

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """A clip, as `window_fields`; longer audio than the window is cut."""
        if len(media) > self.mel.samples:
            log.warning(
                "audio of %.1f s is cut to the model's window of %.1f s; split longer recordings first",
                len(media) / self.mel.rate,
                self.mel.samples / self.mel.rate,
            )
        samples = np.zeros((1, self.mel.samples), np.float32)
        samples[0, : len(media)] = media[: self.mel.samples]
        return MediaItem(modality, {"samples": samples}, num_inputs=1, num_embeds=0)

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """The decoder's prompt, with one start token; the encoder's prompt is that many dummy tokens."""
        audio = items.get("audio", ())
        if len(audio) != 1:
            raise RequestError(
                f"Expected 1 audio item for the encoder, but found {len(audio)}. Pass it as "
                'multi_modal_data={"audio": (array, sampling_rate)}; its prompt needs no placeholder.',
                "placeholder_mismatch",
            )
        # a transcript of earlier audio may precede the start token
        started = list(token_ids) if self.decoder_start_id in token_ids else [self.decoder_start_id, *token_ids]
        return ExpandedPrompt(started, [], (0,) * self.encoder_length, self._timestamps(started))

    def _timestamps(self, tokens: Sequence[int]) -> TimestampTokens | None:
        """For prompts that want timestamps: those with one, or with a task and without <|notimestamps|>."""
        if self.no_timestamps_id is None:
            return None
        first, last = self.no_timestamps_id + 1, self.no_timestamps_id + 1 + self.encoder_length
        header = list(tokens[len(tokens) - 1 - list(tokens)[::-1].index(self.decoder_start_id) :])
        tasks = [i for i, token in enumerate(header) if token in self.task_ids]
        times = [i for i, token in enumerate(header) if first <= token <= last]
        if self.no_timestamps_id in header or not (tasks or times):
            return None
        prefix = header[tasks[-1] + 1 if tasks else times[0] :]
        return TimestampTokens(
            first,
            last,
            self.eos_id,
            no_timestamps_id=self.no_timestamps_id,
            max_initial_index=self.max_initial_index,
            prefix_ids=tuple(prefix),
        )

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions of the decoder."""
        return linear_positions(len(token_ids))
