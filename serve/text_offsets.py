"""Where the tokens of completions begin in the text, in characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mmjax import AsyncLLM


class TextOffsets:
    """The offsets of the tokens of one output, in the order in which they come. start: of the first one. skip_special:
    special tokens are not in the text.

    A token that continues a character begins where that character does: the text is counted as it is completed.
    """

    def __init__(self, engine: AsyncLLM, start: int, *, skip_special: bool) -> None:
        self._engine, self._next, self._skip_special = engine, start, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Sequence[int]) -> list[int]:
        """The offset of each of the next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._next)
            if not (self._skip_special and self._engine.is_special(token)):
                self._next += len(self._decoder.decode(self._engine.bytes_of(token)))
        return offsets


def prompt_offsets(engine: AsyncLLM, tokens: Sequence[int], text: str) -> list[int]:
    """The offset of each token of a prompt in its text, which may lack the special tokens that the tokenizer adds and
    the space that it puts before the first word."""
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for token in tokens:
        offsets.append(offset)
        piece = decoder.decode(engine.bytes_of(token))
        if engine.is_special(token) and not text.startswith(piece, offset):
            continue
        if offset == 0 and not text.startswith(piece):
            piece = piece.removeprefix(" ")
        offset = min(offset + len(piece), len(text))
    return offsets
