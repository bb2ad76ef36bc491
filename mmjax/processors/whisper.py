"""Whisper: one clip of at most chunk_length seconds as a log-mel spectrogram; the prompt goes to the decoder."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.processors.base import Expanded, Item, Kwargs, Span, Timestamps, linear_positions
from mmjax.processors.clips import log_mel
from mmjax.text.tokenizer import Tokenizer
from mmjax.types import RequestError

log = logging.getLogger(__name__)


class Processor:
    """See `mmjax.processors.base.Processor`. An audio item has no rows: the decoder reads it by cross attention."""

    kinds: Mapping[str, int | None] = {"audio": 1}
    marker: Mapping[str, str] = {}
    placeholder: Mapping[str, str] = {}
    accepts: frozenset[str] = frozenset()
    embeds: Mapping[str, tuple[str, ...]] = {}  # the decoder reads what the encoder makes of sound, and no rows

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        self.start: int = config["decoder_start_token_id"]
        self.encoder_length: int = config["max_source_positions"]
        self.mel = log_mel(files)
        self.sampling_rate: int | None = self.mel.rate
        known = files.get("generation_config.json", {})
        find = tokenizer.id_of if tokenizer else lambda token: None
        self.plain: int | None = known.get("no_timestamps_token_id", find("<|notimestamps|>"))
        tasks = known.get("task_to_id") or {task: find(f"<|{task}|>") for task in ("transcribe", "translate")}
        self.tasks = frozenset(tasks.values()) - {None}
        self.end: int = config["eos_token_id"]
        initial = known.get("max_initial_timestamp_index")
        self.latest: int = self.encoder_length if initial is None else initial
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
        started = list(tokens) if self.start in tokens else [self.start, *tokens]  # text said before may precede it
        return Expanded(started, [], (0,) * self.encoder_length, self._timestamps(started))

    def _timestamps(self, tokens: Sequence[int]) -> Timestamps | None:
        """What the answer keeps to if the prompt asks for times: by a first one, or by a task and no word against."""
        if self.plain is None:
            return None
        first, last = self.plain + 1, self.plain + 1 + self.encoder_length
        header = list(tokens[len(tokens) - 1 - list(tokens)[::-1].index(self.start) :])
        tasks = [i for i, token in enumerate(header) if token in self.tasks]
        times = [i for i, token in enumerate(header) if first <= token <= last]
        if self.plain in header or not (tasks or times):
            return None
        said = header[tasks[-1] + 1 if tasks else times[0] :]
        return Timestamps(first, last, self.end, never=self.plain, latest=self.latest, said=tuple(said))

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """Ordinary positions of the decoder."""
        return linear_positions(len(tokens))
