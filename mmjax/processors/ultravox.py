"""Ultravox: clips of any length in windows of the encoder, eight of its steps to a token.

The first window is as long as its sound; those after it are filled up with zeros. Rows of a window that the sound does
not fill hold steps after its end, which hear it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mmjax.processors.base import Item, Kwargs
from mmjax.processors.clips import PIECE, ClipProcessor, Features, cut, joined, steps_of
from mmjax.text.tokenizer import Tokenizer


class Processor(ClipProcessor):
    """See `mmjax.processors.base.Processor`."""

    marker: Mapping[str, str] = {"audio": "<|audio|>"}
    placeholder: Mapping[str, str] = marker

    def __init__(self, config: dict[str, Any], files: Mapping[str, dict[str, Any]], tokenizer: Tokenizer | None):
        super().__init__(config, files, tokenizer)
        self.stack: int = config["stack_factor"]

    def tokenize(self, text: str, encode: Callable[..., list[int]]) -> list[int]:
        """The text as it stands: prompts come from the template, which has begun them already."""
        return encode(text, add_special_tokens=False)

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """Tokens of audio (samples,)."""
        whole, rest = divmod(-(-size[0] // self.mel.hop), self.window)
        return whole * self._rows(self.window) + self._rows(rest)

    def _rows(self, frames: int) -> int:
        return -(-steps_of(frames) // self.stack)

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item:
        """Mono float32 [n] at the model's rate -> pieces of its windows; step i32[rows], the first of a row's steps,
        and kept i32[rows], how many there are."""
        hop = self.mel.hop
        mel = self.mel.alone(np.pad(media, (0, -len(media) % hop)))
        parts = [self._window(mel, start) for start in range(0, mel.shape[1], self.window)]
        units = np.cumsum([0, *(len(part["start"]) for part in parts)])
        rows = []
        for part, first in zip(parts, units, strict=False):
            steps = int(part["reach"].sum())
            at = np.arange(0, steps, self.stack, dtype=np.int32)
            rows.append({"step": at + int(first) * PIECE, "kept": np.minimum(steps - at, self.stack)})
        picks = joined(rows)
        return Item(kind, joined(parts) | picks, units=int(units[-1]), rows=len(picks["step"]))

    def _window(self, mel: np.ndarray, start: int) -> Features:
        """The pieces of the window that begins at a frame of the clip."""
        part = mel[:, start : start + self.window]
        heard = steps_of(part.shape[1])
        if not start:
            return cut(part, heard, heard, 0)
        reach = min(-(-heard // self.stack) * self.stack, self.window // 2)
        part = np.pad(part, ((0, 0), (0, self.window - part.shape[1])))
        return cut(part, heard, reach, start // self.window)
